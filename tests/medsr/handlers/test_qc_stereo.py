from __future__ import annotations

import pytest
import torch
from medsr.errors import DataError
from medsr.handlers.qc_stereo import superres_pair_figure
from medsr.transforms.bicubic import bicubic_resize
from monai.data import MetaTensor


def item(disparity: int = 6, channels: int = 3, scale: int = 2) -> dict:
    """One bright square with stripes, further to the left in the right view."""
    views = []
    for column in (40, 40 - disparity):
        view = torch.full((channels, 60, 72), 0.3)
        view[:, 30:40:2, column : column + 8] = 0.9
        views.append(view)
    image = MetaTensor(torch.cat(views), meta={"disparity_px": float(disparity)})
    pred = bicubic_resize(image.as_tensor(), (60 * scale, 72 * scale)).clamp(0, 1)
    return {"image": image, "pred": pred, "case": "frame-7"}


@pytest.mark.parametrize("channels", [1, 3])
def test_there_are_both_views_an_anaglyph_and_the_detail_of_both(channels):
    figure = superres_pair_figure(item(channels=channels), {"data_consistency_db": 41.0})
    assert [axes.get_title() for axes in figure.axes] == [
        "left, result x2",
        "right, result x2",
        "left in red, right in cyan",
        "left, input",
        "bicubic",
        "result x2",
        "right, input",
        "bicubic",
        "result x2",
    ]
    assert "41.0 dB" in figure.get_supxlabel()
    assert "frame-7" in figure.get_suptitle()


def test_a_known_uncertainty_is_shown_in_one_scale_for_both_views():
    made = item()
    made["uncertainty"] = torch.zeros(2, 120, 144)
    made["uncertainty"][0] += 0.01
    made["uncertainty"][1] += 0.03
    axes = superres_pair_figure(made, {}).axes
    assert [one.get_title() for one in axes[3:9]] == [
        "left, input",
        "result x2",
        "uncertainty",
        "right, input",
        "result x2",
        "uncertainty",
    ]
    left, right = axes[5].images[0], axes[8].images[0]
    assert left.get_clim() == right.get_clim() == pytest.approx((0, 0.03))
    assert left.get_array().max() == pytest.approx(0.01)
    assert right.get_array().min() == pytest.approx(0.03)
    assert len(axes) == 10


def test_the_details_show_the_same_thing_on_the_same_rows():
    figure = superres_pair_figure(item(), {})
    left, right = (figure.axes[number].images[0].get_array() for number in (3, 6))
    assert float(left.max()) > 0.85
    assert abs(left - right).max() < 1e-6
    first, second = (axes.patches[0] for axes in figure.axes[:2])
    assert first.get_y() == second.get_y()
    assert first.get_x() - second.get_x() == 2 * 6


def test_a_detail_stays_inside_the_view():
    figure = superres_pair_figure(item(disparity=40), {})
    second = figure.axes[1].patches[0]
    assert 0 <= second.get_x() <= 144 - second.get_width()


def test_the_anaglyph_has_no_colour_where_the_views_are_equal():
    made = item(disparity=0)
    shown = superres_pair_figure(made, {}).axes[2].images[0].get_array()
    assert abs(shown - shown[..., :1]).max() < 1e-6
    shown = superres_pair_figure(item(), {}).axes[2].images[0].get_array()
    assert abs(shown - shown[..., :1]).max() > 0.5


def test_what_is_no_pair_is_refused():
    with pytest.raises(DataError, match="no pairs"):
        superres_pair_figure({"image": torch.rand(3, 8, 8), "pred": torch.rand(3, 16, 16), "case": "a"}, {})
    with pytest.raises(DataError, match="does not belong"):
        superres_pair_figure({"image": torch.rand(6, 8, 8), "pred": torch.rand(6, 16, 17), "case": "a"}, {})


@pytest.mark.parametrize("size", [(3000, 2), (2, 3000)])
def test_the_page_of_a_strip_stays_a_page(size):
    low = torch.rand(6, *size)
    figure = superres_pair_figure({"image": low, "pred": low, "case": "strip"}, {})
    assert max(figure.get_size_inches()) < 25
