from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from medsr.errors import DataError
from medsr.io.endovis17 import (
    ENDOVIS17_FOLDS,
    ENDOVIS17_LABEL_MAPS,
    ENDOVIS17_VIDEO_FOLDS,
    prepare_endovis17,
)
from medsr.io.masks import find_labelled_frames, read_mask
from medsr.transforms.frame_labels import GreysToClassesd
from PIL import Image

ROW, COLUMN = 28, 320

# Type in the result, and where the instrument is drawn: value, rows and columns of the camera's image.
FOLDERS = {
    "Left_Prograsp_Forceps_labels": [(10, 0, 20, 0, 20), (20, 20, 30, 0, 20)],
    "Maryland_Bipolar_Forceps_labels": [(30, 10, 15, 10, 40)],
    "Other_labels": [(40, 12, 13, 0, 60)],
}


def write_grey(path: Path, regions=(), size=(1080, 1920)) -> None:
    mask = np.zeros(size, dtype=np.uint8)
    for value, top, bottom, left, right in regions:
        mask[ROW + top : ROW + bottom, COLUMN + left : COLUMN + right] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path, compress_level=1)


def write_video(root: Path, number: int, names=("frame000.png",), folders=FOLDERS) -> Path:
    video = root / f"instrument_dataset_{number}"
    image = np.zeros((1080, 1920, 3), dtype=np.uint8)
    image[ROW : ROW + 2, COLUMN : COLUMN + 3] = np.arange(18).reshape(2, 3, 3)
    for name in names:
        (video / "left_frames").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(video / "left_frames" / name, compress_level=1)
        for folder, regions in folders.items():
            write_grey(video / "ground_truth" / folder / name, regions)
    return video


def test_frames_and_masks_are_what_the_camera_saw(tmp_path):
    write_video(tmp_path / "train", 3)
    (tmp_path / "test" / "instrument_dataset_3" / "left_frames").mkdir(parents=True)
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "train").rglob("*"))
    assert prepare_endovis17(tmp_path, tmp_path / "out") == 1
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "train").rglob("*")) == before

    (item,) = find_labelled_frames(tmp_path / "out", groups=["d3"])
    assert item["case"] == "d3-frame000"
    with Image.open(item["image"]) as picture:
        assert picture.size == (1280, 1024)
        np.testing.assert_array_equal(np.asarray(picture)[:2, :3], np.arange(18).reshape(2, 3, 3))

    parts = read_mask(item["label"])
    expected = np.zeros((1024, 1280), dtype=int)
    expected[0:20, 0:20], expected[20:30, 0:20], expected[10:15, 10:40] = 10, 20, 30
    np.testing.assert_array_equal(parts, expected)

    (item,) = find_labelled_frames(tmp_path / "out", labels="labels_types")
    expected[expected > 0] = 2
    expected[10:15, 10:40], expected[12:13, 0:60] = 1, 7
    np.testing.assert_array_equal(read_mask(item["label"]), expected)


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    write_video(tmp_path / "in", 1, ("frame000.png", "frame001.png"), {"Vessel_Sealer_labels": []})
    out = tmp_path / "out"
    assert prepare_endovis17(tmp_path / "in", out) == 2
    kept = out / "images" / "d1-frame000.png"
    os.utime(kept, (1, 1))
    (out / "labels" / "d1-frame001.png").unlink()
    assert prepare_endovis17(tmp_path / "in", out) == 1
    assert kept.stat().st_mtime == 1
    assert [item["case"] for item in find_labelled_frames(out)] == ["d1-frame000", "d1-frame001"]
    assert prepare_endovis17(tmp_path / "in", out) == 0


def unknown_instrument(video: Path) -> None:
    write_grey(video / "ground_truth" / "Stapler_labels" / "frame000.png")


def lost_mask(video: Path) -> None:
    (video / "ground_truth" / "Other_labels" / "frame000.png").unlink()


def no_masks(video: Path) -> None:
    (video / "ground_truth").rename(video / "drawn")
    (video / "ground_truth").mkdir()


def second_copy(video: Path) -> None:
    write_video(video.parent / "copy", 1, folders={"Other_labels": []})


def no_frames(video: Path) -> None:
    (video / "left_frames").rename(video / "frames")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (unknown_instrument, "Stapler_labels: masks of an unknown instrument; known are bipolar_forceps"),
        (lost_mask, r"instrument_dataset_1: no frame000.png in ground_truth/Other_labels/"),
        (no_masks, "instrument_dataset_1: no folder of masks"),
        (second_copy, "d1-frame000 occurs twice"),
        (no_frames, "left_frames: no such file or folder"),
    ],
)
def test_a_spoilt_tree_is_refused_before_anything_is_written(tmp_path, spoil, words):
    spoil(write_video(tmp_path / "in", 1, folders={"Other_labels": []}))
    with pytest.raises(DataError, match=words):
        prepare_endovis17(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mask_of_another_size_is_named_with_its_video_and_leaves_no_part_of_a_frame(tmp_path):
    video = write_video(tmp_path / "in", 1, folders={"Other_labels": []})
    write_grey(video / "ground_truth" / "Other_labels" / "frame000.png", size=(1024, 1280))
    with pytest.raises(DataError, match=r"^d1-frame000: frame000\.png: .* 1080 x 1920 pixels, got"):
        prepare_endovis17(tmp_path / "in", tmp_path / "out")
    assert list((tmp_path / "out").rglob("*.png")) == []


def test_every_video_is_tested_once():
    assert sorted(sum(ENDOVIS17_FOLDS, ())) == [f"d{number}" for number in range(1, 9)]
    assert len(set(ENDOVIS17_VIDEO_FOLDS)) == 10


def test_the_label_maps_are_valid_and_agree():
    for label_map in ENDOVIS17_LABEL_MAPS.values():
        GreysToClassesd("label", label_map)
    binary, parts = ENDOVIS17_LABEL_MAPS["binary"], ENDOVIS17_LABEL_MAPS["parts"]
    assert binary["instrument"] == [grey for greys in list(parts.values())[1:] for grey in greys]
    assert list(ENDOVIS17_LABEL_MAPS["types"])[7] == "other"
