from __future__ import annotations

import pytest
import torch
from medsr.networks.blocks import ResidualBlocks
from medsr.networks.int8 import Int8ResidualBlocks, native_int8
from medsr.networks.plane_prior import PlanePrior
from torch import Tensor, nn

needs_int8 = pytest.mark.skipif(not native_int8("cpu"), reason="the processor has no 8 bit products")


def blocks(count: int = 3, hidden: int = 12, *, seed: int = 0) -> ResidualBlocks:
    torch.manual_seed(seed)
    return ResidualBlocks(
        nn.Sequential(nn.Conv2d(8, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, 8, 3, padding=1))
        for _ in range(count)
    )


def features(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(*(size or (2, 8, 11, 7)), generator=torch.Generator().manual_seed(seed))


def deviation(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).square().mean().sqrt() / exact.std())


@needs_int8
@pytest.mark.parametrize("size", [(2, 8, 11, 7), (1, 8, 1, 1), (3, 8, 40, 5)])
@torch.inference_mode()
def test_eight_bits_change_little_and_at_the_border_no_more_than_inside(size):
    exact, image = blocks(), features(*size)
    fast = Int8ResidualBlocks(exact, [image])
    assert fast(image).dtype == torch.float32
    expected = exact(image)
    assert 0 < deviation(fast(image), expected) < 0.02
    border = torch.ones(size[-2:], dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert deviation(fast(image)[..., border], expected[..., border]) < 0.02


@needs_int8
@torch.inference_mode()
def test_the_sums_over_the_blocks_are_not_rounded():
    """Twenty blocks that add nothing leave every bit."""
    exact = blocks(20)
    for block in exact:
        nn.init.zeros_(block[2].weight)
        nn.init.zeros_(block[2].bias)
    image = features()
    before = image.clone()
    assert torch.equal(Int8ResidualBlocks(exact, [image])(image), image)
    assert torch.equal(image, before)


@needs_int8
@torch.inference_mode()
def test_what_lies_beyond_the_examples_is_cut_off_and_does_not_wrap_around():
    exact = blocks(1)
    fast = Int8ResidualBlocks(exact, [features()])
    levels = fast._pairs[0][0]
    reach = [(level - levels.zero) * levels.scale for level in (0, 255)]
    far = 100 * features()
    added = [fast(image) - image for image in (far, far.clamp(*reach))]
    torch.testing.assert_close(added[0], added[1], atol=1e-4, rtol=1e-4)


@needs_int8
@torch.inference_mode()
def test_more_examples_widen_the_range():
    exact, image = blocks(), features()
    narrow = Int8ResidualBlocks(exact, [0.1 * image])
    wide = Int8ResidualBlocks(exact, [0.1 * image, image])
    assert deviation(narrow(image), exact(image)) > 3 * deviation(wide(image), exact(image))


@needs_int8
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
@torch.inference_mode()
def test_constant_features_and_silent_channels_are_no_trouble(value):
    exact = blocks()
    nn.init.zeros_(exact[1][0].weight[3:5])
    nn.init.zeros_(exact[2][2].weight)
    image = torch.full((1, 8, 6, 6), value)
    torch.testing.assert_close(Int8ResidualBlocks(exact, [image])(image), exact(image), atol=0.05, rtol=0.02)


@needs_int8
@torch.inference_mode()
def test_the_order_in_memory_and_the_precision_of_the_input_change_nothing():
    exact, image = blocks(), features().half().float()
    fast = Int8ResidualBlocks(exact, [image])
    for other in (image.to(memory_format=torch.channels_last), image.half(), image[:, :, :, :]):
        torch.testing.assert_close(fast(other), fast(image))
    torch.testing.assert_close(fast(image)[1:], fast(image[1:]))


@needs_int8
def test_features_that_are_not_finite_make_no_range():
    with pytest.raises(ValueError, match="not finite"):
        Int8ResidualBlocks(blocks(), [features() / 0])


def test_a_gpu_is_not_asked():
    assert not native_int8("cuda")


@pytest.mark.skipif(
    not hasattr(torch.ops.onednn, "qconv2d_pointwise"), reason="this PyTorch was built without the operators"
)
@pytest.mark.parametrize("name", ["avx512_vnni", "avx_vnni", "amx_int8"])
def test_a_processor_needs_one_of_three_extensions(name, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, name: True}, raising=False)
    assert native_int8("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, name: False})
    assert not native_int8("cpu")


@needs_int8
@torch.inference_mode()
def test_planes_are_read_alike_and_everything_but_the_blocks_is_shared():
    torch.manual_seed(0)
    prior = PlanePrior(channels=8, hidden=[16, 16], basis=6)
    for parameter in prior.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    image = torch.rand(3, 1, 17, 6)
    fast = prior.in_int8([(image, 2.5, 0.9)])
    exact, found = (run(image, 2.5, 0.9) for run in (prior, fast))
    assert not torch.equal(found, exact)
    assert deviation(found, exact) < 0.02
    assert fast.head is prior.head
    assert fast.to_basis is prior.to_basis
    assert isinstance(prior.blocks, ResidualBlocks)
