from __future__ import annotations

from typing import Any

import pytest
import torch
from medsr.errors import DataError
from medsr.handlers.qc_frame import area_shares, class_overlay, frame_figure, pair_figure
from torch import Tensor

NAMES = ["background", "shaft", "wrist"]


def mask(height: int = 40, width: int = 60) -> Tensor:
    """A shaft of 20 x 20 pixels that touches a wrist of 10 x 20."""
    found = torch.zeros(1, height, width, dtype=torch.uint8)
    found[:, 10:30, 10:30] = 1
    found[:, 10:30, 30:40] = 2
    return found


def item() -> dict[str, Any]:
    index = mask()
    probability = 0.1 + 0.7 * torch.nn.functional.one_hot(index[0].long(), 3).permute(2, 0, 1)
    return {"image": torch.full((3, 40, 60), 0.5), "pred": index, "probability": probability, "case": "pig-7"}


def pair() -> dict[str, Any]:
    image = torch.rand(6, 20, 30)
    superres = image.repeat_interleave(2, 1).repeat_interleave(2, 2)
    right = torch.where(mask() == 2, 0, mask())
    return {"image": image, "superres": superres, "seg_left": mask(), "seg_right": right, "case": "pig-7"}


def labels(figure: Any) -> list[str]:
    (legend,) = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    return [text.get_text() for text in legend.get_texts()]


def test_shares_are_those_of_the_pixels():
    assert area_shares(mask(), NAMES) == {"background": 0.75, "shaft": 0.166667, "wrist": 0.083333}
    assert area_shares(torch.zeros(1, 4, 4), dict.fromkeys(NAMES))["wrist"] == 0
    with pytest.raises(DataError, match="class 2, but only 2 have names"):
        area_shares(mask(), NAMES[:2])


@pytest.mark.parametrize("channels", [1, 3])
def test_an_overlay_leaves_the_background_and_outlines_each_class(channels):
    image = torch.rand(channels, 40, 60)
    found, index = class_overlay(image, mask()), mask()[0]
    assert torch.equal(found[:, index == 0], image.expand(3, -1, -1)[:, index == 0])
    outline = torch.stack([found[:, 10, 20], found[:, 20, 10], found[:, 20, 29]])  # above, left, at the wrist
    assert torch.allclose(outline, outline[:1].expand(3, -1))
    assert not torch.allclose(found[:, 20, 29], found[:, 20, 30])
    # Inside, the frame shows through.
    inside = (
        class_overlay(image, mask())[:, 20, 20] - class_overlay(torch.zeros(1, 40, 60), mask())[:, 20, 20]
    )
    assert torch.allclose(inside, 0.65 * image.expand(3, -1, -1)[:, 20, 20], atol=1e-6)


def test_an_outline_is_seen_in_large_frames_too():
    found = class_overlay(torch.zeros(3, 800, 1200), mask(800, 1200))
    row = found[2, 20, 10:20]
    assert (row == row[0]).sum() == 3
    assert row[5] < row[0]


def test_colours_of_a_class_do_not_depend_on_the_frame():
    alone = torch.where(mask() == 2, 2, 0)
    both = class_overlay(torch.zeros(3, 40, 60), mask())
    assert torch.equal(class_overlay(torch.zeros(3, 40, 60), alone)[:, 20, 35], both[:, 20, 35])
    # More classes than colours: they start again.
    many = class_overlay(torch.zeros(3, 40, 60), torch.where(mask() > 0, 7 + mask(), 0))
    assert torch.equal(many, both)


def test_a_frame_shows_input_classes_uncertainty_and_a_legend():
    figure = frame_figure(item(), {"network_size": [20, 30]}, classes=NAMES)
    assert [axes.get_title() for axes in figure.axes[:3]] == ["input", "classes", "uncertainty"]
    assert labels(figure) == ["shaft 16.7 %", "wrist 8.3 %"]
    assert "pig-7" in figure.get_suptitle()
    assert figure.get_supxlabel().startswith("segmented at 30 x 20; ")
    assert "Not for diagnosis" in figure.get_supxlabel()
    shown = figure.axes[2].images[0].get_array()
    assert float(shown.max()) == pytest.approx(0.3, abs=1e-5)


def test_a_pair_shows_both_views_with_the_shares_of_each():
    figure = pair_figure(pair(), {"data_consistency_db": 41.0}, classes=NAMES)
    assert [axes.get_title() for axes in figure.axes[:6]] == [
        *("left, input", "result x2", "classes"),
        *("right, input", "result x2", "classes"),
    ]
    assert labels(figure) == ["shaft 16.7 % / 16.7 %", "wrist 8.3 % / 0.0 %"]
    assert "41.0 dB" in figure.get_supxlabel()


def test_both_pages_can_be_drawn(tmp_path):
    many = dict.fromkeys([*NAMES, *(f"a class with a long name {k}" for k in range(8))])
    frame_figure(item(), {}, classes=many).savefig(tmp_path / "frame.png")
    pair_figure(pair(), {}, classes=NAMES).savefig(tmp_path / "pair.png")


def test_what_does_not_belong_together_is_refused():
    with pytest.raises(DataError, match="does not belong to a frame"):
        frame_figure({**item(), "pred": mask(41)}, {}, classes=NAMES)
    with pytest.raises(DataError, match="are no pairs"):
        pair_figure({**pair(), "superres": torch.rand(3, 40, 60)}, {}, classes=NAMES)
    with pytest.raises(DataError, match="does not belong to an input"):
        pair_figure({**pair(), "superres": torch.rand(6, 40, 61)}, {}, classes=NAMES)


@pytest.mark.parametrize("size", [(3000, 2), (2, 3000)])
def test_the_page_of_a_strip_stays_a_page(size):
    pair, mask = torch.rand(6, *size), torch.zeros(1, *size, dtype=torch.uint8)
    frame = {"image": pair[:3], "pred": mask, "probability": torch.full((2, *size), 0.5), "case": "strip"}
    both = {"image": pair, "superres": pair, "seg_left": mask, "seg_right": mask, "case": "strip"}
    for figure in (frame_figure(frame, {}, classes=["a", "b"]), pair_figure(both, {}, classes=["a", "b"])):
        assert max(figure.get_size_inches()) < 35
