from __future__ import annotations

import math

import pytest
import torch
from medsr.errors import SettingError
from medsr.losses.uncertainty import UncertaintyAwareLoss


def channels(*values: list[float]) -> torch.Tensor:
    """One sample of two voxels per channel."""
    return torch.tensor(values).reshape(1, len(values), 2, 1, 1)


def test_plain_image_loss_is_l1():
    loss = UncertaintyAwareLoss()
    assert loss(channels([0.5, 0.1]), channels([0.2, 0.2])).item() == pytest.approx(0.2)
    assert loss.last_terms == {"l1": pytest.approx(0.2)}


def test_terms_of_the_uncertainty_by_hand():
    loss = UncertaintyAwareLoss(uncertainty=True, likelihood_weight=2.0, error_weight=3.0)
    value = loss(channels([0.5, 0.1], [0.1, 0.2]), channels([0.2, 0.2]))
    # Errors 0.3 and 0.1, predicted 0.1 and 0.2.
    likelihood = (0.3 / 0.1 + math.log(0.1) + 0.1 / 0.2 + math.log(0.2)) / 2
    error = (abs(0.1 - 0.3) + abs(0.2 - 0.1)) / 2
    assert loss.last_terms["l1"] == pytest.approx(0.2)
    assert loss.last_terms["likelihood"] == pytest.approx(2 * likelihood, rel=1e-5)
    assert loss.last_terms["error"] == pytest.approx(3 * error, rel=1e-5)
    assert value.item() == pytest.approx(0.2 + 2 * likelihood + 3 * error, rel=1e-5)


def test_terms_of_the_labels_by_hand():
    loss = UncertaintyAwareLoss(label_classes=1)
    logits = math.log(3)  # a probability of 3/4
    loss(channels([0.0, 0.0], [logits, -logits]), channels([0.0, 0.0], [1.0, 1.0]))
    assert loss.last_terms["cross_entropy"] == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2, rel=1e-5)
    overlap, total = 0.75 + 0.25, 0.75**2 + 0.25**2 + 2
    assert loss.last_terms["dice"] == pytest.approx(1 - 2 * overlap / total, rel=1e-5)
    assert loss.last_terms["l1"] == 0


def test_all_terms_with_the_uncertainty_as_the_last_channel():
    loss = UncertaintyAwareLoss(label_classes=2, uncertainty=True)
    perfect = channels([0.2, 0.4], [50.0, -50.0], [-50.0, 50.0], [0.01, 0.01])
    target = channels([0.2, 0.4], [1.0, 0.0], [0.0, 1.0])
    value = loss(perfect, target)
    assert list(loss.last_terms) == ["l1", "likelihood", "error", "cross_entropy", "dice"]
    assert loss.last_terms["error"] == pytest.approx(0.01)
    assert loss.last_terms["likelihood"] == pytest.approx(math.log(0.01))
    assert loss.last_terms["cross_entropy"] == pytest.approx(0, abs=1e-6)
    assert loss.last_terms["dice"] == pytest.approx(0, abs=1e-6)
    assert value.item() == pytest.approx(sum(loss.last_terms.values()), rel=1e-5)


def test_the_likelihood_is_smallest_at_the_expected_error():
    # Skewed errors: mean 1, median 0.69.
    error = torch.distributions.Exponential(1.0).sample((4000,)).reshape(1, 1, 4000)
    loss = UncertaintyAwareLoss(uncertainty=True, error_weight=0)
    levels = torch.linspace(0.3, 2.0, 171)
    values = [loss(torch.cat([error, torch.full_like(error, u)], 1), torch.zeros_like(error)) for u in levels]
    assert levels[torch.stack(values).argmin()].item() == pytest.approx(error.mean().item(), abs=0.011)


def test_training_finds_the_expected_error_of_every_group():
    torch.manual_seed(1)
    truth = torch.tensor([0.05, 0.2, 0.8])
    noise = torch.distributions.Laplace(0.0, truth).sample((3000,))[None].transpose(1, 2)  # (1, 3, 3000)
    image = noise.reshape(1, 1, 3, 3000)
    log_u = torch.zeros(3, requires_grad=True)
    loss = UncertaintyAwareLoss(uncertainty=True, error_weight=0)
    optimiser = torch.optim.Adam([log_u], lr=0.05)
    for _ in range(200):
        optimiser.zero_grad()
        u = log_u.exp()[None, None, :, None].expand_as(image)
        loss(torch.cat([image, u], 1), torch.zeros_like(image)).backward()
        optimiser.step()
    torch.testing.assert_close(log_u.exp().detach(), image.abs().mean(dim=(0, 1, 3)), rtol=0.02, atol=0)


def gradients(**settings) -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.rand(1, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    predicted = torch.full((1, 1, 4, 4, 4), 0.02).requires_grad_()
    loss = UncertaintyAwareLoss(uncertainty=True, **settings)
    loss(torch.cat([image, predicted], 1), torch.zeros(1, 1, 4, 4, 4)).backward()
    return image.grad, predicted.grad


def test_the_image_learns_from_l1_alone_unless_told_otherwise():
    image, predicted = gradients()
    torch.testing.assert_close(image, torch.full_like(image, 1 / 64))
    assert (predicted != 0).all()
    published, same = gradients(image_from_likelihood=True)
    # The likelihood adds the gradient divided by the uncertainty: fifty times as much.
    torch.testing.assert_close(published, torch.full_like(image, (1 + 1 / 0.02) / 64))
    torch.testing.assert_close(same, predicted)


def test_the_weights_switch_terms_off():
    image, predicted = gradients(likelihood_weight=0, error_weight=0)
    assert (predicted == 0).all()
    assert (image != 0).all()
    _, predicted = gradients(likelihood_weight=0)
    # Error above prediction everywhere (nearly): only the sign of the difference counts.
    assert predicted.abs().unique().tolist() == pytest.approx([1 / 64])


def test_better_predictions_cost_less():
    loss = UncertaintyAwareLoss(label_classes=1, uncertainty=True)
    target = torch.rand(2, 2, 3, 4, 5).round()

    def cost(logit, image_error, u_error):
        pred = torch.cat([target[:, :1] + image_error, (target[:, 1:] * 2 - 1) * logit], 1)
        u = torch.full_like(pred[:, :1], image_error + u_error)
        return loss(torch.cat([pred, u], 1), target).item()

    best = cost(5.0, 0.1, 0.0)
    assert best < cost(1.0, 0.1, 0.0)
    assert best < cost(5.0, 0.2, 0.0)
    assert best < cost(5.0, 0.1, 0.1)
    assert best < cost(5.0, 0.1, -0.05)


def test_empty_and_soft_labels_are_finite():
    loss = UncertaintyAwareLoss(label_classes=2)
    pred = torch.zeros(1, 3, 4, 4, 4, requires_grad=True)
    value = loss(pred, torch.zeros(1, 3, 4, 4, 4))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(pred.grad).all()
    assert loss.last_terms["dice"] == pytest.approx(1)
    assert math.isfinite(loss(pred, torch.full((1, 3, 4, 4, 4), 0.5)).item())


def test_half_precision_is_summed_in_float32():
    loss = UncertaintyAwareLoss(uncertainty=True)
    value = loss(torch.full((1, 2, 8, 8, 8), 0.5, dtype=torch.bfloat16), torch.zeros(1, 1, 8, 8, 8))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(0.5 + 1 + math.log(0.5))


@pytest.mark.parametrize(
    ("settings", "pred", "target", "message"),
    [
        ({}, 2, 1, "expects 1 predicted and 1 target channels, got 2 and 1"),
        ({"uncertainty": True}, 1, 1, "expects 2 predicted and 1 target channels, got 1 and 1"),
        ({"label_classes": 2}, 3, 1, "expects 3 predicted and 3 target channels, got 3 and 1"),
        (
            {"label_classes": 2, "uncertainty": True},
            3,
            3,
            "expects 4 predicted and 3 target channels, got 3 and 3",
        ),
    ],
)
def test_a_channel_mismatch_is_explained(settings, pred, target, message):
    with pytest.raises(SettingError, match=message):
        UncertaintyAwareLoss(**settings)(torch.rand(1, pred, 4, 4, 4), torch.rand(1, target, 4, 4, 4))


def test_last_terms_belong_to_the_last_call_and_are_plain_numbers():
    loss = UncertaintyAwareLoss(uncertainty=True)
    assert loss.last_terms == {}
    pred = torch.rand(1, 2, 4, 4, 4, requires_grad=True)
    loss(pred, torch.zeros(1, 1, 4, 4, 4))
    first = loss.last_terms
    loss(pred, torch.ones(1, 1, 4, 4, 4))
    assert first != loss.last_terms
    assert list(first) == ["l1", "likelihood", "error"]
    assert all(type(value) is float for value in first.values())
