from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from medsr.errors import DataError, OutputError
from medsr.io.images import read_image
from medsr.io.masks import find_labelled_frames, frames_of_groups, group_of, read_mask, write_mask
from PIL import Image

GREYS = np.array([[0, 10, 20], [30, 31, 255]], dtype=np.uint8)


def labelled(root: Path, *cases: str, labels: str = "labels", suffix: str = ".png") -> Path:
    for part, ending in (("images", ".png"), (labels, suffix)):
        (root / part).mkdir(parents=True, exist_ok=True)
        for case in cases:
            Image.fromarray(GREYS).save(root / part / f"{case}{ending}")
    return root


# -- folders ------------------------------------------------------------------------------------------------


def test_frames_and_masks_are_paired_by_name(tmp_path):
    folder = labelled(tmp_path, "d2-b", "d1-a", suffix=".tif")
    items = find_labelled_frames(folder)
    assert [item["case"] for item in items] == ["d1-a", "d2-b"]
    assert Path(items[0]["image"]) == tmp_path / "images" / "d1-a.png"
    assert Path(items[0]["label"]) == tmp_path / "labels" / "d1-a.tif"


def test_groups_split_a_folder_without_rest_and_without_overlap(tmp_path):
    folder = labelled(tmp_path, "d1-a", "d1-b", "d10-a", "d2-a", "single")
    test = find_labelled_frames(folder, groups=["d1", "single"])
    train = find_labelled_frames(folder, ["d1", "single"])
    assert [item["case"] for item in test] == ["d1-a", "d1-b", "single"]
    assert [item["case"] for item in train] == ["d10-a", "d2-a"]
    assert [item["case"] for item in find_labelled_frames(folder, "d2", groups=["d1", "d2"])] == [
        "d1-a",
        "d1-b",
    ]


def test_masks_of_another_task_are_in_another_sub_folder(tmp_path):
    labelled(tmp_path, "d1-a")
    labelled(tmp_path, "d1-a", labels="labels_types")
    (item,) = find_labelled_frames(tmp_path, labels="labels_types")
    assert Path(item["label"]).parent.name == "labels_types"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"leave_out": ["d3"]}, "no group 'd3'; there are d1, d2"),
        ({"groups": ["frame"]}, "no group 'frame'"),
        ({"leave_out": ["d1", "d2"]}, "no frame is left"),
        ({"leave_out": ["d1"], "groups": ["d1"]}, "no frame is left"),
        ({"labels": "labels_types"}, "no folder 'labels_types'.*images/ and labels_types/"),
    ],
)
def test_what_would_leave_no_or_the_wrong_frames_is_refused(tmp_path, settings, words):
    labelled(tmp_path, "d1-a", "d2-a")
    with pytest.raises(DataError, match=words):
        find_labelled_frames(tmp_path, **settings)


def test_a_missing_partner_is_named_with_its_side(tmp_path):
    labelled(tmp_path, "d1-a", "d1-b", "d1-c")
    (tmp_path / "labels" / "d1-b.png").unlink()
    (tmp_path / "labels" / "d1-c.png").unlink()
    with pytest.raises(DataError, match=r"d1-b has no partner in labels/ \(and 1 more\)"):
        find_labelled_frames(tmp_path)
    (tmp_path / "images" / "d1-b.png").unlink()
    (tmp_path / "images" / "d1-c.png").rename(tmp_path / "labels" / "d1-c.png")
    with pytest.raises(DataError, match="d1-c has no partner in images/;"):
        find_labelled_frames(tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    labelled(tmp_path)
    with pytest.raises(DataError, match="images: no PNG"):
        find_labelled_frames(tmp_path)


@pytest.mark.parametrize(("case", "group"), [("d1-frame000", "d1"), ("a-b-c", "a"), ("alone", "alone")])
def test_the_group_stands_before_the_first_hyphen(case, group):
    assert group_of(case) == group


# -- reading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_8_bit_greys_are_read_as_stored(tmp_path, suffix):
    Image.fromarray(GREYS).save(tmp_path / f"m{suffix}")
    mask = read_mask(tmp_path / f"m{suffix}")
    assert mask.dtype == np.int32
    np.testing.assert_array_equal(mask, GREYS)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_every_16_bit_grey_is_read_as_stored(tmp_path, suffix):
    greys = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(greys).save(tmp_path / f"m{suffix}")
    np.testing.assert_array_equal(read_mask(tmp_path / f"m{suffix}"), greys)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_palette_is_turned_like_the_image_beside_it(tmp_path, suffix, orientation):
    """A mask and its image come from one tool; both are turned, or neither."""
    indices = (np.arange(24).reshape(4, 6) % 5).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    grey, picture = (Image.fromarray(indices, mode) for mode in ("L", "P"))
    picture.putpalette([value for level in range(5) for value in (level, 0, 0)])
    for name, image in (("grey", grey), ("palette", picture)):
        image.save(tmp_path / f"{name}{suffix}", exif=exif)
    expected = np.rint(read_image(tmp_path / f"grey{suffix}").values[0] * 255)
    assert read_mask(tmp_path / f"palette{suffix}").tolist() == expected.tolist()
    assert expected.shape == ((6, 4) if orientation > 4 else (4, 6))


def test_a_palette_gives_its_indices_whatever_its_colours(tmp_path):
    picture = Image.fromarray(np.array([[0, 1], [2, 7]], dtype=np.uint8), mode="P")
    picture.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, *[9] * 15])
    picture.save(tmp_path / "m.png", transparency=0)
    assert read_mask(tmp_path / "m.png").tolist() == [[0, 1], [2, 7]]


def test_one_bit_is_black_or_white(tmp_path):
    Image.fromarray(np.array([[False, True]])).save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png").tolist() == [[0, 255]]


def test_grey_that_was_saved_as_rgb_is_grey(tmp_path):
    Image.fromarray(GREYS).convert("RGBA").save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), GREYS)


@pytest.mark.parametrize(
    ("name", "picture", "words"),
    [
        ("m.jpg", Image.fromarray(GREYS), "m.jpg: a mask cannot be JPEG"),
        ("m.png", Image.new("RGB", (4, 4), (10, 20, 30)), "a mask in colours"),
        ("m.png", Image.new("LA", (4, 4), (10, 128)), "transparency"),
        ("m.tif", Image.fromarray(np.full((4, 4), 0.5, np.float32)), "no whole numbers"),
    ],
)
def test_what_is_no_mask_is_refused_in_one_line(tmp_path, name, picture, words):
    picture.save(tmp_path / name)
    with pytest.raises(DataError, match=words) as caught:
        read_mask(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_truncated_mask_is_refused(tmp_path):
    path = tmp_path / "m.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(DataError, match=r"m\.png: truncated"):
        read_mask(path)


# -- writing ------------------------------------------------------------------------------------------------


def test_every_value_survives_writing(tmp_path):
    values = np.arange(256).reshape(16, 16)
    np.testing.assert_array_equal(read_mask(write_mask(tmp_path / "m.png", values)), values)
    with Image.open(tmp_path / "m.png") as picture:
        assert picture.mode == "L"


@pytest.mark.parametrize("values", [[[256]], [[-1]], [[0.5]]])
def test_values_that_do_not_fit_are_not_written(tmp_path, values):
    with pytest.raises(OutputError, match="whole numbers from 0 to 255"):
        write_mask(tmp_path / "m.png", values)
    assert list(tmp_path.iterdir()) == []


def test_frames_are_kept_by_group():
    items = [{"case": case} for case in ("a-1", "a-2", "b-1", "c-1")]
    assert [item["case"] for item in frames_of_groups(items, ["c"], groups=["a", "c"])] == ["a-1", "a-2"]
    numbered = [{"case": "1-a"}, {"case": "2-a"}]
    assert frames_of_groups(numbered, [1]) == frames_of_groups(numbered, groups=[2]) == [{"case": "2-a"}]
    with pytest.raises(DataError, match="there is no group 'x' in the folders; there are a, b, c"):
        frames_of_groups(items, ["x"])
