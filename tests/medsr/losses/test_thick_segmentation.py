from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from medsr.errors import DataError, SettingError
from medsr.losses.thick_segmentation import ThickSegmentationLoss
from torch import Tensor
from torch.nn import functional as F

TERMS = ["thick_cross_entropy", "thin_cross_entropy", "thin_dice", "cosine", "pairwise"]


class Prediction(NamedTuple):
    thick: Tensor
    thin: Tensor
    feature: Tensor


def make(classes: int = 2, **settings) -> ThickSegmentationLoss:
    torch.manual_seed(0)
    return ThickSegmentationLoss(classes, 3, 5, **settings)


def only(*terms: str, **settings) -> ThickSegmentationLoss:
    """The thick terms, and those of the rest that are named."""
    off = {f"{term}_weight": 0 for term in ("uncertainty", "thin", "cosine", "pairwise") if term not in terms}
    thick_dice = {"thick_dice_weight": "uncertainty" not in terms}
    return make(**{**off, **thick_dice, **settings})


def probabilities(*shape: int) -> Tensor:
    return torch.randn(*shape).softmax(1)


def example(classes: int = 2) -> tuple[Prediction, dict[str, Tensor]]:
    torch.manual_seed(1)
    thick, thin = (2, classes, 8, 8, 3), (2, classes, 8, 8, 12)
    pred = Prediction(torch.randn(thick), torch.randn(thin), torch.randn(2, 3, 4, 4, 3))
    pred = Prediction(*(part.requires_grad_() for part in pred))
    target = {
        "thick": probabilities(*thick),
        "thin": probabilities(*thin),
        "uncertainty": torch.rand(2, 1, 8, 8, 3),
        "teacher": torch.randn(2, 5, 4, 4, 3),
    }
    return pred, target


def voxels(
    logit: list[float], label: list[float], **more: list[float]
) -> tuple[Prediction, dict[str, Tensor]]:
    """Some voxels of one thick slice, two classes: logit and probability of the foreground."""

    def grid(values: list[float]) -> Tensor:
        return torch.tensor(values).view(1, 1, len(values), 1, 1)

    foreground = grid(label)
    labels = torch.cat([1 - foreground, foreground], 1)
    logits = torch.cat([torch.zeros_like(foreground), grid(logit)], 1)
    target = {"thick": labels, "thin": labels, **{name: grid(values) for name, values in more.items()}}
    return Prediction(logits, logits, torch.zeros(1, 3, 1, 1, 1)), target


def test_every_term_is_logged_as_it_enters_the_sum():
    loss = make()
    assert loss.last_terms == {}
    value = loss(*example())
    assert list(loss.last_terms) == TERMS
    assert all(type(term) is float and term > 0 for term in loss.last_terms.values())
    assert value.item() == pytest.approx(sum(loss.last_terms.values()))
    assert value.shape == ()


@pytest.mark.parametrize(
    ("setting", "gone"),
    [
        ("thin_weight", {"thin_cross_entropy", "thin_dice"}),
        ("cosine_weight", {"cosine"}),
        ("pairwise_weight", {"pairwise"}),
    ],
)
def test_a_weight_scales_its_terms_and_zero_removes_exactly_them(setting, gone):
    pred, target = example()
    whole, double, without = make(), make(**{setting: 2}), make(**{setting: 0})
    for loss in (whole, double, without):
        loss(pred, target)
    rest = {name: value for name, value in whole.last_terms.items() if name not in gone}
    assert without.last_terms == rest
    assert double.last_terms == {
        name: pytest.approx(value * (2 if name in gone else 1)) for name, value in whole.last_terms.items()
    }


def test_a_term_that_is_left_out_needs_no_input_and_no_parameters():
    pred, target = example()
    loss = only()
    assert list(loss.parameters()) == []
    pred = Prediction(pred.thick, None, None)
    loss(pred, {"thick": target["thick"]}).backward()
    assert list(loss.last_terms) == ["thick_cross_entropy", "thick_dice"]
    assert [name for name, _ in only("cosine").named_parameters()] == [
        "cosine.adapter.weight",
        "cosine.adapter.bias",
    ]
    assert list(only("pairwise").parameters()) == []


def test_uncertainty_one_leaves_a_hundredth_of_a_voxel():
    entropy = [math.log(1 + math.exp(logit)) for logit in (1.0, 2.0, 3.0)]  # of the background
    pred, target = voxels([1.0, 2.0, 3.0], [0, 0, 0], uncertainty=[0.0, 0.5, 1.0])
    loss = only("uncertainty", uncertainty_weight=0.99)
    expected = (entropy[0] + 0.505 * entropy[1] + 0.01 * entropy[2]) / 3
    assert loss(pred, target).item() == pytest.approx(expected)
    assert list(loss.last_terms) == ["thick_cross_entropy"]


def test_the_weight_falls_on_every_sample_and_slice_of_its_own():
    pred, target = example()
    loss = only("uncertainty", uncertainty_weight=1.0)
    for place in [(0, 0, 1, 2, 0), (1, 0, 7, 3, 2)]:
        target["uncertainty"] = torch.ones(2, 1, 8, 8, 3)
        target["uncertainty"][place] = 0
        gradient = torch.autograd.grad(loss(pred, target), pred.thick)[0].abs().sum(1, keepdim=True)
        assert gradient.nonzero().tolist() == [list(place)]


def test_dice_of_the_thick_grid_is_weighted_and_knows_no_uncertainty():
    pred, target = voxels([math.log(3), -math.log(3)], [1, 1], uncertainty=[0.0, 1.0])
    dice = 1 - 2 * (0.75 + 0.25) / (1 + 2)
    loss = only()
    loss(pred, target)
    assert loss.last_terms["thick_cross_entropy"] == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)
    assert loss.last_terms["thick_dice"] == pytest.approx(dice, rel=1e-4)
    loss = only("uncertainty", uncertainty_weight=1.0, thick_dice_weight=0.5)
    loss(pred, target)
    assert loss.last_terms["thick_cross_entropy"] == pytest.approx(-math.log(0.75) / 2)
    assert loss.last_terms["thick_dice"] == pytest.approx(0.5 * dice, rel=1e-4)


def test_the_thin_terms_by_hand():
    pred, target = voxels([math.log(3), -math.log(3), 0.0], [1, 0, 0])
    loss = only("thin", thin_weight=2)
    loss(pred, target)
    entropy = -(math.log(0.75) + math.log(0.75) + math.log(0.5)) / 3
    assert loss.last_terms["thin_cross_entropy"] == pytest.approx(2 * entropy)
    assert loss.last_terms["thin_dice"] == pytest.approx(
        2 * (1 - 2 * 0.75 / (0.75 + 0.25 + 0.5 + 1)), rel=1e-4
    )


def test_dice_is_taken_per_sample_and_foreground_class():
    torch.manual_seed(0)
    index = torch.randint(0, 3, (2, 4, 4, 6))
    labels = F.one_hot(index, 3).movedim(-1, 1).float()
    thin = torch.randn(2, 3, 4, 4, 6)
    loss = only("thin", classes=3)
    loss(Prediction(labels, thin, None), {"thick": labels, "thin": labels})
    share = thin.softmax(1)
    values = [
        1 - 2 * (share[b, k] * labels[b, k]).sum() / (share[b, k].sum() + labels[b, k].sum())
        for b in range(2)
        for k in (1, 2)
    ]
    assert loss.last_terms["thin_dice"] == pytest.approx(float(torch.stack(values).mean()), rel=1e-4)


def test_soft_labels_have_their_optimum_at_themselves():
    labels = probabilities(1, 3, 4, 4, 5)
    loss = only("thin", classes=3)
    target = {"thick": labels, "thin": labels}

    def terms(logits: Tensor) -> tuple[float, float]:
        loss(Prediction(labels, logits, None), target)
        return loss.last_terms["thin_cross_entropy"], loss.last_terms["thin_dice"]

    best = terms(labels.log())
    assert best[1] == pytest.approx(0, abs=1e-6)
    assert best[0] == pytest.approx(float(-(labels * labels.log()).sum(1).mean()))
    for other in (labels.log() * 3, labels.log() + torch.randn(1, 3, 4, 4, 5)):
        assert all(worse > good for worse, good in zip(terms(other), best, strict=True))


def test_an_empty_foreground_has_finite_terms_and_gradients():
    pred, target = example()
    target["thick"] = target["thick"].zero_().index_fill_(1, torch.tensor(0), 1.0)
    target["thin"] = target["thin"].zero_().index_fill_(1, torch.tensor(0), 1.0)
    loss = make()
    loss(pred, target).backward()
    assert all(math.isfinite(term) for term in loss.last_terms.values())
    assert all(part.grad.isfinite().all() for part in pred)


def test_gradients_reach_student_and_adapter_and_no_teacher():
    pred, target = example()
    target["teacher"].requires_grad_()
    loss = make()
    loss(pred, target).backward()
    assert all(part.grad.abs().sum() > 0 for part in pred)
    assert loss.cosine.adapter.weight.grad.abs().sum() > 0
    assert target["teacher"].grad is None


def test_the_teacher_may_have_another_grid():
    pred, target = example()
    loss = make()
    same = loss(pred, target).item()
    finer = target["teacher"].repeat_interleave(2, 2).repeat_interleave(2, 3)
    # Halfway between pairs of equal voxels there is nothing to average.
    assert loss(pred, {**target, "teacher": finer}).item() == pytest.approx(same)


def test_the_grid_of_nodes_is_a_setting():
    pred, target = example()
    coarse, fine = only("pairwise", nodes=(1, 1)), only("pairwise", nodes=(4, 4))
    coarse(pred, target)
    fine(pred, target)
    assert coarse.last_terms["pairwise"] == pytest.approx(0, abs=1e-12)
    assert fine.last_terms["pairwise"] > 1e-2


def test_half_precision_is_summed_in_float32():
    pred, target = example()
    loss = make()
    half = loss(Prediction(*(part.bfloat16() for part in pred)), {k: v.bfloat16() for k, v in target.items()})
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(loss(pred, target).item(), rel=0.01)


def test_what_is_not_finite_is_not_hidden():
    pred, target = example()
    loss = make()
    spoilt = pred.thin.detach().clone()
    spoilt[0, 0, 0, 0, 0] = math.nan
    assert math.isnan(loss(Prediction(pred.thick, spoilt, pred.feature), target).item())
    assert math.isnan(loss.last_terms["thin_dice"])
    assert math.isfinite(loss.last_terms["thick_cross_entropy"])


def test_the_last_terms_belong_to_the_last_call():
    pred, target = example()
    loss = make()
    loss(pred, target)
    first = loss.last_terms
    loss(pred, {**target, "uncertainty": torch.zeros(2, 1, 8, 8, 3)})
    assert first["thick_cross_entropy"] < loss.last_terms["thick_cross_entropy"]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("teacher", "give a teacher or set cosine_weight and pairwise_weight to 0"),
        ("uncertainty", "give it or set uncertainty_weight to 0"),
        ("thick", "the thick grid needs logits and labels .* None"),
        ("thin", "the thin grid needs logits and labels .* None"),
    ],
)
def test_what_a_term_needs_and_does_not_get_is_a_setting_error(missing, message):
    pred, target = example()
    del target[missing]
    with pytest.raises(SettingError, match=message) as error:
        make()(pred, target)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("setting", ["cosine_weight", "pairwise_weight"])
def test_one_distillation_term_is_enough_to_need_a_teacher(setting):
    pred, target = example()
    del target["teacher"]
    with pytest.raises(SettingError, match="needs a teacher"):
        make(**{setting: 0})(pred, target)


@pytest.mark.parametrize(
    ("part", "shape", "message"),
    [
        ("thick", (2, 3, 8, 8, 3), r"thick grid .* 2 classes, got \(2, 2, 8, 8, 3\) and \(2, 3, 8, 8, 3\)"),
        ("thin", (2, 2, 8, 8, 9), r"thin grid .* got \(2, 2, 8, 8, 12\) and \(2, 2, 8, 8, 9\)"),
        (
            "uncertainty",
            (2, 1, 8, 8, 12),
            r"one value per thick voxel, \(2, 1, 8, 8, 3\), got \(2, 1, 8, 8, 12\)",
        ),
        ("teacher", (2, 4, 4, 4, 3), "expects 3 student and 5 teacher channels, got 3 and 4"),
    ],
)
def test_shapes_that_do_not_fit_are_named(part, shape, message):
    pred, target = example()
    with pytest.raises(SettingError, match=message):
        make()(pred, {**target, part: torch.rand(shape)})


def test_a_network_of_other_classes_is_refused():
    with pytest.raises(SettingError, match=r"thick grid needs .* 2 classes"):
        make()(*example(classes=3))


@pytest.mark.parametrize("factor", [255, -1])
def test_an_uncertainty_on_another_scale_is_refused(factor):
    pred, target = example()
    with pytest.raises(DataError, match=r"uncertainty must lie in \[0, 1\]"):
        make()(pred, {**target, "uncertainty": factor * target["uncertainty"]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": 1}, "classes must be at least 2"),
        ({"uncertainty_weight": 1.5}, r"uncertainty_weight must lie in \[0, 1\], got 1.5"),
        ({"uncertainty_weight": -0.1}, "uncertainty_weight"),
        ({"thin_weight": -1}, "must not be negative"),
        ({"teacher_channels": None}, "give both or set cosine_weight to 0"),
    ],
)
def test_settings_outside_their_range_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        ThickSegmentationLoss(**{"student_channels": 3, "teacher_channels": 5, **settings})
