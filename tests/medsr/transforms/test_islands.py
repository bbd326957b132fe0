from __future__ import annotations

import logging
from itertools import permutations

import numpy as np
import pytest
import torch
from medsr.errors import DataError, SettingError
from medsr.transforms.islands import RemovedIslands, RemoveIslandsd, remove_islands
from monai.data import MetaTensor


def blocks(*lengths: int, value: int = 1) -> np.ndarray:
    """Rods of so many voxels, two rows apart."""
    mask = np.zeros((3 * len(lengths), 3, max(lengths)), dtype=np.uint8)
    for number, length in enumerate(lengths):
        mask[3 * number, 1, :length] = value
    return mask


def sizes(mask: np.ndarray) -> list[int]:
    return [int(row.sum()) for row in mask[::3, 1] > 0]


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [(0, [70, 7, 6, 1]), (0.01, [70, 7, 6, 1]), (0.1, [70, 7, 0, 0]), (1, [70, 0, 0, 0])],
)
def test_what_is_small_beside_the_largest_is_background(fraction, expected):
    # 7 of 70 voxels are exactly a tenth, though 0.1 * 70 is more than 7 in floating point.
    mask = blocks(70, 7, 6, 1)
    cleaned, removed = remove_islands(mask, min_fraction=fraction)
    assert sizes(cleaned) == expected
    lost = [n for n, kept in zip((70, 7, 6, 1), expected, strict=True) if not kept]
    assert removed == {1: RemovedIslands(len(lost), sum(lost))}


def test_foci_of_comparable_size_are_kept():
    mask = blocks(40, 38, 35, 3)
    assert sizes(remove_islands(mask, min_fraction=0.5)[0]) == [40, 38, 35, 0]
    equal = blocks(5, 5)
    assert sizes(remove_islands(equal, min_fraction=1)[0]) == [5, 5]


@pytest.mark.parametrize("step", [(1, 0, 0), (1, 1, 0), (1, 1, 1)])
def test_voxels_that_touch_anywhere_are_connected(step):
    mask = np.zeros((8, 8, 8), dtype=np.uint8)
    mask[2:4, 2:4, 2:4] = 1
    mask[tuple(3 + np.array(step))] = 1
    assert remove_islands(mask, min_fraction=1)[0].sum() == 9
    mask[tuple(3 + np.array(step))] = 0
    mask[tuple(3 + 2 * np.array(step))] = 1
    assert remove_islands(mask, min_fraction=1)[0].sum() == 8


def test_classes_do_not_know_of_each_other():
    mask = blocks(90, 4, 5, 1)
    mask[6:] *= 3
    mask[0, 2] = 2
    cleaned, removed = remove_islands(mask, min_fraction=0.5)
    # The third class is smaller than what the first one loses, and class 2 touches the first.
    assert {k: int((cleaned == k).sum()) for k in range(4)} == {0: mask.size - 185, 1: 90, 2: 90, 3: 5}
    assert removed == {1: RemovedIslands(1, 4), 2: RemovedIslands(0, 0), 3: RemovedIslands(1, 1)}


def test_what_lies_inside_another_class_becomes_background_too():
    mask = np.zeros((9, 9, 9), dtype=np.uint8)
    mask[1:8, 1:8, 1:4] = 1
    mask[6, 6, 6], mask[3:5, 3:5, 2], mask[6, 6, 2] = 2, 2, 2
    cleaned, _ = remove_islands(mask, min_fraction=0.5)
    assert cleaned[6, 6, 6] == cleaned[6, 6, 2] == 0
    assert (cleaned[cleaned != mask] == 0).all()


def test_the_order_of_axes_does_not_matter():
    mask = (np.random.default_rng(0).random((6, 9, 12)) < 0.08).astype(np.uint8)
    expected = remove_islands(mask, min_fraction=0.6)[0]
    assert 0 < expected.sum() < mask.sum()
    for order in permutations(range(3)):
        found = remove_islands(mask.transpose(order), min_fraction=0.6)[0]
        np.testing.assert_array_equal(found, expected.transpose(order))


def test_twice_is_once_and_the_input_stays():
    mask = (np.random.default_rng(1).random((12, 12, 12)) < 0.05).astype(np.int64)
    before = mask.copy()
    once = remove_islands(mask, min_fraction=0.4)[0]
    np.testing.assert_array_equal(mask, before)
    again, removed = remove_islands(once, min_fraction=0.4)
    np.testing.assert_array_equal(again, once)
    assert removed == {1: RemovedIslands(0, 0)}
    assert once.dtype == mask.dtype


def test_an_empty_mask_stays_empty():
    cleaned, removed = remove_islands(np.zeros((3, 3, 3), dtype=np.uint8), min_fraction=0.5)
    assert (int(cleaned.sum()), removed) == (0, {})


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan"), None, "0.1"])
def test_the_fraction_is_checked(fraction):
    with pytest.raises(SettingError, match="min_island_fraction must be a number in"):
        RemoveIslandsd("pred", fraction)
    with pytest.raises(SettingError, match="min_island_fraction must be a number in"):
        remove_islands(blocks(1), min_fraction=fraction)


def test_probabilities_are_no_mask():
    with pytest.raises(DataError, match="float32; take the argmax"):
        remove_islands(np.zeros((2, 2, 2), dtype=np.float32), min_fraction=0.1)


def test_each_mask_is_cleaned_on_its_own_grid_and_says_what_it_lost(caplog):
    thin, thick = torch.as_tensor(blocks(40, 3, 2))[None], torch.as_tensor(blocks(10, 1))[None]
    meta = {"filename_or_obj": "folder/a.nii.gz"}
    item = {
        "pred": MetaTensor(thin, affine=torch.diag(torch.tensor([2.0, 1, 1, 1])), meta=dict(meta)),
        "pred_thick": MetaTensor(thick, affine=torch.diag(torch.tensor([2.0, 1, 4, 1])), meta=dict(meta)),
        "probability": MetaTensor(thin.float()),
    }
    with caplog.at_level(logging.INFO):
        found = RemoveIslandsd(["pred", "pred_thick"], 0.1)(item)
    assert sizes(found["pred"][0].numpy()) == [40, 0, 0]
    assert found["pred"].meta["islands_removed"] == {1: {"islands": 2, "ml": 0.01}}
    # A tenth is not less than a tenth.
    assert sizes(found["pred_thick"][0].numpy()) == [10, 1]
    assert found["pred_thick"].meta["islands_removed"] == {1: {"islands": 0, "ml": 0.0}}
    assert found["probability"] is item["probability"]
    assert caplog.messages == ["a.nii.gz: pred: islands of class 1 removed: 2, 0.01 ml"]
    for key in ("pred", "pred_thick"):
        assert found[key].dtype == torch.uint8
        assert torch.equal(found[key].affine, item[key].affine)
        assert found[key].meta["filename_or_obj"] == "folder/a.nii.gz"
        assert "islands_removed" not in item[key].meta
    assert int(item["pred"].sum()) == 45


def test_nothing_is_removed_if_it_is_switched_off():
    mask = MetaTensor(torch.as_tensor(blocks(40, 1))[None])
    found = RemoveIslandsd("pred", 0)({"pred": mask})["pred"]
    assert torch.equal(found, mask)
    assert found.meta["islands_removed"] == {1: {"islands": 0, "ml": 0.0}}


def test_a_mask_that_an_item_lacks_may_be_passed_over():
    assert RemoveIslandsd("pred", allow_missing_keys=True)({}) == {}
    with pytest.raises(KeyError):
        RemoveIslandsd("pred")({})
