from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from medsr.errors import DataError, SettingError
from medsr.metrics.frames import frame_scores, over_folds, summary
from monai.metrics import DiceMetric, MeanIoU

CLASSES = ("background", "shaft", "wrist", "claspers")
BINARY = ("background", "instrument")


def scored(pred: Sequence[int], target: Sequence[int], classes: Sequence[str] = CLASSES) -> dict[str, Any]:
    return frame_scores(np.array([pred]), np.array([target]), classes)


# Shaft half found, claspers called in vain; wrist found; nothing there but called; nothing at all.
HALF = scored([0, 1, 3, 0], [0, 1, 1, 0])
FOUND = scored([2, 2, 1, 0], [2, 2, 1, 1])
CALLED = scored([0, 0, 3, 3], [0, 0, 0, 0])
NOTHING = scored([0, 0, 0, 0], [0, 0, 0, 0])


def per_frame(frame: dict[str, Any]) -> dict[str, float | None]:
    return {name: value for name, value in frame.items() if name != "classes"}


def test_protocols_differ_in_the_classes_of_a_frame():
    assert per_frame(HALF) == {
        "iou_present": 1 / 2,
        "dice_present": pytest.approx(2 / 3),
        "challenge_iou": 1 / 2,
        "challenge_dice": pytest.approx(2 / 3),
        "isi_iou": 1 / 4,
    }
    assert HALF["classes"] == {
        "shaft": {"intersection": 1, "pred": 1, "target": 2},
        "wrist": {"intersection": 0, "pred": 0, "target": 0},
        "claspers": {"intersection": 0, "pred": 1, "target": 0},
    }
    assert FOUND["iou_present"] == FOUND["isi_iou"] == pytest.approx((1 / 2 + 1) / 2)


def test_protocols_differ_in_frames_without_foreground():
    names = ("iou_present", "dice_present", "challenge_iou", "challenge_dice", "isi_iou")
    assert per_frame(CALLED) == dict(zip(names, (0, 0, None, None, 0), strict=True))
    assert per_frame(NOTHING) == dict(zip(names, (1, 1, None, None, None), strict=True))


def test_a_class_that_is_missed_counts_0_in_all():
    missed = scored([0, 0, 0, 0], [0, 3, 3, 0])
    assert set(per_frame(missed).values()) == {0}


def test_the_summary_of_a_hand_made_set():
    found = summary([HALF, FOUND, CALLED, NOTHING])
    present, challenge, isi = (1 / 2, 3 / 4, 0, 1), (1 / 2, 3 / 4), (1 / 4, 3 / 4, 0)
    assert found["frames"] == 4
    for name, values in (("iou_present", present), ("challenge_iou", challenge), ("isi_iou", isi)):
        assert found[name] == pytest.approx(np.mean(values))
        assert found[f"{name}_std_over_frames"] == pytest.approx(np.std(values))
    assert found["dice_present"] == pytest.approx(np.mean([2 / 3, (1 + 2 / 3) / 2, 0, 1]))
    assert found["challenge_dice"] == pytest.approx(np.mean([2 / 3, (1 + 2 / 3) / 2]))
    # Claspers are called twice and there never.
    assert found["class_iou"] == {"shaft": 0.5, "wrist": 1, "claspers": 0}
    assert found["mean_class_iou"] == pytest.approx(0.5)
    # Shaft 1 of 2 and 1 of 2, wrist 2 of 2, claspers 0 of 1 and 0 of 2.
    assert found["pooled_iou"] == pytest.approx(4 / 9)


def test_mean_over_classes_is_not_mean_over_frames():
    many = [scored([1, 1, 0, 0], [1, 1, 0, 0])] * 9
    rare = scored([0, 0, 0, 0], [0, 0, 0, 3])
    found = summary([*many, rare])
    assert found["challenge_iou"] == found["isi_iou"] == pytest.approx(0.9)
    assert found["mean_class_iou"] == pytest.approx(0.5)
    assert found["class_iou"] == {"shaft": 1, "wrist": None, "claspers": 0}


def test_what_no_frame_has_is_none():
    found = summary([NOTHING])
    undefined = {name for name, value in found.items() if value is None}
    assert undefined >= {"challenge_iou", "challenge_iou_std_over_frames", "isi_iou"}
    assert undefined >= {"mean_class_iou", "pooled_iou"}
    assert set(found["class_iou"].values()) == {None}


def test_one_class_is_the_plain_overlap():
    found = scored([1, 1, 1, 0], [0, 1, 1, 1], BINARY)
    assert found["iou_present"] == found["challenge_iou"] == found["isi_iou"] == 2 / 4
    assert found["dice_present"] == pytest.approx(4 / 6)


def test_ignored_pixels_do_not_count():
    kept = frame_scores(np.array([[1, 2, 0]]), np.array([[1, 1, 0]]), CLASSES)
    masked = frame_scores(np.array([[1, 2, 0, 3, 9]]), np.array([[1, 1, 0, 255, 255]]), CLASSES)
    assert kept == masked
    other = frame_scores(np.array([[1, 2, 0, 3]]), np.array([[1, 1, 0, 7]]), CLASSES, ignore=7)
    assert kept == other


def test_the_order_of_frames_does_not_matter():
    made = np.random.default_rng(1)
    frames = [frame_scores(*made.integers(0, 4, (2, 5, 7)), CLASSES) for _ in range(4)]
    expected = summary(frames)
    assert all(summary(order) == expected for order in permutations(frames))


def test_arrays_and_tensors_of_any_type_are_the_same():
    made = np.random.default_rng(2)
    pred, target = made.integers(0, 4, (2, 1, 5, 7))
    expected = frame_scores(pred, target, CLASSES)
    for kind in (np.uint8, np.int64, np.float32):
        assert frame_scores(pred.astype(kind), target[0].astype(kind), CLASSES) == expected
    assert frame_scores(torch.as_tensor(pred).byte(), torch.as_tensor(target), CLASSES) == expected
    binary = frame_scores(pred > 1, target > 1, BINARY)
    assert binary == frame_scores((pred > 1).astype(int), (target > 1).astype(int), BINARY)


def test_a_label_map_names_the_classes():
    labels = {"background": [0], "instrument": [10, 20, 30]}
    found = frame_scores(np.ones((2, 2)), np.ones((2, 2)), labels)
    assert list(found["classes"]) == ["instrument"]


def test_challenge_scores_are_those_of_monai_without_empty_classes():
    made = np.random.default_rng(3)
    masks = made.integers(0, 4, (2, 6, 1, 6, 8))
    # Frames with fewer classes in the truth, the last with none.
    for frame, highest in enumerate((3, 3, 2, 2, 1, 0)):
        masks[1, frame] = masks[1, frame].clip(0, highest)
    found = summary(frame_scores(*pair, CLASSES) for pair in zip(*masks, strict=True))
    hot = torch.nn.functional.one_hot(torch.as_tensor(masks[:, :, 0]), 4).movedim(-1, 2)
    for metric, name in ((MeanIoU, "challenge_iou"), (DiceMetric, "challenge_dice")):
        judge = metric(include_background=False, ignore_empty=True)
        judge(hot[0], hot[1])
        assert judge.aggregate().item() == pytest.approx(found[name], rel=1e-5)
    assert found["isi_iou"] < found["challenge_iou"]


def test_folds_weigh_the_same():
    first, second = summary([HALF]), summary([FOUND, FOUND, NOTHING])
    found = over_folds([first, second])
    assert found["folds"] == 2
    assert found["challenge_iou"] == pytest.approx((1 / 2 + 3 / 4) / 2)
    assert found["challenge_iou_std_over_folds"] == pytest.approx(1 / 8)
    assert found["mean_class_iou"] == pytest.approx((1 / 4 + 3 / 4) / 2)
    # Wrist and claspers occur in one fold only.
    assert found["class_iou"] == {"shaft": 0.5, "wrist": 1, "claspers": 0}
    pooled = summary([HALF, FOUND, FOUND, NOTHING])
    assert pooled["challenge_iou"] == pytest.approx((1 / 2 + 3 / 4 + 3 / 4) / 3)


def test_a_fold_without_a_score_is_left_out():
    found = over_folds([summary([HALF]), summary([NOTHING])])
    assert (found["challenge_iou"], found["challenge_iou_std_over_folds"]) == (0.5, 0)
    assert (found["iou_present"], found["iou_present_std_over_folds"]) == (0.5, 0)
    empty = over_folds([summary([NOTHING])])
    assert (empty["challenge_iou"], empty["challenge_iou_std_over_folds"]) == (None, None)


def test_all_of_it_survives_json():
    frames = [HALF, FOUND, CALLED, NOTHING]
    for result in (*frames, summary(frames), over_folds([summary(frames)])):
        assert json.loads(json.dumps(result, allow_nan=False)) == result
    rows = [{"case": "d1-frame000", "method": "bicubic", **frame} for frame in frames]
    assert summary(json.loads(json.dumps(rows))) == summary(frames)


@pytest.mark.parametrize(
    ("pred", "target", "said"),
    [
        (np.zeros((2, 3)), np.zeros((3, 2)), r"\(2, 3\) and \(3, 2\)"),
        (np.zeros((2, 2, 3)), np.zeros((2, 3)), r"pred: .* got shape \(2, 2, 3\)"),
        (np.zeros(3), np.zeros(3), "pred"),
        (np.full((2, 2), 4), np.zeros((2, 2)), "pred: 4 is no class index of 4"),
        (np.zeros((2, 2)), np.full((2, 2), 10), "target: 10 is no class index"),
        (np.full((2, 2), 255), np.zeros((2, 2)), "pred: 255"),
        (np.full((2, 2), 0.5), np.zeros((2, 2)), "pred: 0.5"),
        (np.full((2, 2), math.nan), np.zeros((2, 2)), "pred: nan"),
        (np.full((2, 2), -1), np.zeros((2, 2)), "pred: -1"),
        (np.zeros((2, 2)), np.full((2, 2), 255), "leave this frame out"),
    ],
)
def test_masks_that_cannot_be_judged_are_refused(pred, target, said):
    with pytest.raises(DataError, match=said):
        frame_scores(pred, target, CLASSES)


def test_classes_are_background_and_another():
    with pytest.raises(SettingError, match="background"):
        frame_scores(np.zeros((2, 2)), np.zeros((2, 2)), ["background"])


def test_what_cannot_be_summarised_is_refused():
    other = scored([1, 0], [1, 0], BINARY)
    for function, items, what in ((summary, [HALF, other], "frame"), (over_folds, [[HALF], [other]], "fold")):
        with pytest.raises(DataError, match=f"no {what}"):
            function([])
        given = items if function is summary else [summary(one) for one in items]
        with pytest.raises(DataError, match=f"a {what} has the classes"):
            function(given)


def test_where_no_truth_has_a_class_there_is_no_score_of_overlap():
    nothing = np.zeros((4, 4), int)
    assert frame_scores(nothing, nothing, ["background", "instrument"])["iou_present"] == 1
    found = summary([frame_scores(nothing, nothing, ["background", "instrument"])] * 2)
    for score in ("iou_present", "dice_present"):
        assert found[score] is found[f"{score}_std_over_frames"] is None


def test_a_frame_that_may_be_empty_only_because_pixels_are_ignored_has_no_score():
    truth = np.zeros((4, 4), int)
    truth[0] = 255
    scores = frame_scores(np.zeros((4, 4), int), truth, ["background", "instrument"])
    assert scores["iou_present"] is scores["dice_present"] is None
    full = np.ones((4, 4), int)
    found = summary([scores, frame_scores(full, full, ["background", "instrument"])])
    assert (found["iou_present"], found["frames"]) == (1, 2)


def test_what_is_called_in_vain_is_wrong_whatever_is_ignored_and_however_empty_the_truth():
    truth, found = np.zeros((4, 4), int), np.ones((4, 4), int)
    ignored = truth.copy()
    ignored[0] = 255
    scores = [frame_scores(found, one, ["background", "instrument"]) for one in (truth, ignored)]
    assert [one["iou_present"] for one in scores] == [0, 0]
    assert summary(scores)["iou_present"] == summary(scores)["dice_present"] == 0
