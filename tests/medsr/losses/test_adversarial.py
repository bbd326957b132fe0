from __future__ import annotations

import math

import pytest
import torch
from medsr.errors import SettingError
from medsr.losses.adversarial import RelativisticLoss
from torch.nn import functional as F

FORMS = pytest.mark.parametrize("average", [True, False])


def logits(seed: int, size: int = 4) -> torch.Tensor:
    return torch.randn(size, 1, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@FORMS
def test_equal_logits_cost_the_logarithm_of_two(average):
    loss, same = RelativisticLoss(average), torch.full((3, 1), 7.0)
    assert loss.generator(same, same).item() == pytest.approx(math.log(2))
    assert loss.discriminator(same, same).item() == pytest.approx(math.log(2))


@FORMS
def test_swapping_the_sides_swaps_the_players(average):
    loss, real, fake = RelativisticLoss(average), logits(0), logits(1)
    assert loss.generator(real, fake).item() == pytest.approx(loss.discriminator(fake, real).item())
    assert loss.generator(real, fake).item() != pytest.approx(loss.discriminator(real, fake).item())


def test_the_average_form_is_the_published_cross_entropy():
    real, fake = logits(0), logits(1)
    d_real, d_fake = real - fake.mean(), fake - real.mean()
    ones, zeros = torch.ones(4, 1), torch.zeros(4, 1)
    entropy = F.binary_cross_entropy_with_logits
    loss = RelativisticLoss()
    discriminator = (entropy(d_real, ones) + entropy(d_fake, zeros)) / 2
    generator = (entropy(d_real, zeros) + entropy(d_fake, ones)) / 2
    torch.testing.assert_close(loss.discriminator(real, fake), discriminator)
    torch.testing.assert_close(loss.generator(real, fake), generator)


def test_the_plain_form_pairs_the_images():
    loss = RelativisticLoss(average=False)
    real, fake = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [-3.0]])
    generator = (math.log1p(math.exp(-1)) + math.log1p(math.exp(5))) / 2
    assert loss.generator(real, fake).item() == pytest.approx(generator)
    # The average form does not know which image belongs to which.
    shuffled = fake.flip(0)
    assert loss.generator(real, shuffled).item() != pytest.approx(generator)
    average = RelativisticLoss()
    assert average.generator(real, shuffled).item() == pytest.approx(average.generator(real, fake).item())


def test_with_one_image_both_forms_are_the_same():
    real, fake = logits(0, 1), logits(1, 1)
    for player in ("generator", "discriminator"):
        forms = [getattr(RelativisticLoss(average), player)(real, fake).item() for average in (True, False)]
        assert forms[0] == pytest.approx(forms[1])


@FORMS
def test_a_better_image_costs_the_generator_less_and_the_discriminator_more(average):
    loss, real, fake = RelativisticLoss(average), logits(0), logits(1)
    assert loss.generator(real, fake + 1) < loss.generator(real, fake)
    assert loss.discriminator(real, fake + 1) > loss.discriminator(real, fake)
    # Only differences count.
    assert loss.generator(real + 5, fake + 5).item() == pytest.approx(
        loss.generator(real, fake).item(), rel=1e-5
    )


def test_the_generator_learns_through_both_terms_and_the_true_images_stay():
    real, fake = logits(0), logits(1)
    RelativisticLoss().generator(real, fake).backward()
    assert real.grad is None
    # By hand: d/df of softplus(mean r - f) / 2 and of softplus(r - mean f) / 2, each a mean over four images.
    own = -torch.sigmoid(real.mean() - fake) / 8
    through_the_mean = -torch.sigmoid(real - fake.mean()).mean() / 8
    torch.testing.assert_close(fake.grad, (own + through_the_mean).detach())
    assert through_the_mean.item() != pytest.approx(0, abs=1e-3)


def test_the_discriminator_gets_the_whole_gradient_of_the_formula():
    real, fake = (logits(seed) for seed in (0, 1))
    loss = RelativisticLoss()
    loss.discriminator(real, fake).backward()
    step = 1e-2
    for side, other in ((real, False), (fake, True)):
        up, down = side.detach().clone(), side.detach().clone()
        up[0], down[0] = up[0] + step, down[0] - step
        values = [loss.discriminator(*((real, v) if other else (v, fake))).item() for v in (up, down)]
        assert side.grad[0].item() == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    real, fake = torch.tensor([[20.0], [19.0]], dtype=dtype), torch.tensor([[-20.0], [-60000.0]], dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = RelativisticLoss().generator(real, fake)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, RelativisticLoss().generator(real.float(), fake.float()))


def test_a_certain_discriminator_leaves_a_finite_loss_with_gradient():
    real, fake = torch.full((2, 1), 500.0), torch.full((2, 1), -500.0, requires_grad=True)
    value = RelativisticLoss().generator(real, fake)
    value.backward()
    assert value.item() == pytest.approx(1000)
    assert fake.grad.sum().item() == pytest.approx(-1)


def test_different_shapes_are_refused():
    # Broadcasting would compare every image with every other.
    with pytest.raises(SettingError, match=r"logits of one shape, got \(4,\) and \(4, 1\)"):
        RelativisticLoss().generator(torch.zeros(4, 1), torch.zeros(4))
