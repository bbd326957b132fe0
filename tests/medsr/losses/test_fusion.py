from __future__ import annotations

import logging
import math

import pytest
import torch
from medsr.errors import SettingError
from medsr.losses.adversarial import RelativisticLoss
from medsr.losses.feature import FeatureLoss
from medsr.losses.fusion import FusionLoss
from torch import nn

LN2 = math.log(2)


def doubling(layers: str = "0") -> FeatureLoss:
    """Features that are twice the image."""
    network = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False))
    nn.init.constant_(network[0].weight, 2.0)
    return FeatureLoss("bundle", network=network, layers=layers)


def images() -> tuple[torch.Tensor, torch.Tensor]:
    """An error of 0.5 everywhere."""
    return torch.full((2, 1, 4, 4), 0.75, requires_grad=True), torch.full((2, 1, 4, 4), 0.25)


def logits() -> dict[str, torch.Tensor]:
    return {"real_logits": torch.zeros(2, 1), "fake_logits": torch.zeros(2, 1)}


def test_the_published_sum_by_hand():
    loss = FusionLoss(doubling())
    value = loss(*images(), **logits())
    assert loss.last_terms == {
        "l1": pytest.approx(0.5),
        "mse": pytest.approx(0.5 * 0.25),
        "feature": pytest.approx(1.0),
        "adversarial": pytest.approx(0.005 * LN2),
    }
    assert value.item() == pytest.approx(0.5 + 0.125 + 1.0 + 0.005 * LN2)


def test_the_weights_scale_the_terms():
    loss = FusionLoss(doubling(), feature_weight=2, l1_weight=3, adversarial_weight=4, mse_weight=5)
    assert loss(*images(), **logits()).item() == pytest.approx(2 * 1.0 + 3 * 0.5 + 4 * LN2 + 5 * 0.25)


@pytest.mark.parametrize("left_out", ["feature", "l1", "adversarial", "mse"])
def test_a_term_of_weight_zero_is_left_out(left_out):
    loss = FusionLoss(doubling(), **{f"{left_out}_weight": 0})
    loss(*images(), **logits())
    assert set(loss.last_terms) == {"feature", "l1", "adversarial", "mse"} - {left_out}


def test_without_a_backbone_there_is_no_feature_term_and_one_warning(caplog):
    with caplog.at_level(logging.WARNING):
        loss = FusionLoss()
    loss(*images(), **logits())
    assert set(loss.last_terms) == {"l1", "mse", "adversarial"}
    assert len(caplog.records) == 1
    assert loss.describe()["perceptual"] == "none"


def test_a_feature_term_that_is_switched_off_needs_no_warning(caplog):
    with caplog.at_level(logging.WARNING):
        loss = FusionLoss(feature_weight=0)
    assert caplog.records == []
    assert loss.describe()["perceptual"] == "none"


def test_the_pixel_terms_alone_ask_nobody_else():
    loss = FusionLoss(doubling())
    assert loss.pixel(*images()).item() == pytest.approx(0.5 + 0.125)
    assert set(loss.last_terms) == {"l1", "mse"}


def test_the_generator_is_told_to_raise_the_logits_of_its_images():
    fake = torch.zeros(2, 1, requires_grad=True)
    pred, target = images()
    FusionLoss(feature_weight=0)(
        pred, target, real_logits=torch.zeros(2, 1), fake_logits=fake + pred.mean() * 0
    ).backward()
    assert (fake.grad < 0).all()
    # L1 and squared error: 1 / 32 and 0.5 * 2 * 0.5 / 32.
    torch.testing.assert_close(pred.grad, torch.full_like(pred, 1.5 / 32))


def test_the_adversarial_form_can_be_chosen():
    real, fake = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [-3.0]])
    plain = RelativisticLoss(average=False)
    loss = FusionLoss(adversarial=plain, feature_weight=0, adversarial_weight=1)
    loss(*images(), real_logits=real, fake_logits=fake)
    assert loss.last_terms["adversarial"] == pytest.approx(plain.generator(real, fake).item())


def test_half_precision_is_summed_in_float32():
    pred, target = (image.detach().bfloat16() for image in images())
    value = FusionLoss(feature_weight=0, adversarial_weight=0)(pred, target)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(0.625)


def test_the_record_names_weights_and_forms():
    assert FusionLoss(doubling()).describe() == {
        "feature_weight": 1.0,
        "l1_weight": 1.0,
        "adversarial_weight": 0.005,
        "mse_weight": 0.5,
        "relativistic_average": True,
        "perceptual": "bundle",
        "network": "Sequential",
        "layers": {"0": 1.0},
        "criterion": "l1",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"l1_weight": -1}, "must not be negative"),
        ({"l1_weight": 0, "mse_weight": 0}, "a pixel term must hold the image to the truth"),
    ],
)
def test_weights_that_make_no_loss_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        FusionLoss(feature_weight=0, **settings)


def test_missing_logits_and_unequal_images_are_explained():
    loss = FusionLoss(feature_weight=0)
    with pytest.raises(SettingError, match="needs the logits of both images"):
        loss(*images(), real_logits=torch.zeros(2, 1))
    with pytest.raises(SettingError, match="check the scale of the network"):
        loss.pixel(torch.rand(1, 1, 4, 4), torch.rand(1, 1, 8, 8))
