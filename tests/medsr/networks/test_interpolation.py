from __future__ import annotations

import numpy as np
import pytest
import torch
from medsr.errors import SettingError
from medsr.networks.interpolation import BicubicUpsample, linear_subpixel_kernels
from medsr.resampling import antialiased_bicubic_matrix
from torch import Tensor
from torch.nn import functional as F

SIZES = [(1, 1), (1, 4), (2, 1), (3, 2), (9, 6)]


def by_matrices(image: Tensor, scale: int) -> Tensor:
    rows, columns = (torch.as_tensor(antialiased_bicubic_matrix(n, scale * n)) for n in image.shape[-2:])
    return rows @ image.double() @ columns.T


@pytest.mark.parametrize("scale", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_matrix_of_the_benchmarks_border_included(scale, size):
    image = torch.rand(2, 3, *size, dtype=torch.float64)
    found = BicubicUpsample(scale)(image)
    assert found.dtype == torch.float64
    assert torch.allclose(found, by_matrices(image, scale), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.uint8])
def test_the_result_is_float32_also_where_the_image_or_autocast_is_not(kind):
    image = (100 * torch.rand(1, 2, 7, 6)).to(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = BicubicUpsample(4).bfloat16()(image)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), by_matrices(image, 4), rtol=0, atol=1e-4)


def test_memory_with_the_channels_last_gives_the_same():
    image = torch.rand(2, 3, 7, 6)
    found = BicubicUpsample(3)(image.contiguous(memory_format=torch.channels_last))
    assert torch.equal(found, BicubicUpsample(3)(image))


@pytest.mark.parametrize("scale", range(2, 10))
def test_the_halo_is_as_wide_as_the_weights_reach(scale):
    size, first = 41, 20
    matrix = antialiased_bicubic_matrix(size, scale * size)
    for radius in range(21):
        seen = matrix[scale * first - radius : scale * (first + 1) + radius]
        touched = np.flatnonzero((np.abs(seen) > 1e-12).any(axis=0))
        halo = BicubicUpsample(scale).halo(radius)
        assert (touched[0], touched[-1]) == (first - halo, first + halo), radius


def test_gradients_reach_every_pixel():
    image = torch.rand(1, 1, 3, 4, requires_grad=True)
    BicubicUpsample(3)(image).sum().backward()
    # Weights sum to one for every new pixel; mirrored edges give back what they take.
    assert torch.allclose(image.grad, torch.full((1, 1, 3, 4), 9.0), atol=1e-5)


def test_nothing_is_saved_with_the_weights():
    assert BicubicUpsample(2).state_dict() == {}


@pytest.mark.parametrize("scale", [1, 0, -2, 2.5])
def test_another_scale_is_refused(scale):
    with pytest.raises(SettingError, match=rf"scale must be a whole number >= 2, got {scale}$"):
        BicubicUpsample(scale)


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 5])
def test_a_subpixel_convolution_with_linear_kernels_interpolates(scale):
    image = torch.rand(1, 1, 6, 5)
    shuffled = F.pixel_shuffle(F.conv2d(image, linear_subpixel_kernels(scale)[:, None], padding=1), scale)
    wanted = F.interpolate(image, scale_factor=scale, mode="bilinear", align_corners=False)
    inside = (..., slice(scale, -scale), slice(scale, -scale))
    assert torch.allclose(shuffled[inside], wanted[inside], atol=1e-6)
