from __future__ import annotations

import pytest
import torch
from medsr.inferers.head_box import head_box


def in_air(value: float = 0.0) -> torch.Tensor:
    volume = torch.full((1, 1, 30, 40, 5), value)
    volume[0, 0, 4:13, 20:38, 1:3] = torch.rand(9, 18, 2) + value + 1
    return volume


@pytest.mark.parametrize("background", [0.0, -3.0])
def test_the_box_holds_the_head_whatever_the_air_is(background):
    assert head_box(in_air(background)) == (slice(4, 13), slice(20, 38))


def test_the_margin_ends_at_the_field_of_view():
    assert head_box(in_air(), margin=6) == (slice(0, 19), slice(14, 40))


def test_one_voxel_outside_is_kept():
    volume = in_air()
    volume[0, 0, 29, 0, 4] = 1
    assert head_box(volume) == (slice(4, 30), slice(0, 38))


def test_a_constant_volume_is_taken_whole():
    assert head_box(torch.ones(1, 1, 6, 7, 3)) == (slice(0, 6), slice(0, 7))
