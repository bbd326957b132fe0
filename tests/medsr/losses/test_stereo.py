from __future__ import annotations

from typing import Any

import pytest
import torch
from medsr.errors import SettingError
from medsr.losses.stereo import StereoLoss
from medsr.networks.parallax import ParallaxResult, StereoPrediction
from medsr.networks.segsrnet import SEGSRNet
from torch import Tensor
from torch.nn import functional as F

TERMS = ("l1", "consistency", "photometric", "smoothness", "cycle")


def drawn(batch: int = 2, height: int = 3, width: int = 5) -> tuple[StereoPrediction, Tensor]:
    """A result with maps and masks that have nothing to do with it, and a truth, at x2."""
    made = torch.Generator().manual_seed(4)
    image, target = (torch.rand(batch, 6, 2 * height, 2 * width, generator=made) for _ in range(2))
    low = torch.rand(batch, 6, height, width, generator=made)
    maps = [torch.randn(batch, height, width, width, generator=made).softmax(3) for _ in range(2)]
    valid = torch.rand(2 * batch, 1, height, width, generator=made)
    found = ParallaxResult(torch.zeros(2 * batch, 1, height, width), valid, *maps)
    return StereoPrediction(image, low, found), target


def by_loops(pred: StereoPrediction, target: Tensor) -> dict[str, float]:
    """The terms as the specification has them, pixel by pixel, without weights."""
    batch, _, height, width = pred.low.shape
    shape = {"mode": "bicubic", "align_corners": False}
    enlarged = F.interpolate(pred.low, scale_factor=2, **shape)
    missed = F.interpolate((target - enlarged).abs(), scale_factor=0.5, **shape).chunk(2, 1)
    left = F.interpolate((target - pred.image).abs(), scale_factor=0.5, **shape).chunk(2, 1)
    valid, maps = pred.parallax.valid.chunk(2), (pred.parallax.to_left, pred.parallax.to_right)

    def carried(weights: Tensor, image: Tensor) -> Tensor:
        found = torch.zeros_like(image)
        for b in range(batch):
            for y in range(height):
                for u in range(width):
                    found[b, :, y, u] = sum(weights[b, y, u, v] * image[b, :, y, v] for v in range(width))
        return found

    terms = dict.fromkeys(TERMS, 0.0)
    for side, other in ((0, 1), (1, 0)):
        channels = slice(3 * side, 3 * side + 3)
        here = maps[side]
        for name, mine, theirs in (
            ("consistency", left[side], carried(here, left[other])),
            ("photometric", missed[side], carried(here, missed[other])),
            ("cycle", missed[side], carried(here, carried(maps[other], missed[side]))),
        ):
            terms[name] += float((valid[side] * mine - valid[side] * theirs).abs().mean())
        terms["l1"] += float((pred.image[:, channels] - target[:, channels]).abs().mean())
        steps = [
            abs(here[b, y, u, v] - here[b, y + 1, u, v])
            for b, y, u, v in _grid(batch, height - 1, width, width)
        ]
        diagonal = [
            abs(here[b, y, u, v] - here[b, y, u + 1, v + 1])
            for b, y, u, v in _grid(batch, height, width - 1, width - 1)
        ]
        terms["smoothness"] += float(torch.stack(steps).mean() + torch.stack(diagonal).mean())
    return terms


def _grid(*sizes: int) -> list[tuple[int, ...]]:
    return [tuple(int(i) for i in one) for one in torch.cartesian_prod(*(torch.arange(n) for n in sizes))]


def test_the_terms_are_their_definition():
    pred, target = drawn()
    loss = StereoLoss(
        l1_weight=2, consistency_weight=3, photometric_weight=4, smoothness_weight=5, cycle_weight=6
    )
    value = loss(pred, target)
    expected = by_loops(pred, target)
    weights = dict(zip(TERMS, (2, 3, 4, 5, 6), strict=True))
    assert loss.last_terms == {
        name: pytest.approx(weights[name] * expected[name], rel=1e-4) for name in TERMS
    }
    assert value.item() == pytest.approx(sum(weights[name] * expected[name] for name in TERMS), rel=1e-4)


def test_the_published_weights():
    assert StereoLoss().describe() == {
        "l1_weight": 1.0,
        "consistency_weight": 0.1,
        "photometric_weight": 0.1,
        "smoothness_weight": 0.1,
        "cycle_weight": 0.1,
    }


@pytest.mark.parametrize("left_out", TERMS[1:])
def test_a_term_of_weight_zero_is_left_out(left_out):
    pred, target = drawn()
    full, loss = StereoLoss(), StereoLoss(**{f"{left_out}_weight": 0})
    full(pred, target)
    loss(pred, target)
    assert set(loss.last_terms) == set(TERMS) - {left_out}
    assert all(value == pytest.approx(full.last_terms[name]) for name, value in loss.last_terms.items())


def test_sr_only_takes_results_with_and_without_maps():
    pred, target = drawn()
    loss = StereoLoss(sr_only=True)
    assert loss(pred, target).item() == loss(pred.image, target).item() == loss.last_terms["l1"]
    assert loss.describe() == {"l1_weight": 1.0}


def test_the_squared_error_joins_or_replaces_the_absolute_one():
    pred, target = drawn()
    squared = float((pred.image - target).square().unflatten(1, (2, 3)).mean((0, 2, 3, 4)).sum())
    both = StereoLoss(mse_weight=3)
    both(pred, target)
    assert set(both.last_terms) == {*TERMS, "mse"}
    assert both.last_terms["mse"] == pytest.approx(3 * squared, rel=1e-5)
    alone = StereoLoss(l1_weight=0, mse_weight=3, sr_only=True)
    assert alone(pred.image, target).item() == pytest.approx(3 * squared, rel=1e-5)
    assert alone.describe() == {"mse_weight": 3.0}


def test_balanced_crops_count_by_their_error_relative_to_that_of_interpolation():
    pred, target = drawn()
    enlarged = F.interpolate(pred.low, scale_factor=2, mode="bicubic", align_corners=False)
    missed = (target - enlarged).abs().mean((1, 2, 3))
    left = (target - pred.image).abs().mean((1, 2, 3))
    loss = StereoLoss(sr_only=True, balance=1)
    relative = 2 * (0.02 * left / (missed + 1 / 510)).mean()
    assert loss(pred, target).item() == pytest.approx(relative.item(), rel=1e-5)
    half = StereoLoss(sr_only=True, balance=0.5)
    between = 2 * (left * (0.02 / (missed + 1 / 510)).sqrt()).mean()
    assert half(pred, target).item() == pytest.approx(between.item(), rel=1e-5)
    assert half.describe() == {"l1_weight": 1.0, "balance": 0.5}
    # A pair a hundred times as soft counts as much, but for the half grey level.
    soft = pred._replace(image=pred.image / 100, low=pred.low / 100)
    assert loss(soft, target / 100).item() == pytest.approx(relative.item(), rel=0.5)
    squared = StereoLoss(l1_weight=0, mse_weight=1, sr_only=True, balance=1)
    errors = (target - pred.image).square().mean((1, 2, 3)) * (0.02 / (missed + 1 / 510)) ** 2
    assert squared(pred, target).item() == pytest.approx(2 * errors.mean().item(), rel=1e-5)


def test_the_balance_leaves_the_terms_of_the_matching():
    pred, target = drawn()
    plain, balanced = StereoLoss(), StereoLoss(balance=1)
    plain(pred, target)
    balanced(pred, target)
    matching = [{name: loss.last_terms[name] for name in TERMS[1:]} for loss in (plain, balanced)]
    assert matching[0] == matching[1]


def test_a_perfect_result_with_one_disparity_everywhere_costs_nothing():
    # The right view is the left one, a column further; the low pair misses the same everywhere.
    target, low = torch.full((1, 6, 8, 8), 0.75), torch.full((1, 6, 4, 4), 0.25)
    forth, back = torch.eye(4).roll(1, 1).expand(1, 4, 4, 4), torch.eye(4).roll(1, 0).expand(1, 4, 4, 4)
    found = ParallaxResult(torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4), forth, back)
    loss = StereoLoss()
    loss(StereoPrediction(target, low, found), target)
    assert loss.last_terms == {name: pytest.approx(0, abs=1e-7) for name in TERMS}


def leaves() -> tuple[StereoPrediction, Tensor, dict[str, Tensor]]:
    pred, target = drawn()
    image, *found = (
        one.clone().requires_grad_() for one in (pred.image, pred.parallax.valid, *pred.parallax[2:4])
    )
    given = dict(zip(("image", "valid", "to_left", "to_right"), (image, *found), strict=True))
    result = ParallaxResult(pred.parallax.features, found[0], found[1], found[2])
    return StereoPrediction(image, pred.low, result), target, given


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        ("l1", {"image"}),
        ("consistency", {"image"}),
        ("photometric", {"to_left", "to_right"}),
        ("smoothness", {"to_left", "to_right"}),
        ("cycle", {"to_left", "to_right"}),
    ],
)
def test_who_learns_from_which_term(term, expected):
    pred, target, given = leaves()
    weights: dict[str, Any] = {f"{name}_weight": float(name == term) for name in TERMS}
    loss = StereoLoss(**{**weights, "l1_weight": 1e-9 if term != "l1" else 1.0})
    loss(pred, target).backward()
    moved = {
        name for name, one in given.items() if one.grad is not None and float(one.grad.abs().max()) > 1e-8
    }
    assert moved == expected


def test_the_masks_say_where_a_matching_counts():
    pred, target = drawn()
    blind = pred.parallax._replace(valid=torch.zeros_like(pred.parallax.valid))
    loss = StereoLoss()
    loss(pred._replace(parallax=blind), target)
    assert all(loss.last_terms[name] == 0 for name in ("consistency", "photometric", "cycle"))
    assert loss.last_terms["smoothness"] > 0


def test_a_crop_of_one_pixel_has_no_neighbours():
    pred, target = drawn(height=1, width=1)
    loss = StereoLoss()
    assert loss(pred, target).isfinite()
    assert loss.last_terms["smoothness"] == 0


def test_autocast_does_not_cost_precision():
    pred, target = drawn()
    expected = StereoLoss()(pred, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(StereoLoss()(pred, target), expected)


def test_a_few_steps_with_the_network_lower_the_loss():
    torch.manual_seed(0)
    network = SEGSRNet(2, features=8, growth=4, fusion_growth=4, blocks=2)
    target = F.interpolate(torch.rand(1, 3, 4, 6), size=(16, 24), mode="bicubic").clamp(0, 1)
    target = torch.cat([target, target.roll(-4, 3)], 1)
    low, loss = F.avg_pool2d(target, 2), StereoLoss()
    values = []
    for _ in range(12):
        value = loss(network(low, parallax="maps"), target)
        gradients = torch.autograd.grad(value, list(network.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                # The start of Adam, whose import takes longer than all of this.
                parameter -= 3e-3 * gradient.sign()
        values.append(value.item())
    assert values[-1] < 0.9 * values[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cycle_weight": -1}, "must not be negative"),
        ({"l1_weight": 0}, "holds the views to the truth"),
        ({"balance": 1.5}, "from 0 to 1, not 1.5"),
    ],
)
def test_weights_that_make_no_loss_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        StereoLoss(**settings)


def test_missing_maps_and_unequal_images_are_explained():
    pred, target = drawn()
    with pytest.raises(SettingError, match="call the network with parallax='maps', or set sr_only"):
        StereoLoss()(pred.image, target)
    blank = pred._replace(parallax=pred.parallax._replace(to_left=None))
    with pytest.raises(SettingError, match="call the network with parallax='maps'"):
        StereoLoss()(blank, target)
    with pytest.raises(SettingError, match="check the scale of the network"):
        StereoLoss()(pred, target[..., 1:])
    with pytest.raises(SettingError, match="balance needs the small pair"):
        StereoLoss(sr_only=True, balance=1)(pred.image, target)
