from __future__ import annotations

import math

import pytest
import torch
from medsr.errors import DataError, SettingError
from medsr.losses.jaccard import ClassJaccardLoss
from monai.losses import DiceLoss
from torch import Tensor
from torch.nn import functional as F

IGNORE = 255
TYPES = 8


def drawn(classes: int, *, highest: int | None = None, ignored: bool = True) -> tuple[Tensor, Tensor]:
    """Logits and a truth that have nothing to do with each other, two frames."""
    made = torch.Generator().manual_seed(3)
    logits = torch.randn(2, classes, 6, 5, generator=made)
    target = torch.randint(0, (highest or max(classes - 1, 1)) + 1, (2, 1, 6, 5), generator=made)
    if ignored:
        target[:, :, 0] = IGNORE
        target[0, 0, 3, 2] = IGNORE
    return logits, target


def by_loops(logits: Tensor, target: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Both terms as the specification has them, pixel by pixel."""
    classes = logits.shape[1]
    entropy, pixels = logits.new_zeros(()), 0
    overlap, total, size = ([logits.new_zeros(()) for _ in range(max(classes, 2))] for _ in range(3))
    for b, y, x in torch.cartesian_prod(*(torch.arange(n) for n in (2, 6, 5))).tolist():
        true = int(target[b, 0, y, x])
        if true == IGNORE:
            continue
        pixels += 1
        if classes == 1:
            chance = torch.sigmoid(logits[b, 0, y, x])
            chances = [1 - chance, chance]
        else:
            powers = logits[b, :, y, x].exp()
            chances = list(powers / powers.sum())
        entropy = entropy - chances[true].log()
        for k, chance in enumerate(chances):
            total[k] = total[k] + chance
        overlap[true] = overlap[true] + chances[true]
        size[true] = size[true] + 1
    averaged = [k for k in range(len(size)) if size[k] and (classes > 1 or k == 1)]
    indexes = [overlap[k] / (total[k] + size[k] - overlap[k]) for k in averaged]
    mean = sum(indexes) / len(indexes)
    return (1 - weight) * entropy / pixels, -weight * mean.log()


def published(logits: Tensor, target: Tensor, weight: float) -> Tensor:
    """The form that adds the logarithm of every class, absent or not."""
    loss = (1 - weight) * F.cross_entropy(logits, target[:, 0])
    for k, chance in enumerate(logits.softmax(1).unbind(1)):
        true = (target[:, 0] == k).float()
        overlap = (chance * true).sum()
        loss = loss - weight * ((overlap + 1e-15) / (chance.sum() + true.sum() - overlap + 1e-15)).log()
    return loss


@pytest.mark.parametrize(("classes", "highest"), [(1, 1), (2, 1), (4, 3), (TYPES, 4)])
def test_value_and_gradient_are_those_of_a_loop(classes, highest):
    logits, target = drawn(classes, highest=highest)
    logits.requires_grad_()
    loss = ClassJaccardLoss(0.4)
    value = loss(logits, target)
    terms = by_loops(logits, target, 0.4)
    assert loss.last_terms == {
        "cross_entropy": pytest.approx(terms[0].item(), rel=1e-4),
        "jaccard": pytest.approx(terms[1].item(), rel=1e-4),
    }
    assert value.item() == pytest.approx(sum(loss.last_terms.values()))
    found, expected = (torch.autograd.grad(one, logits)[0] for one in (value, sum(terms)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_index_is_that_of_monai_where_all_classes_are_there():
    logits, target = drawn(4, ignored=False)
    assert set(target.unique().tolist()) == set(range(4))
    monai = DiceLoss(
        jaccard=True,
        batch=True,
        softmax=True,
        to_onehot_y=True,
        reduction="none",
        smooth_nr=1e-5,
        smooth_dr=1e-5,
    )
    expected = -(1 - monai(logits, target)).mean().log()
    torch.testing.assert_close(ClassJaccardLoss(1)(logits, target), expected)


@pytest.mark.parametrize("lowered", [0.0, 10.0, 25.0])
def test_an_absent_class_gives_no_term_and_no_push(lowered):
    logits, target = drawn(TYPES, highest=TYPES - 2, ignored=False)
    logits[:, -1] -= lowered
    logits.requires_grad_()
    loss = ClassJaccardLoss()
    ours = torch.autograd.grad(loss(logits, target), logits)[0]
    theirs = torch.autograd.grad(published(logits, target, 0.3), logits)[0]
    # A mean index of 1 in 50 would be poor even for noise.
    assert loss.last_terms["jaccard"] < 0.3 * math.log(50)
    assert published(logits, target, 0.3) - loss(logits, target) > 0.3 * 15
    assert ours.isfinite().all()
    push, published_push = (gradient[:, -1].abs().sum() for gradient in (ours, theirs))
    # However low the logits of the absent class are, the published form pushes on with about its weight.
    assert published_push > 0.1
    assert push <= 0.2 * math.exp(-lowered / 2)


def test_calling_an_absent_class_costs_something():
    target = torch.zeros(1, 1, 4, 4, dtype=torch.long)
    right = F.one_hot(target[:, 0], 3).movedim(-1, 1) * 8.0
    wrong = right.clone()
    wrong[:, :, 0] = torch.tensor([0.0, 0.0, 8.0])[:, None]
    loss = ClassJaccardLoss(1)
    assert loss(right, target) < 0.01
    # A quarter of the only class that is there is lost.
    assert loss(wrong, target).item() == pytest.approx(-math.log(0.75), abs=0.01)


def test_only_the_foreground_counts_with_one_logit():
    target = torch.zeros(1, 1, 4, 4, dtype=torch.long)
    target[..., :2] = 1
    loss = ClassJaccardLoss(1)
    # Half a probability everywhere: 4 of 8 + 4 pixels.
    assert loss(torch.zeros(1, 1, 4, 4), target).item() == pytest.approx(-math.log(4 / 12), rel=1e-5)
    # With two classes both have that index, and so has their mean.
    assert loss(torch.zeros(1, 2, 4, 4), target).item() == pytest.approx(-math.log(4 / 12), rel=1e-5)
    logits = torch.full((1, 1, 4, 4), 3.0, requires_grad=True)
    loss(logits, torch.zeros_like(target)).backward()
    assert loss.last_terms == {"jaccard": 0.0}
    assert logits.grad.abs().sum() == 0


@pytest.mark.parametrize("classes", [1, 3])
def test_ignored_pixels_do_not_count(classes):
    logits, target = drawn(classes)
    loss = ClassJaccardLoss()
    expected = loss(logits, target)
    changed = logits + 50 * (target == IGNORE)
    changed.requires_grad_()
    value = loss(changed, target)
    assert value.item() == pytest.approx(expected.item())
    value.backward()
    assert changed.grad.masked_select(target == IGNORE).abs().sum() == 0
    other = ClassJaccardLoss(ignore=7)
    assert other(logits, torch.where(target == IGNORE, 7, target)) == expected


@pytest.mark.parametrize("classes", [1, 3])
def test_a_batch_without_a_pixel_to_judge_changes_nothing(classes):
    logits = torch.randn(1, classes, 4, 4, requires_grad=True)
    value = ClassJaccardLoss()(logits, torch.full((1, 1, 4, 4), IGNORE))
    value.backward()
    assert value == 0
    assert logits.grad.abs().sum() == 0


@pytest.mark.parametrize("classes", [1, 3])
def test_sure_and_wrong_is_finite(classes):
    target = torch.ones(1, 1, 4, 4, dtype=torch.long)
    logits = torch.zeros(1, classes, 4, 4)
    logits[:, 0] = 1e4 if classes > 1 else -1e4
    logits.requires_grad_()
    value = ClassJaccardLoss()(logits, target)
    assert torch.autograd.grad(value, logits)[0].isfinite().all()
    assert value.isfinite()


def test_the_better_mask_has_the_smaller_loss_and_training_finds_it():
    _, target = drawn(4)
    logits = torch.zeros(2, 4, 6, 5, requires_grad=True)
    loss, optimiser = ClassJaccardLoss(), torch.optim.Adam([logits], 0.3)
    values = []
    for _ in range(40):
        optimiser.zero_grad()
        value = loss(logits, target)
        value.backward()
        optimiser.step()
        values.append(value.item())
    assert values[-1] < 0.05 < values[0]
    judged = target[:, 0] != IGNORE
    assert torch.equal(logits.argmax(1)[judged], target[:, 0][judged])


@pytest.mark.parametrize("classes", [1, 4])
def test_half_precision_is_computed_in_single(classes):
    logits, target = drawn(classes)
    logits = logits.bfloat16()
    loss = ClassJaccardLoss()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(logits, target)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(logits.float(), target))


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.float32])
def test_the_truth_may_have_any_type(kind):
    logits, target = drawn(4)
    loss = ClassJaccardLoss()
    assert loss(logits, target.to(kind)) == loss(logits, target)


def test_a_term_without_weight_is_left_out():
    logits, target = drawn(4)
    for weight, kept in ((0, "cross_entropy"), (1, "jaccard")):
        loss = ClassJaccardLoss(weight)
        assert loss(logits, target).item() == pytest.approx(loss.last_terms[kept])
        assert list(loss.last_terms) == [kept]
    entropy = F.cross_entropy(logits, target[:, 0], ignore_index=IGNORE)
    torch.testing.assert_close(ClassJaccardLoss(0)(logits, target), entropy)


def test_it_describes_itself():
    assert ClassJaccardLoss(0.5, ignore=7).describe() == {"jaccard_weight": 0.5, "ignore": 7, "smooth": 1e-5}


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"jaccard_weight": 1.1}, "jaccard_weight"), ({"jaccard_weight": -0.1}, "jaccard_weight")]
    + [({"smooth": value}, "smooth") for value in (0, -1, math.nan)],
)
def test_settings_outside_their_range_are_refused(settings, said):
    with pytest.raises(SettingError, match=said):
        ClassJaccardLoss(**settings)


@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 4, 6, 5), (2, 1, 6, 4), (1, 1, 6, 5)])
def test_shapes_that_do_not_fit_are_refused(shape):
    with pytest.raises(SettingError, match="class indexes"):
        ClassJaccardLoss()(drawn(4)[0], torch.zeros(shape))


@pytest.mark.parametrize(("classes", "value"), [(1, 2), (4, 4), (4, -1), (4, 0.5), (4, math.nan)])
def test_a_truth_that_is_no_class_index_is_refused(classes, value):
    logits, target = drawn(classes)
    target = target.float()
    target[1, 0, 2, 2] = value
    with pytest.raises(DataError, match=f"the truth holds {value:g},"):
        ClassJaccardLoss()(logits, target)
