from __future__ import annotations

import pytest
import torch
from medsr.errors import SettingError
from medsr.networks.blocks import border_sides, channel_means, convolve_exactly, without_autocast
from torch import nn


def test_autocast_is_off_inside_and_as_it_was_behind():
    x = torch.zeros(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with without_autocast(x):
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("kernel", [3, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_last_convolution_is_not_rounded(dtype, kernel):
    torch.manual_seed(0)
    conv, features = nn.Conv2d(4, 3, kernel, padding=kernel // 2), torch.randn(2, 4, 12, 10).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = convolve_exactly(conv, features)
    expected = conv.double()(features.double())
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.allclose(found.double(), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_channel_means_are_not_rounded(dtype):
    x = torch.rand(2, 3, 40, 30).to(dtype)
    found = channel_means(x)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.allclose(found.double(), x.double().mean((2, 3)), atol=1e-6)


def test_a_border_is_one_number_or_four_and_leaves_pixels():
    assert border_sides(1, (3, 4)) == (1, 1, 1, 1)
    assert border_sides((0, 2, 1, 2), (3, 4)) == (0, 2, 1, 2)
    for border in (2, -1, (1, 1), (0, 3, 0, 0), (0, 0, 2, 2)):
        with pytest.raises(SettingError, match="leave pixels of 3 x 4"):
            border_sides(border, (3, 4))
