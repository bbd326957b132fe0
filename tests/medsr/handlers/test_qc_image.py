from __future__ import annotations

import itertools

import pytest
import torch
from medsr.errors import DataError
from medsr.handlers.qc_image import superres_image_figure
from medsr.transforms.bicubic import bicubic_resize
from torch import Tensor


def item(channels: int = 3, scale: int = 4, **more: Tensor) -> dict:
    """Flat but for one bright square at rows 20 to 24, columns 30 to 34 of the input."""
    image = torch.full((channels, 40, 48), 0.3)
    image[:, 20:24, 30:34] = 0.9
    pred = bicubic_resize(image, (40 * scale, 48 * scale)).clamp(0, 1)
    return {"image": image, "pred": pred, "case": "left-eye", **more}


def titles(figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes[:4]]


@pytest.mark.parametrize("channels", [1, 3])
def test_panels_are_input_interpolation_result_and_what_was_added(channels):
    figure = superres_image_figure(item(channels), {})
    assert titles(figure) == ["input", "bicubic", "result x4", "change against bicubic"]
    shown = [axes.images[0].get_array() for axes in figure.axes[:4]]
    assert shown[0].shape[:2] == shown[2].shape[:2] == (160, 192)
    # The result is the interpolation here.
    assert float(shown[3].max()) < 1e-5


@pytest.mark.parametrize("top", [0.2, 0.187, 0.0123])
def test_the_numbers_of_the_scale_stand_apart(top, tmp_path):
    case = item()
    case["pred"] = case["pred"] + top * torch.linspace(0, 1, 192)
    figure = superres_image_figure(case, {})
    figure.savefig(tmp_path / "page.png")
    boxes = [label.get_window_extent() for label in figure.axes[-1].get_xticklabels() if label.get_text()]
    boxes = sorted((box for box in boxes if box.width), key=lambda box: box.x0)
    assert len(boxes) >= 2
    assert all(before.x1 + before.height / 2 < after.x0 for before, after in itertools.pairwise(boxes))


def test_the_uncertainty_takes_the_place_of_the_change():
    unsure = torch.full((1, 160, 192), 0.02)
    figure = superres_image_figure(item(uncertainty=unsure), {})
    assert titles(figure)[3] == "uncertainty"
    assert figure.axes[3].images[0].get_array().max() == pytest.approx(0.02)


def test_the_detail_shows_the_strongest_edges():
    figure = superres_image_figure(item(), {})
    detail = figure.axes[5].images[0].get_array()
    assert detail.shape[:2] == (96, 96)
    assert float(detail.max()) > 0.85
    (frame,) = figure.axes[0].patches
    assert frame.get_x() <= 30 * 4 < 34 * 4 <= frame.get_x() + frame.get_width()
    assert frame.get_y() <= 20 * 4 < 24 * 4 <= frame.get_y() + frame.get_height()


def test_many_faint_edges_win_over_a_single_strong_one():
    image = torch.full((3, 96, 96), 0.5)
    image[:, 4] = 1.0
    image[:, 50:90:2, 50:90] = 0.4
    figure = superres_image_figure({"image": image, "pred": image, "case": "a"}, {})
    (frame,) = figure.axes[0].patches
    assert frame.get_y() > 48
    assert frame.get_x() > 48


def test_large_images_are_drawn_with_the_pixels_that_can_be_seen():
    figure = superres_image_figure(
        {"image": torch.rand(3, 300, 400), "pred": torch.rand(3, 1200, 1600), "case": "a"}, {}
    )
    assert max(figure.axes[0].images[0].get_array().shape) <= 1000


def test_the_figure_says_how_well_the_result_agrees_and_what_it_is_not_for():
    figure = superres_image_figure(item(), {"data_consistency_db": 47.31})
    assert "47.3 dB" in figure.get_supxlabel()
    assert "Not for diagnosis" in figure.get_supxlabel()
    assert "left-eye" in figure.get_suptitle()
    assert "dB" not in superres_image_figure(item(), {"data_consistency_db": None}).get_supxlabel()


def test_a_result_of_another_image_is_refused():
    with pytest.raises(DataError, match="does not belong"):
        superres_image_figure(
            {"image": torch.rand(3, 10, 10), "pred": torch.rand(3, 40, 44), "case": "a"}, {}
        )


@pytest.mark.parametrize("size", [(5000, 3), (900, 1), (3, 5000), (1, 900), (1, 1)])
def test_the_page_of_a_strip_stays_a_page(size, tmp_path):
    low = torch.rand(3, *size)
    high = bicubic_resize(low, (2 * size[0], 2 * size[1])).clamp(0, 1)
    figure = superres_image_figure({"image": low, "pred": high, "case": "strip"}, {})
    assert max(figure.get_size_inches()) < 20
    figure.savefig(tmp_path / "strip.png", dpi=20)
