from __future__ import annotations

import pytest
import torch
from medsr.errors import DataError, SettingError
from medsr.metrics.stereo import disparity_error, row_disparity
from torch import Tensor

SPAN = (-6, 12)


def steps(shifts: tuple[int, int] = (2, 8), channels: int = 3) -> Tensor:
    """Texture in two bands of rows, each at a distance of its own."""
    texture = torch.rand(1, 48, 80, generator=torch.Generator().manual_seed(0))
    right = torch.cat(
        [part.roll(-shift, 2) for part, shift in zip(texture.chunk(2, 1), shifts, strict=True)], 1
    )
    return torch.cat([texture.expand(channels, -1, -1), right.expand(channels, -1, -1)])


@pytest.mark.parametrize("shifts", [(2, 8), (-4, 0)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_disparity_is_left_minus_right_column(shifts, channels):
    found, trusted = row_disparity(steps(shifts, channels), SPAN)
    assert found.shape == trusted.shape == (48, 80)
    for rows, shift in zip((slice(0, 19), slice(29, 48)), shifts, strict=True):
        kept = found[rows][trusted[rows]]
        assert len(kept) > 1000
        assert float((kept == shift).float().mean()) > 0.99


def test_what_the_other_view_does_not_show_is_not_trusted():
    _, trusted = row_disparity(steps((8, 8)), SPAN)
    assert float(trusted[:, :6].float().mean()) < 0.05
    assert float(trusted[:, 16:64].float().mean()) > 0.95


def test_flat_views_are_not_trusted():
    pair = torch.full((6, 20, 40), 0.5)
    truth = row_disparity(pair, SPAN)
    assert not truth[1].any()
    assert disparity_error(pair, truth, SPAN) is None


def test_the_error_is_the_distance_in_pixels_and_equal_errors_of_both_views_are_free():
    pair = steps()
    truth = row_disparity(pair, SPAN)
    assert disparity_error(pair, truth, SPAN) == 0
    assert disparity_error(0.5 * pair + 0.3, truth, SPAN) == 0
    moved = torch.cat([pair[:3], pair[3:].roll(-3, 2)])
    assert disparity_error(moved, truth, SPAN) == pytest.approx(3, abs=0.2)
    one_view = torch.cat([pair[:3], torch.rand(3, 48, 80)])
    assert disparity_error(one_view, truth, SPAN) > 2


def test_the_default_span_follows_the_width():
    found, _ = row_disparity(torch.rand(2, 10, 80))
    assert int(found.min()) >= -10
    assert int(found.max()) <= 20


def test_what_does_not_fit_is_refused():
    with pytest.raises(DataError, match="a pair is"):
        row_disparity(torch.rand(3, 8, 8))
    with pytest.raises(SettingError, match="span"):
        row_disparity(torch.rand(2, 8, 8), (3, 2))
    with pytest.raises(DataError, match="do not fit"):
        disparity_error(torch.rand(2, 8, 8), row_disparity(torch.rand(2, 8, 9)))
