from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from medsr.errors import DataError, SettingError
from medsr.geometry import rescaled_affine, to_slice_last
from medsr.handlers import draw_qc, qc_figure
from medsr.handlers.qc_figure import segmentation_figure, superres_figure
from medsr.phantoms import head
from monai.data import MetaTensor
from scipy.ndimage import gaussian_filter

ALL = ("input slices", "cubic", "super-resolved", "uncertainty", "reference", "absolute error")


@pytest.fixture(scope="module")
def volumes() -> dict[str, np.ndarray]:
    truth = head(32)[0]
    slabs = truth.reshape(32, 32, 8, 4).mean(axis=-1)
    cubic = gaussian_filter(slabs.repeat(4, axis=-1), (0, 0, 1.5))
    sharp = gaussian_filter(truth, (0, 0, 0.6))
    error = np.abs(sharp - truth)
    values = (slabs.repeat(4, axis=-1), cubic, sharp, gaussian_filter(error, 1), truth, error)
    return dict(zip(ALL, values, strict=True))


def drawn(figure) -> None:
    figure.savefig(io.BytesIO(), format="png")


def panels(figure, name):
    """The three axes of one column: found by its caption and position."""
    top = next(a for a in figure.axes if a.get_title() == name)
    centre = top.get_position().x0 + top.get_position().width / 2
    column = [a for a in figure.axes if a.get_position().height > 0.05]
    return [a for a in column if a.get_position().x0 < centre < a.get_position().x1]


def check_texts(figure) -> None:
    """No text overlaps another or leaves the page."""
    drawn(figure)
    texts = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        texts += [axes.title, axes.xaxis.label, *axes.texts]
        if axes.get_xlabel():
            low, high = axes.get_xlim()
            ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
            texts += [label for tick, label in ticks if low <= tick <= high]
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts if t.get_text()]
    page = figure.bbox
    for number, (text, box) in enumerate(boxes):
        assert page.x0 <= box.x0, text
        assert box.x1 <= page.x1, text
        assert page.y0 <= box.y0, text
        assert box.y1 <= page.y1, text
        for other, rival in boxes[number + 1 :]:
            assert not box.overlaps(rival), (text, other)


def test_one_axes_per_panel_and_one_bar_per_run(volumes):
    figure = draw_qc(volumes, spacing_mm=(1, 1, 1), title="Title", footer="Protocol")
    # 6 columns x 3 rows; runs: images, map, image, map.
    assert len(figure.axes) == 6 * 3 + 4
    assert [a.get_title() for a in figure.axes if a.get_title()] == list(ALL)
    drawn(figure)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_any_number_of_columns(volumes, count):
    chosen = {name: volumes[name] for name in ALL[:count]}
    figure = draw_qc(chosen, spacing_mm=(1, 1, 1))
    assert len(figure.axes) == 3 * count + (2 if count == 4 else 1)
    drawn(figure)


def test_all_images_share_one_window_from_the_input(volumes):
    figure = draw_qc(volumes, spacing_mm=(1, 1, 1))
    windows = {
        panel.images[0].get_clim() for name in ALL if name in ALL[:3] for panel in panels(figure, name)
    }
    assert len(windows) == 1
    assert {p.images[0].get_clim() for p in panels(figure, "reference")} == windows
    shifted = {**volumes, "super-resolved": volumes["super-resolved"] * 5}
    other = draw_qc(shifted, spacing_mm=(1, 1, 1))
    assert {p.images[0].get_clim() for p in panels(other, "super-resolved")} == windows


def test_maps_share_one_scale_from_zero_and_one_colour_map(volumes):
    figure = draw_qc(volumes, spacing_mm=(1, 1, 1))
    images = [p.images[0] for name in ("uncertainty", "absolute error") for p in panels(figure, name)]
    assert len({image.get_clim() for image in images}) == 1
    assert images[0].get_clim()[0] == 0
    assert {image.get_cmap().name for image in images} == {"magma"}
    assert {p.images[0].get_cmap().name for p in panels(figure, "cubic")} == {"gray"}
    labels = [a.get_xlabel() for a in figure.axes if a.get_xlabel()]
    assert labels.count("same unit as image") == 2


def test_slice_axis_points_upwards():
    volume = np.zeros((12, 12, 12))
    volume[2:10, 2:10, 2:10] = 1.0
    volume[2:10, 2:10, 8:10] = 9.0
    figure = draw_qc({"input": volume}, spacing_mm=(1, 1, 1))
    axes = figure.axes[0]
    assert axes.images[0].origin == "lower"
    image = np.asarray(axes.images[0].get_array())
    assert image[9, 6] == 9.0
    assert image[2, 6] == 1.0
    assert axes.get_ylim()[0] < axes.get_ylim()[1]


def pixels(figure) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


@pytest.mark.parametrize("flipped", [(), (0,), (1,), (2,), (0, 1), (0, 1, 2)])
def test_however_a_file_is_stored_the_patient_stands_upright_and_right_is_right(volumes, flipped):
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    # No two planes alike, and as many on either side of the middle: the same ones are chosen of a flipped file.
    texture = gaussian_filter(np.random.default_rng(0).normal(0, 300, (31, 31, 32)), 1) * (
        volumes["reference"][:-1, :-1] > 0
    )
    whole = {name: volume[:-1, :-1] + texture for name, volume in volumes.items()}
    expected = draw_qc(whole, spacing_mm=(2, 2, 2), affine=affine)
    assert row_names(expected) == ["coronal", "sagittal", "detail"]
    assert [letters(axes) for axes in panels(expected, "cubic")] == ["", "", ""]
    assert [letters(axes) for axes in panels(expected, "input slices")] == ["LS", "PS", ""]
    turned = affine.copy()
    for axis in flipped:
        turned[:3, 3] += turned[:3, axis] * (next(iter(whole.values())).shape[axis] - 1)
        turned[:3, axis] *= -1
    found = draw_qc(
        {name: np.flip(volume, flipped) for name, volume in whole.items()},
        spacing_mm=(2, 2, 2),
        affine=turned,
    )
    np.testing.assert_allclose(pixels(found)[..., :3], pixels(expected)[..., :3].astype(float), atol=3)


def test_slices_of_any_direction_are_named(volumes):
    # Sagittal slices, first rows downwards: the array axes point forward, down and left.
    affine = np.zeros((4, 4))
    affine[1, 0], affine[2, 1], affine[0, 2], affine[3, 3] = 1, -1, -4, 1
    figure = draw_qc(volumes, spacing_mm=(1, 1, 4), affine=affine)
    assert row_names(figure) == ["axial", "coronal", "detail"]
    assert [letters(axes) for axes in panels(figure, "input slices")] == ["PR", "IR", ""]
    without = draw_qc(volumes, spacing_mm=(1, 1, 4))
    assert row_names(without) == ["first plane", "second plane", "detail"]
    assert not any(letters(axes) for axes in without.axes)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 0.8, 1.6), (1.0, 1.0, 6.0)])
def test_shapes_are_physical(volumes, spacing):
    figure = draw_qc(volumes, spacing_mm=spacing)
    size = figure.get_size_inches()
    first, second, *_ = panels(figure, "cubic")
    scales = []
    for axes, extent in ((first, spacing[0]), (second, spacing[1])):
        box = axes.get_position()
        inches = box.width * size[0], box.height * size[1]
        millimetres = np.diff(axes.get_xlim())[0], np.diff(axes.get_ylim())[0]
        assert inches[0] / millimetres[0] == pytest.approx(inches[1] / millimetres[1], rel=1e-6)
        assert axes.images[0].get_extent()[1] == pytest.approx(32 * extent)
        scales.append(inches[0] / millimetres[0])
    # One scale bar is true for both rows.
    assert scales[0] == pytest.approx(scales[1])


def test_scale_bar_has_the_length_it_claims(volumes):
    figure = draw_qc(volumes, spacing_mm=(4.0, 4.0, 4.0))
    axes = panels(figure, "input slices")[0]
    assert [t.get_text() for t in axes.texts] == ["20 mm"]
    bar = axes.patches[-1]
    drawn(figure)
    assert bar.get_width() * np.diff(axes.get_xlim())[0] == pytest.approx(20.0)


def test_detail_lies_inside_the_frame_of_the_first_row(volumes):
    figure = draw_qc(volumes, spacing_mm=(1, 1, 1))
    first, _, detail = panels(figure, "super-resolved")
    frame = first.patches[0]
    assert detail.get_xlim() == pytest.approx((frame.get_x(), frame.get_x() + frame.get_width()))
    assert detail.get_ylim() == pytest.approx((frame.get_y(), frame.get_y() + frame.get_height()))
    assert first.get_xlim()[0] <= detail.get_xlim()[0] < detail.get_xlim()[1] <= first.get_xlim()[1]
    assert detail.images[0].get_interpolation() == "nearest"


@pytest.mark.parametrize("columns", [ALL, ALL[:2]])
def test_no_text_overlaps_another_or_leaves_the_page(volumes, columns):
    figure = draw_qc(
        {name: volumes[name] for name in columns},
        spacing_mm=(3, 3, 3),
        title="A long headline about a head with thick slices, enough to need two lines on a narrow page",
        footer="Protocol: " + "slice profile, thickness, spacing, gap, mask, data range, kernel; " * 6,
    )
    check_texts(figure)


def test_pyplot_is_not_touched(tmp_path):
    code = (
        "import sys, numpy as np\n"
        "from medsr.handlers import draw_qc\n"
        "assert 'matplotlib' not in sys.modules\n"
        "v = np.pad(np.arange(64.0).reshape(4, 4, 4), 2)\n"
        "draw_qc({'input': v}, spacing_mm=(1, 1, 1)).savefig(sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "qc.png")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_no_figure_stays_open(volumes):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    drawn(draw_qc(volumes, spacing_mm=(1, 1, 1)))
    assert plt.get_fignums() == before


def test_the_same_volumes_give_the_same_pixels(volumes):
    pages = []
    for _ in range(2):
        page = io.BytesIO()
        draw_qc(volumes, spacing_mm=(1, 1, 1)).savefig(page, format="rgba")
        pages.append(page.getvalue())
    assert pages[0] == pages[1]


def test_inputs_stay_as_they_were(volumes):
    before = {name: volume.copy() for name, volume in volumes.items()}
    draw_qc(volumes, spacing_mm=(1, 1, 1))
    for name, volume in volumes.items():
        np.testing.assert_array_equal(volume, before[name])


def test_a_map_of_zeros_can_be_drawn(volumes):
    flat = {"input": volumes["cubic"], "uncertainty": np.zeros((32, 32, 32))}
    drawn(draw_qc(flat, spacing_mm=(1, 1, 1)))


def test_faults_are_named(volumes):
    image = volumes["cubic"]
    with pytest.raises(DataError, match="no image"):
        draw_qc({"uncertainty": image}, spacing_mm=(1, 1, 1))
    with pytest.raises(DataError, match=r"'b'.*\(32, 32, 31\)"):
        draw_qc({"a": image, "b": image[:, :, 1:]}, spacing_mm=(1, 1, 1))
    with pytest.raises(DataError, match="'a'"):
        draw_qc({"a": image[0]}, spacing_mm=(1, 1, 1))
    with pytest.raises(DataError, match="NaN"):
        draw_qc({"a": image * np.nan}, spacing_mm=(1, 1, 1))
    with pytest.raises(DataError, match="constant"):
        draw_qc({"a": np.ones((4, 4, 4))}, spacing_mm=(1, 1, 1))
    with pytest.raises(SettingError, match="spacing_mm"):
        draw_qc({"a": image}, spacing_mm=(1, 1, 0))


# --- from items ---------------------------------------------------------------------------------------------------

RATIO, THIN_MM = 4, (1.0, 1.5, 2.0)
FACTS = {"ratio": float(RATIO), "data_consistency_db": 41.5, "slice_profile": "slr"}
BOX = np.s_[4:12, 6:16, 9:17]
THICK_BOX = np.s_[4:12, 6:16, 2:4]
COLUMNS = ("thick slices, thick mask", "cubic between slices, thin mask", "uncertainty")
SKY_BLUE, ORANGE = "#56b4e9", "#e69f00"


def item(
    thin: np.ndarray | None = None, thick: np.ndarray | None = None, *, classes: int = 1, axis: int = 2
) -> dict[str, Any]:
    """A postprocessed item with masks given slices last, in a file whose slices lie along ``axis``."""
    rng = np.random.default_rng(0)
    order = to_slice_last(axis)
    shape = (24, 20, 6)
    fine = (*shape[:2], RATIO * shape[2])
    masks = {"pred": np.zeros(fine), "pred_thick": np.zeros(shape)}
    masks["pred"][BOX] = masks["pred_thick"][THICK_BOX] = 1
    masks.update({key: mask for key, mask in (("pred", thin), ("pred_thick", thick)) if mask is not None})
    affine = np.eye(4)
    affine[order, order] = (*THIN_MM[:2], THIN_MM[2] * RATIO)
    new = rescaled_affine(affine, axis, size=shape[2], new_size=fine[2])

    def stored(values: np.ndarray, matrix: np.ndarray) -> MetaTensor:
        values = torch.as_tensor(values)
        return MetaTensor(
            values.permute(0, *(1 + int(i) for i in np.argsort(order))), affine=torch.as_tensor(matrix)
        )

    image = MetaTensor(
        torch.as_tensor(rng.uniform(0.2, 1, (1, *shape)), dtype=torch.float32),
        affine=torch.as_tensor(affine[:, [*order, 3]]),
        meta={"original_affine": torch.as_tensor(affine), "intensity_scale": 10.0, "intensity_offset": 3.0},
    )
    return {
        "image": image,
        "case": "a",
        "pred": stored(masks["pred"][None].astype(np.uint8), new),
        "pred_thick": stored(masks["pred_thick"][None].astype(np.uint8), affine),
        "probability": stored(rng.random((classes, *fine)), new),
        "uncertainty": stored(rng.random((1, *fine)), new),
    }


@pytest.fixture(scope="module")
def figure():
    return segmentation_figure(item(), FACTS)


def outline(axes, colour: str = SKY_BLUE) -> np.ndarray:
    """Edges of one colour, (n, 2, 2) in mm."""
    from matplotlib.colors import to_hex

    drawn = [one for one in axes.collections if to_hex(one.get_color()[0]) == colour]
    return np.concatenate([np.asarray(one.get_segments()) for one in drawn]) if drawn else np.empty((0, 2, 2))


def box(edges: np.ndarray) -> list[float]:
    return [float(v) for v in (*edges.min(axis=(0, 1)), *edges.max(axis=(0, 1)))]


def notes(axes) -> list[str]:
    return [
        text.get_text()
        for text in axes.texts
        if "mm" not in text.get_text() and text.get_text() not in [*"LRPAIS"]
    ]


def letters(axes) -> str:
    """Of the left and the upper edge."""
    return "".join(text.get_text() for text in axes.texts if text.get_text() in [*"LRPAIS"])


def legend(figure) -> list[str]:
    (only,) = figure.legends
    return [text.get_text() for text in only.get_texts()]


def row_names(figure) -> list[str]:
    return [text.get_text() for text in figure.texts if text.get_rotation() == 90]


def test_a_super_resolved_item_shows_input_interpolation_result_and_uncertainty(monkeypatch):
    shown: dict[str, Any] = {}
    monkeypatch.setattr(
        qc_figure, "draw_qc", lambda volumes, **rest: shown.update(volumes=volumes, **rest) or "figure"
    )
    one = item()
    one["pred"] = MetaTensor(
        one["image"].as_tensor().repeat_interleave(4, -1) * 10 + 3, affine=one["pred"].affine
    )
    assert superres_figure(one, FACTS) == "figure"
    assert list(shown["volumes"]) == ["input slices", "cubic", "super-resolved", "uncertainty"]
    assert {volume.shape for volume in shown["volumes"].values()} == {(24, 20, 24)}
    # The input is shown in the unit of the result; here the result is the repeated input.
    assert np.allclose(shown["volumes"]["input slices"], shown["volumes"]["super-resolved"], atol=1e-4)
    assert shown["spacing_mm"] == THIN_MM
    assert np.allclose(shown["affine"], one["pred"].affine)
    assert "41.5 dB" in shown["footer"]
    assert "Not for diagnosis" in shown["footer"]
    assert "8 mm to 2 mm" in shown["title"]
    del one["uncertainty"]
    superres_figure(one, {})
    assert list(shown["volumes"]) == ["input slices", "cubic", "super-resolved"]
    assert "ratio 4;" in shown["footer"]


def test_outlines_run_where_the_masks_are(figure):
    thick, thin, unsure = (panels(figure, name) for name in COLUMNS)
    (a, b), (c, d), (e, f) = (4.0, 12.0), (9.0, 24.0), (18.0, 34.0)  # the box in mm
    for axes, expected in zip(thin, ([a, e, b, f], [c, e, d, f], [a, c, b, d]), strict=True):
        edges = outline(axes)
        assert box(edges) == expected
        lengths = np.abs(np.diff(edges, axis=1)).sum()
        assert lengths == pytest.approx(2 * (expected[2] - expected[0] + expected[3] - expected[1]))
    # The slabs 2 and 3 of 8 mm.
    assert [box(outline(axes)) for axes in thick] == [[a, 16, b, 32], [c, 16, d, 32], [a, c, b, d]]
    assert not any(axes.collections for axes in unsure)


def test_the_outline_of_the_thick_mask_is_a_staircase_of_whole_slices():
    x, y, z = np.meshgrid(
        np.arange(24) - 11.5, (np.arange(20) - 9.5) * 1.5, np.arange(24) * 2.0 - 23, indexing="ij"
    )
    ball = x**2 + y**2 + z**2 < 10**2
    figure = segmentation_figure(item(ball, ball[..., 1::4]), FACTS)
    coarse, fine = (panels(figure, name)[0] for name in COLUMNS[:2])
    for axes, step in ((coarse, 8), (fine, 2)):
        edges = outline(axes)
        treads = edges[edges[:, 0, 1] == edges[:, 1, 1]][:, 0, 1]
        assert len(np.unique(treads)) > 2
        assert (treads % step == 0).all()
    assert (np.unique(outline(fine)[..., 1]) % 8 != 0).any()


def test_images_under_the_outlines_are_the_slices_and_their_interpolation(figure):
    one = item()
    slices = one["image"].numpy()[0] * 10 + 3
    thick, cubic, unsure = (
        [np.asarray(axes.images[0].get_array()) for axes in panels(figure, name)] for name in COLUMNS
    )
    i, j, k = (int(name.split()[-1]) for name in np.array(row_names(figure))[[1, 0, 2]])
    assert np.allclose(thick[0], slices[:, j].T.repeat(4, axis=0))
    assert np.allclose(thick[1], slices[i].T.repeat(4, axis=0))
    assert np.allclose(thick[2], slices[..., k // 4].T)
    assert not np.allclose(cubic[2], thick[2])
    assert np.allclose(unsure[2], one["uncertainty"].numpy()[0, ..., k].T)


def test_planes_of_masks_are_physical_and_of_one_scale(figure):
    size = figure.get_size_inches()
    scales = []
    for name in COLUMNS:
        for axes, (across, up) in zip(panels(figure, name), ((0, 2), (1, 2), (0, 1)), strict=True):
            where = axes.get_position()
            scales += [
                where.width * size[0] / np.ptp(axes.get_xlim()),
                where.height * size[1] / np.ptp(axes.get_ylim()),
            ]
            shape = (24, 20, 24)
            extent = axes.images[0].get_extent()
            assert extent[1] == pytest.approx(shape[across] * THIN_MM[across])
            assert extent[3] == pytest.approx(shape[up] * THIN_MM[up])
    assert np.allclose(scales, scales[0])


def test_uncertainty_has_one_fixed_scale_and_is_explained(figure):
    assert {axes.images[0].get_clim() for axes in panels(figure, "uncertainty")} == {(0.0, 1.0)}
    grey = {axes.images[0].get_clim() for name in COLUMNS[:2] for axes in panels(figure, name)}
    assert len(grey) == 1
    assert [axes.get_xlabel() for axes in figure.axes if axes.get_xlabel()] == [
        "intensity",
        "0 sure, 1 undecided",
    ]
    texts = " ".join(" ".join(text.get_text().split()) for text in figure.texts)
    assert "1 - margin of the two likeliest classes" in texts
    assert "Not for diagnosis" in texts
    assert "a: slices of 8 mm, mask on slices of 2 mm" in texts
    assert legend(figure) == ["foreground"]


def test_a_small_mask_far_from_the_middle_is_enlarged_and_not_cut_off():
    thin = np.zeros((24, 20, 24))
    thin[21:23, 1:3, 22:24] = 1
    figure = segmentation_figure(item(thin, thin[..., 3::4]), FACTS)
    whole = panels(segmentation_figure(item(thin * 0, thin[..., 3::4] * 0), FACTS), COLUMNS[1])
    for axes, wide in zip(panels(figure, COLUMNS[1]), whole, strict=True):
        left, low, right, high = box(outline(axes))
        assert axes.get_xlim()[0] < left < right < axes.get_xlim()[1]
        assert axes.get_ylim()[0] < low < high < axes.get_ylim()[1]
        assert np.ptp(axes.get_xlim()) < 0.6 * np.ptp(wide.get_xlim())


def test_without_foreground_the_middle_is_shown_and_it_is_said():
    nothing = np.zeros((24, 20, 24))
    figure = segmentation_figure(item(nothing, nothing[..., ::4]), FACTS)
    assert row_names(figure) == ["coronal, j = 9", "sagittal, i = 11", "axial, k = 11"]
    for name in COLUMNS[:2]:
        first, *others = panels(figure, name)
        assert notes(first) == ["no foreground found"]
        assert not any(notes(axes) for axes in others)
        assert not any(axes.collections for axes in (first, *others))
    assert legend(figure) == ["foreground (not found)"]
    check_texts(figure)


def test_a_mask_on_thick_slices_alone_chooses_the_planes():
    figure = segmentation_figure(item(np.zeros((24, 20, 24))), FACTS)
    thick, thin, _ = (panels(figure, name) for name in COLUMNS)
    assert all(len(outline(axes)) for axes in thick)
    assert notes(thick[0]) == []
    assert notes(thin[0]) == ["no foreground found"]
    assert legend(figure) == ["foreground"]


def test_planes_go_through_the_largest_sections():
    thin = np.zeros((24, 20, 24))
    thin[8:16, 10, 5:9] = 1  # the largest section at j = 10
    thin[9, 8:13, 6] = 1
    figure = segmentation_figure(item(thin), FACTS)
    assert row_names(figure) == ["coronal, j = 10", "sagittal, i = 9", "axial, k = 6"]


def test_classes_have_colours_of_their_own_and_small_ones_are_not_hidden():
    thin = np.zeros((24, 20, 24))
    thin[2:20, 2:18, 2:20] = 1
    thin[12:15, 11:14, 8:12] = 2
    figure = segmentation_figure(item(thin, thin[..., 1::4], classes=3), FACTS)
    for name in COLUMNS[:2]:
        for axes in panels(figure, name):
            assert len(outline(axes, SKY_BLUE)) > len(outline(axes, ORANGE)) > 0
    # The large class surrounds the small one, whose outline is drawn last.
    axes = panels(figure, COLUMNS[1])[0]
    assert box(outline(axes, ORANGE)) == [12.0, 16.0, 15.0, 24.0]
    assert np.array_equal(axes.collections[-1].get_segments(), outline(axes, ORANGE))
    assert legend(figure) == ["class 1", "class 2", "class 3 (not found)"]
    colours = [line.get_color().lower() for line in figure.legends[0].get_lines()]
    assert colours[:2] == [SKY_BLUE, ORANGE]
    assert len(set(colours)) == 3


def test_classes_beyond_the_palette_share_a_colour_and_the_legend_says_so():
    figure = segmentation_figure(item(classes=9), FACTS)
    assert legend(figure)[:3] == [
        "class 1, class 8 (not found)",
        "class 2 (not found), class 9 (not found)",
        "class 3 (not found)",
    ]


@pytest.mark.parametrize("axis", [0, 1])
def test_the_axis_order_of_the_file_changes_nothing_but_the_names_of_the_planes(figure, axis):
    figures = [figure, segmentation_figure(item(axis=axis), FACTS)]
    assert (
        row_names(figures[1])
        == {
            0: ["axial, k = 11", "coronal, j = 8", "sagittal, i = 13"],
            1: ["axial, k = 11", "sagittal, i = 8", "coronal, j = 13"],
        }[axis]
    )
    assert row_names(figures[0]) == ["coronal, j = 11", "sagittal, i = 8", "axial, k = 13"]
    for name in COLUMNS:
        for first, second in zip(*(panels(figure, name) for figure in figures), strict=True):
            assert np.array_equal(first.images[0].get_array(), second.images[0].get_array())
            assert np.array_equal(outline(first), outline(second))
            assert first.get_xlim() == second.get_xlim()
            assert first.get_ylim() == second.get_ylim()


@pytest.mark.parametrize("classes", [1, 16])
def test_texts_of_a_segmentation_have_room(classes):
    check_texts(segmentation_figure({**item(classes=classes), "case": "a-long-name-of-a-case " * 6}, FACTS))


def test_volumes_on_other_grids_are_refused():
    for key in ("pred", "pred_thick", "uncertainty"):
        one = item()
        one[key] = one[key][:, 1:]
        with pytest.raises(DataError, match=f"'{key}' must be"):
            segmentation_figure(one, FACTS)
    one = item()
    one["uncertainty"] = one["uncertainty"] * float("nan")
    with pytest.raises(DataError, match="'uncertainty' holds NaN"):
        segmentation_figure(one, FACTS)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_planes_of_a_segmentation_stand_upright_too(axis):
    one = item(axis=axis)
    figure = segmentation_figure(one, FACTS)
    edges = {"sagittal": {"PS", "IA"}, "coronal": {"LS", "IR"}, "axial": {"LA", "PR"}}
    found = {
        name.partition(",")[0]: letters(axes)
        for name, axes in zip(row_names(figure), panels(figure, COLUMNS[0]), strict=True)
    }
    assert set(found) == set(edges)
    assert all(found[name] in edges[name] for name in found), found
    # The same file with its third axis pointing the other way: that direction alone is turned.
    for key in ("pred", "pred_thick", "uncertainty", "probability"):
        one[key].affine[:, 2] *= -1
    turned = segmentation_figure(one, FACTS)
    limits = [
        [(axes.get_xlim(), axes.get_ylim()) for axes in panels(each, COLUMNS[0])] for each in (figure, turned)
    ]
    changed = sum(
        a != b for before, after in zip(*limits, strict=True) for a, b in zip(before, after, strict=True)
    )
    assert changed == 2
