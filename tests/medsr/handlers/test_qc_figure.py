from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from medsr.errors import DataError, SettingError
from medsr.handlers import draw_qc
from medsr.phantoms import head

ALL = ("input slices", "cubic", "super-resolved", "uncertainty", "reference", "absolute error")


@pytest.fixture(scope="module")
def volumes() -> dict[str, np.ndarray]:
    from scipy.ndimage import gaussian_filter

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
    drawn(figure)
    texts = [*figure.texts]
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
