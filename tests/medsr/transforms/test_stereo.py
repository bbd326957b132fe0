from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from medsr.errors import DataError, SettingError
from medsr.transforms.bicubic import BicubicDownsampled
from medsr.transforms.stereo import (
    AlignRowsd,
    EndoVis17Framed,
    JoinViewsd,
    RandChannelOrderd,
    RandDisparityd,
    RandSwapFlipd,
    SplitFramed,
    SplitViewsd,
    match_rows,
    refuse_unequal_views,
    shift_rows,
)
from monai.data import MetaTensor
from monai.transforms import Compose, RandSpatialCropSamplesd
from torch import Tensor


def texture(height: int, width: int, seed: int = 0) -> Tensor:
    """Waves of all directions, so that it can be had at places between the pixels as well."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.concatenate([rng.normal(0, 0.9, (80, 2)), rng.uniform(0, 6.28, (80, 1))], 1))


def seen(waves: Tensor, height: int, width: int, *, row: float = 0, column: float = 0) -> Tensor:
    """The texture as a camera sees it whose first pixel lies at a place, ``(1, height, width)``."""
    rows, columns = (
        torch.arange(n, dtype=torch.float64) + start for n, start in ((height, row), (width, column))
    )
    phases = (
        waves[:, 0, None, None] * rows[:, None] + waves[:, 1, None, None] * columns + waves[:, 2, None, None]
    )
    return (0.5 + phases.cos().sum(0) / 60).float()[None]


def taken(rows: float, disparity: float, height: int = 64, width: int = 96, channels: int = 3) -> Tensor:
    """A pair whose right view shows everything some rows further down and some columns further left."""
    waves = texture(height, width)
    views = [seen(waves, height, width), seen(waves, height, width, row=-rows, column=disparity)]
    return torch.cat([one.expand(channels, -1, -1) for one in views])


def named(image: Tensor) -> MetaTensor:
    return MetaTensor(image, meta={"filename_or_obj": "/data/patient/frame_7.png", "notes": "lossy"})


# --- from views and frames to pairs -----------------------------------------------------------------------------------


def test_views_are_joined_left_before_right():
    left, right = torch.rand(3, 4, 5), torch.rand(3, 4, 5)
    found = JoinViewsd()({"image": named(left), "image_right": right, "case": "a"})
    assert set(found) == {"image", "case"}
    assert torch.equal(found["image"].as_tensor(), torch.cat([left, right]))
    assert found["image"].meta["filename_or_obj"].endswith("frame_7.png")


def test_grey_views_become_colour_where_colour_is_needed():
    grey = torch.rand(1, 4, 5)
    data = {"image": grey, "image_right": grey.flip(2)}
    assert torch.equal(JoinViewsd()(data)["image"], torch.cat([*[grey] * 3, *[grey.flip(2)] * 3]))
    assert JoinViewsd(channels=1)(data)["image"].shape == (2, 4, 5)


def test_several_pairs_at_once():
    data = {key: torch.rand(3, 2, 2) for key in ("image", "image_right", "label", "label_right")}
    found = JoinViewsd(["image", "label"], ["image_right", "label_right"])(data)
    assert torch.equal(found["label"][3:], data["label_right"])
    with pytest.raises(SettingError, match="as many right_keys as keys"):
        JoinViewsd(["image", "label"])


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        ((3, 4, 5), (3, 4, 6), r"frame_7\.png: the left view is 3 x 4 x 5, the right one 3 x 4 x 6"),
        ((3, 4, 5), (1, 4, 5), "both must be of one size and colour"),
        ((4, 4, 5), (4, 4, 5), "views of 4 channels; 3 are needed"),
    ],
)
def test_views_that_do_not_fit_together_are_named(left, right, message):
    with pytest.raises(DataError, match=message) as error:
        JoinViewsd()({"image": named(torch.rand(left)), "image_right": torch.rand(right)})
    assert "patient" not in str(error.value)


@pytest.mark.parametrize("channels", [1, 3])
def test_views_can_be_joined_as_they_are_and_split_again(channels):
    left, right = torch.rand(channels, 4, 5), torch.rand(channels, 4, 5)
    pair = JoinViewsd(channels=None)({"image": named(left), "image_right": right})["image"]
    assert pair.shape == (2 * channels, 4, 5)
    views = SplitViewsd("image")({"image": pair})
    assert torch.equal(views["image_left"].as_tensor(), left)
    assert torch.equal(views["image_right"].as_tensor(), right)
    with pytest.raises(DataError, match="3 channels are no pair"):
        SplitViewsd("image")({"image": torch.rand(3, 4, 5)})


def test_an_image_without_a_second_view_is_taken_for_both():
    image = named(torch.rand(3, 4, 5))
    pair = JoinViewsd()({"image": image})["image"]
    assert torch.equal(pair[:3].as_tensor(), pair[3:].as_tensor())
    assert pair.meta["notes"].splitlines() == [
        "lossy",
        "there is no second view: the image was taken for both",
    ]
    assert image.meta["notes"] == "lossy"


def test_what_is_odd_about_a_right_view_is_noted():
    left, right = named(torch.rand(3, 4, 5)), named(torch.rand(3, 4, 5))
    right.meta["notes"] = "lossy\nEXIF orientation 3 was applied"
    left.meta["encoding_bits"], right.meta["encoding_bits"] = 8, 16
    notes = JoinViewsd()({"image": left, "image_right": right})["image"].meta["notes"].splitlines()
    assert notes == [
        "lossy",
        "right view: EXIF orientation 3 was applied",
        "the left view has 8 bits, the right one 16: both are written as the left one",
    ]
    notes = JoinViewsd()({"image": left, "image_right": left.clone()})["image"].meta["notes"].splitlines()
    assert notes == ["lossy", "both views are the same image, pixel by pixel"]


def test_views_of_two_sizes_are_refused_by_name():
    refuse_unequal_views("a.png", (3, 4, 5), torch.Size([3, 4, 5]))
    with pytest.raises(DataError, match=r"a\.png: the left view is 3 x 4 x 5, the right one 3 x 4 x 6"):
        refuse_unequal_views("a.png", (3, 4, 5), (3, 4, 6))


@pytest.mark.parametrize(("layout", "axis"), [("side_by_side", 2), ("top_bottom", 1)])
@pytest.mark.parametrize("right_first", [False, True])
def test_frames_are_cut_into_pairs(layout, axis, right_first):
    left, right = torch.rand(3, 4, 6), torch.rand(3, 4, 6)
    frame = torch.cat([right, left] if right_first else [left, right], axis)
    found = SplitFramed("image", layout, right_first=right_first)({"image": frame})
    assert torch.equal(found["image"], torch.cat([left, right]))


def test_what_is_no_frame_is_explained():
    with pytest.raises(SettingError, match="layout must be one of side_by_side, top_bottom, got 'anaglyph'"):
        SplitFramed("image", "anaglyph")
    with pytest.raises(DataError, match="image: a frame of 3 x 4 x 7 is not two views side by side"):
        SplitFramed("image")({"image": torch.rand(3, 4, 7)})


# --- augmentation -----------------------------------------------------------------------------------------------------


def test_a_mirrored_pair_keeps_the_sign_of_its_disparity():
    pair = taken(0, 5)
    found = RandSwapFlipd("image", prob=1)({"image": pair})["image"]
    assert match_rows(pair).disparity_px == match_rows(found).disparity_px == 5
    assert match_rows(pair.flip(2)).disparity_px == -5
    assert torch.equal(RandSwapFlipd("image", prob=1)({"image": found})["image"], pair)


def test_equal_views_get_a_disparity_and_pairs_keep_theirs():
    view = taken(0, 0)[:3]
    transform = RandDisparityd(["image", "label"], 6).set_random_state(0)
    drawn = [transform({"image": view.repeat(2, 1, 1), "label": view.repeat(2, 1, 1)}) for _ in range(12)]
    found = [round(match_rows(one["image"]).disparity_px) for one in drawn]
    assert min(found) < 0 < max(found)
    assert max(map(abs, found)) <= 6
    assert all(torch.equal(one["image"], one["label"]) for one in drawn)
    assert all(torch.equal(one["image"][:3], view) for one in drawn)
    pair = taken(0, 5)
    assert torch.equal(transform({"image": pair, "label": pair})["image"], pair)


def test_disparities_of_a_made_up_scene_change_smoothly_in_whole_pixels():
    height, width, relief = 130, 260, 8
    columns = torch.arange(width).expand(1, height, width).double()
    pair = torch.cat([columns, columns])
    transform = RandDisparityd(["image", "label"], 20, relief=relief).set_random_state(0)
    spread = []
    for _ in range(6):
        drawn = transform({"image": pair, "label": pair})
        assert torch.equal(drawn["image"], drawn["label"])
        assert torch.equal(drawn["image"][0], columns[0])
        # What is seen comes back on the other side.
        disparity = (drawn["image"][1] - columns[0] + width / 2) % width - width / 2
        assert torch.equal(disparity, disparity.round())
        assert float(disparity.abs().max()) <= 20 + relief
        spread.append(float(disparity.max() - disparity.min()))
        for axis in (0, 1):
            assert float(disparity.diff(dim=axis).abs().max()) <= 1
    assert max(spread) <= 2 * relief
    assert min(spread) > relief / 2


def test_places_between_pixels_are_seen_as_a_camera_sees_them():
    height, width = 40, 120
    ramps = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).float()
    waves = texture(height, width)
    waves[:, :2] *= 0.6
    scene = seen(waves, height, width)
    data = {"image": ramps.repeat(2, 1, 1), "label": scene.repeat(2, 1, 1)}
    transform = RandDisparityd(["image", "label"], 9, subpixel=True, rows=1.5).set_random_state(0)
    places = []
    for _ in range(12):
        drawn = transform(data)
        row, column = ((drawn["image"][2:] - ramps)[:, 20, width // 2]).tolist()
        inner = (slice(3, -3), slice(12, -12))
        # The same place everywhere: ramps are met exactly.
        assert (drawn["image"][2:] - ramps)[0][inner] == pytest.approx(row, abs=1e-4)
        assert (drawn["image"][2:] - ramps)[1][inner] == pytest.approx(column, abs=1e-4)
        expected = seen(waves, height, width, row=row, column=column)[0][inner]
        assert float((drawn["label"][1][inner] - expected).std() / expected.std()) < 0.06
        assert torch.equal(drawn["label"][0], scene[0])
        places.append((row, column))
    rows, columns = (torch.tensor(one) for one in zip(*places, strict=True))
    assert 0.7 < float(rows.abs().max()) <= 1.5
    assert 5 < float(columns.abs().max()) <= 9
    assert min(float((one - one.round()).abs().max()) for one in (rows, columns)) > 0.3
    assert float(rows.min()) < 0 < float(rows.max())


def test_between_pixels_nothing_is_brighter_or_darker_than_the_view():
    view = (torch.rand(3, 20, 40, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    transform = RandDisparityd("image", 9, subpixel=True, rows=1).set_random_state(0)
    for _ in range(5):
        found = transform({"image": view.repeat(2, 1, 1)})["image"]
        assert (float(found.min()), float(found.max())) == (0, 1)


def test_relief_between_pixels_is_smooth():
    columns = torch.arange(260.0).expand(1, 130, 260)
    transform = RandDisparityd("image", 0, relief=6, subpixel=True).set_random_state(0)
    disparity = (transform({"image": columns.repeat(2, 1, 1)})["image"][1] - columns[0])[:, 12:-12]
    assert float(disparity.max() - disparity.min()) > 3
    assert float(disparity.abs().max()) <= 6
    assert max(float(disparity.diff(dim=axis).abs().max()) for axis in (0, 1)) < 0.3
    assert not torch.equal(disparity, disparity.round())


def test_cameras_differ_in_exposure():
    view = taken(0, 0)[:3]
    transform = RandDisparityd(["image", "label"], 0, exposure=0.2).set_random_state(0)
    drawn = [transform({"image": view.repeat(2, 1, 1), "label": view.repeat(2, 1, 1)}) for _ in range(40)]
    assert all(torch.equal(one["image"], one["label"]) for one in drawn)
    gains = [float((one["image"][3:] / view).median()) for one in drawn]
    assert 0.8 <= min(gains) < 0.95 < 1.05 < max(gains) <= 1.2
    assert all(float(one["image"].max()) <= 1 for one in drawn)


def test_cameras_have_noise_of_their_own():
    view = taken(0, 0)[:3]
    transform = RandDisparityd(["image", "label"], 0, noise=0.05).set_random_state(0)
    drawn = [transform({"image": view.repeat(2, 1, 1), "label": view.repeat(2, 1, 1)}) for _ in range(40)]
    assert all(torch.equal(one["image"], one["label"]) for one in drawn)
    assert all(torch.equal(one["image"][:3], view) for one in drawn)
    added = [one["image"][3:] - view for one in drawn]
    sizes = [float(one.std()) for one in added]
    assert 0 < min(sizes) < 0.01 < 0.04 < max(sizes) < 0.055
    assert max(abs(float(one.mean())) for one in added) < 0.002
    assert not torch.equal(added[0] / sizes[0], added[1] / sizes[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"largest": 4, "noise": -0.1}, "noise must be >= 0, got -0.1"),
        ({"largest": 4, "rows": -0.5}, "rows must be >= 0, got -0.5"),
        ({"largest": 4, "subpixel": "perhaps"}, "subpixel must be true or false"),
        ({"largest": -1}, "largest must be a whole number >= 0, got -1"),
        ({"largest": 4, "relief": -2}, "relief must be a whole number >= 0, got -2"),
        ({"largest": 4, "exposure": 1.0}, r"exposure must be in \[0, 1\), got 1.0"),
    ],
)
def test_scenes_that_cannot_be_made_up_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        RandDisparityd("image", **settings)


@pytest.mark.parametrize("kind", [RandSwapFlipd, RandChannelOrderd])
def test_all_keys_get_the_same_and_the_seed_decides(kind):
    pair = torch.rand(6, 4, 5)
    transform = kind(["image", "label"], prob=0.5).set_random_state(1)
    drawn = [transform({"image": pair, "label": 2 * pair}) for _ in range(20)]
    assert all(torch.equal(one["label"], 2 * one["image"]) for one in drawn)
    changed = [not torch.equal(one["image"], pair) for one in drawn]
    assert 3 < sum(changed) < 17
    transform.set_random_state(1)
    assert all(torch.equal(transform({"image": pair, "label": pair})["image"], one["image"]) for one in drawn)


def test_colours_are_permuted_in_both_views_alike():
    pair = torch.arange(6.0)[:, None, None].expand(6, 2, 2)
    transform = RandChannelOrderd("image", prob=1).set_random_state(0)
    orders = {tuple(transform({"image": pair})["image"][:, 0, 0].int().tolist()) for _ in range(80)}
    assert len(orders) == 6
    assert all(tuple(v + 3 for v in order[:3]) == order[3:] for order in orders)


def test_crops_are_taken_of_both_views_and_degraded_together():
    # Nothing of ours is needed, since a pair is one tensor.
    pair = taken(0, 4, 80, 120)
    steps = Compose(
        [
            RandSpatialCropSamplesd("label", roi_size=[32, 64], num_samples=3, random_size=False),
            BicubicDownsampled("label", 2, low_keys="image"),
        ]
    ).set_random_state(0)
    for item in steps({"label": MetaTensor(pair)}):
        assert (item["label"].shape, item["image"].shape) == ((6, 32, 64), (6, 16, 32))
        assert match_rows(item["label"]).disparity_px == 4
        assert abs(match_rows(item["label"]).offset_px) < 0.1


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "disparity"), [(0.0, 0.0), (3.0, 6.0), (-2.0, -7.0), (0.5, 3.0), (6.7, 11.0), (-4.3, 2.0)]
)
def test_offset_and_disparity_of_the_views_are_measured(rows, disparity):
    found = match_rows(taken(rows, disparity), max_rows=10)
    assert found.offset_px == pytest.approx(rows, abs=0.1)
    assert found.disparity_px == pytest.approx(disparity, abs=0.5)
    assert found.spread_px < 0.1
    assert found.patches > 20


def test_light_and_contrast_of_a_camera_do_not_matter():
    pair = taken(2, 4)
    pair[3:] = 0.3 * pair[3:] + 0.1
    assert match_rows(pair).offset_px == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(
    "pair",
    [
        torch.full((6, 40, 60), 0.5),
        torch.rand(6, 40, 60, generator=torch.Generator().manual_seed(0)),
        torch.rand(6, 3, 5),
        torch.zeros(6, 1, 1),
    ],
)
def test_nothing_is_claimed_of_views_that_have_nothing_in_common(pair):
    assert match_rows(pair) is None


def test_what_lies_beyond_the_range_is_not_claimed():
    assert match_rows(taken(9, 0), max_rows=4) is None
    assert match_rows(taken(9, 0), max_rows=12).offset_px == pytest.approx(9, abs=0.1)
    with pytest.raises(SettingError, match="must be >= 0"):
        match_rows(taken(0, 0), max_rows=-1)


@pytest.mark.parametrize("rows", [5.0, -5.0, 0.0])
def test_rows_are_brought_to_one_height(rows):
    found = AlignRowsd("image", max_rows=10)({"image": named(taken(rows, 6))})["image"]
    assert found.shape == (6, 64 - abs(int(rows)), 96)
    assert match_rows(found).offset_px == pytest.approx(0, abs=0.1)
    assert found.meta["row_offset_px"] == int(rows)
    assert found.meta["row_residual_px"] < 0.2
    assert found.meta["disparity_px"] == 6
    assert found.meta["notes"] == "lossy"


@pytest.mark.parametrize("rows", [3, "estimate"])
def test_an_image_without_a_partner_loses_no_rows(caplog, rows):
    view = taken(0, 0)[:3]
    pair = torch.cat([view, view])
    found = AlignRowsd("image", rows=rows)({"image": named(pair)})["image"]
    assert torch.equal(found.as_tensor(), torch.as_tensor(pair))
    assert found.meta["row_offset_px"] == 0
    assert not caplog.records


def test_a_known_offset_is_not_estimated_but_checked(caplog):
    with caplog.at_level(logging.WARNING):
        found = AlignRowsd("image", rows=2, max_rows=10)({"image": named(taken(5, 6))})["image"]
    assert found.shape[1] == 62
    assert found.meta["row_offset_px"] == 2
    assert found.meta["row_residual_px"] == pytest.approx(3, abs=0.1)
    assert found.meta["notes"].splitlines()[0] == "lossy"
    assert "rows of the views differ by 3.0 px after a shift of 2; rectify the pair" in found.meta["notes"]
    assert [record.message.split(":")[0] for record in caplog.records] == ["frame_7.png"]


def test_a_rolled_camera_is_noticed():
    # Rows of the right view lie 4 lower on the left of the image and 4 higher on the right.
    waves = texture(64, 96)
    views = [seen(waves, 64, 96)]
    parts = [seen(waves, 64, 8, row=-4 + 8 * k / 11, column=8 * k) for k in range(12)]
    found = AlignRowsd("image", max_rows=10)({"image": torch.cat([views[0], torch.cat(parts, 2)])})["image"]
    assert found.meta["row_residual_px"] > 1
    assert "rectify the pair" in found.meta["notes"]


def test_swapped_views_are_noticed_where_the_sign_tells():
    pair = taken(0, -6)
    assert AlignRowsd("image")({"image": taken(0, 6)})["image"].meta["notes"] == ""
    found = AlignRowsd("image", parallel=True)({"image": pair})["image"]
    assert "the disparity is -6 px: the views look swapped" in found.meta["notes"]
    found = AlignRowsd("image")({"image": pair})["image"]
    assert "the disparity is -6 px: cameras that look inwards, or swapped views" in found.meta["notes"]


def test_views_without_texture_are_left_alone_with_a_warning():
    found = AlignRowsd("image")({"image": torch.full((6, 40, 60), 0.5)})["image"]
    assert found.shape == (6, 40, 60)
    assert "too little in common" in found.meta["notes"]


def test_impossible_shifts_are_refused():
    with pytest.raises(SettingError, match="row_shift must be a whole number or 'estimate', got 'auto'"):
        AlignRowsd("image", rows="auto")
    with pytest.raises(SettingError, match=r"row_shift must be a whole number, got 1\.5"):
        AlignRowsd("image", rows=1.5)
    with pytest.raises(SettingError, match="right_first must be true or false, got 'no'"):
        SplitFramed("image", right_first="no")
    with pytest.raises(DataError, match="a shift of 40 rows leaves nothing of 40"):
        AlignRowsd("image", rows=40)({"image": torch.rand(6, 40, 60)})


# --- EndoVis 2017 -----------------------------------------------------------------------------------------------------


def frame(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32).expand(1, 1080, 1920)


def test_odd_rows_are_replaced_by_their_neighbours():
    # Even rows hold a ramp, odd rows another moment.
    rows = torch.arange(1080.0)
    rows[1::2] = -50
    found = EndoVis17Framed("image", border=True)({"image": frame(rows[:, None])})["image"]
    assert found.shape == (1, 1024, 1280)
    assert torch.equal(found[0, :, 0], torch.arange(28.0, 28 + 1024))
    kept = EndoVis17Framed("image", border=True, deinterlace=False)({"image": frame(rows[:, None])})["image"]
    assert torch.equal(kept[0, :, 0], rows[28 : 28 + 1024])


def test_the_last_row_has_no_neighbour_below(monkeypatch):
    transform = EndoVis17Framed("image")
    transform.window = (0, 0, 1080, 4)
    found = transform({"image": frame(torch.arange(1080.0)[:, None])})["image"]
    assert found[0, -3:, 0].tolist() == [1077, 1078, 1078]


@pytest.mark.parametrize(
    ("border", "start", "size"), [(True, (28, 320), (1024, 1280)), (False, (37, 328), (1009, 1263))]
)
def test_the_borders_are_cut_off(border, start, size):
    columns = torch.arange(1920.0)
    image = MetaTensor(frame(columns))
    found = EndoVis17Framed("image", border=border)({"image": image})["image"]
    assert found.shape == (1, *size)
    assert float(found[0, 0, 0]) == start[1]
    assert found.meta["frame_origin_px"] == list(start)


def test_other_frames_are_refused():
    with pytest.raises(
        DataError, match=r"frame_7\.png: frames of EndoVis 2017 are 1080 x 1920 pixels, got 3 x 4 x 5"
    ):
        EndoVis17Framed("image")({"image": named(torch.rand(3, 4, 5))})


@pytest.mark.parametrize("rows", [-3, 0, 4])
def test_shifted_rows_meet_their_partners(rows: int) -> None:
    # Each view says in every pixel which row of the scene it shows.
    scene = torch.arange(20.0)[None, :, None].expand(1, 20, 5)
    pair = torch.cat([scene, scene - rows])
    left, right = shift_rows(pair, rows).chunk(2)
    assert left.shape == (1, 20 - abs(rows), 5)
    torch.testing.assert_close(left, right)
