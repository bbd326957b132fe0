from __future__ import annotations

import pytest
import torch
from medsr.networks.blocks import convolve_exactly, without_autocast
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
