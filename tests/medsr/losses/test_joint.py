from __future__ import annotations

import pytest
import torch
from medsr.errors import SettingError
from medsr.losses.jaccard import ClassJaccardLoss
from medsr.losses.joint import JointLoss
from medsr.networks.superres_segmentation import SuperResSegmentationOutput


def example() -> tuple[SuperResSegmentationOutput, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 6, 8, 8, generator=generator, requires_grad=True)
    logits = torch.randn(2, 1, 8, 8, generator=generator, requires_grad=True)
    truth = {"image": torch.rand(2, 6, 8, 8, generator=generator), "label": torch.ones(2, 1, 8, 8).long()}
    return SuperResSegmentationOutput(image, logits), truth


def test_terms_are_weighted_and_told_by_name():
    pred, truth = example()
    masks = ClassJaccardLoss()
    loss = JointLoss(masks, segmentation_weight=2, l1_weight=5)
    total = loss(pred, truth)
    expected = {
        "segmentation": 2 * masks(pred.logits, truth["label"]).item(),
        "l1": 5 * (pred.image - truth["image"]).abs().mean().item(),
    }
    assert loss.last_terms == pytest.approx(expected)
    assert total.item() == pytest.approx(sum(expected.values()))
    assert loss.describe() == {**masks.describe(), "segmentation_weight": 2, "l1_weight": 5}
    total.backward()
    assert pred.image.grad.abs().min() > 0
    assert pred.logits.grad.abs().max() > 0


def test_without_l1_the_pair_is_free():
    pred, truth = example()
    loss = JointLoss(ClassJaccardLoss(), l1_weight=0)
    loss(pred, truth).backward()
    assert list(loss.last_terms) == ["segmentation"]
    assert pred.image.grad is None


def test_wrong_settings_and_sizes_are_refused():
    pred, truth = example()
    for weights in ({"segmentation_weight": 0}, {"l1_weight": -1}):
        with pytest.raises(SettingError, match="must be positive"):
            JointLoss(ClassJaccardLoss(), **weights)
    with pytest.raises(SettingError, match="check the scale"):
        JointLoss(ClassJaccardLoss())(pred, {**truth, "image": truth["image"][..., :4]})
