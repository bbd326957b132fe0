from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from medsr.errors import GeometryError, SettingError
from medsr.geometry import rescaled_size, slice_positions
from medsr.networks import thick_segmentation
from medsr.networks.thick_segmentation import ThickSegmentation, ThickSegmentationNet, plan_unet
from medsr.resampling import interpolation_matrix
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def fresh(**settings: Any) -> ThickSegmentationNet:
    torch.manual_seed(0)
    return ThickSegmentationNet(**{"patch_size": (32, 32, 8), "width": 4, **settings}).eval()


def tiny(**settings: Any) -> ThickSegmentationNet:
    """A network whose thin head no longer starts."""
    network = fresh(**settings)
    nn.init.normal_(network.thin_head[-1].weight, std=0.1)
    return network


class Nothing(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return torch.zeros_like(features)


def stack(depth: int = 6, size: tuple[int, int] = (32, 32), *, batch: int = 1) -> Tensor:
    return torch.randn(batch, 1, *size, depth, generator=torch.Generator().manual_seed(2))


# --- the plan -----------------------------------------------------------------------------------------------------

spacings = st.tuples(*[st.floats(0.3, 8.0)] * 3)
patches = st.tuples(*[st.sampled_from([8, 16, 32, 64, 96, 128])] * 3)


def test_thick_slices_are_not_merged_before_the_pixels_are_as_large():
    plan = plan_unet((1, 1, 4), (96, 96, 16))
    assert plan.strides == ((1, 1, 1), (2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2))
    assert plan.kernels == ((3, 3, 1), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
    assert plan.size_multiple == (16, 16, 4)


def test_an_isotropic_volume_is_halved_along_all_axes():
    plan = plan_unet((1, 1, 1), (64, 64, 64))
    assert plan.strides == ((1, 1, 1), *[(2, 2, 2)] * 4)
    assert set(plan.kernels) == {(3, 3, 3)}


def test_very_thick_slices_are_convolved_in_the_plane_for_several_stages():
    plan = plan_unet((0.5, 0.5, 6), (128, 128, 8))
    assert [kernel[2] for kernel in plan.kernels] == [1, 1, 1, 3, 3, 3]


def test_few_slices_do_not_keep_the_plane_from_being_halved():
    # Eight slices are halved once; from then on the plane alone decides what is fine.
    plan = plan_unet((1, 1, 1), (128, 128, 8))
    assert plan.strides == ((1, 1, 1), (2, 2, 2), *[(2, 2, 1)] * 4)
    # Once an axis is convolved it stays so, though the plane is 16 times coarser than the slices in the end.
    assert set(plan.kernels) == {(3, 3, 3)}


@given(spacing=spacings, patch=patches, stages=st.integers(1, 8))
def test_a_plan_keeps_its_rules(spacing, patch, stages):
    plan = plan_unet(spacing, patch, max_stages=stages)
    assert 1 <= len(plan.strides) == len(plan.kernels) <= stages
    assert plan.strides[0] == (1, 1, 1)
    # No stage repeats the resolution of the last one.
    assert all(2 in stride and set(stride) <= {1, 2} for stride in plan.strides[1:])
    bottom = np.array(patch) / plan.size_multiple
    assert (bottom == bottom.astype(int)).all()
    assert (bottom >= 4).all()
    kernels = np.array(plan.kernels)
    assert set(kernels.ravel().tolist()) <= {1, 3}
    assert (np.diff(kernels, axis=0) >= 0).all()
    assert (kernels[0] == np.where(np.array(spacing) <= 2 * min(spacing), 3, 1)).all()


@given(spacing=spacings, patch=patches, order=st.permutations(range(3)))
def test_a_plan_follows_the_axes(spacing, patch, order):
    plan = plan_unet(spacing, patch)
    turned = plan_unet([spacing[i] for i in order], [patch[i] for i in order])
    for before, after in zip((*plan.kernels, *plan.strides), (*turned.kernels, *turned.strides), strict=True):
        assert after == tuple(before[i] for i in order)


def test_a_patch_that_leaves_a_remainder_is_refused_with_one_that_does_not():
    with pytest.raises(SettingError, match=r"\(100, 96, 18\).* use \(112, 96, 20\)"):
        plan_unet((1, 1, 4), (100, 96, 18))
    assert plan_unet((1, 1, 4), (112, 96, 20)).size_multiple == (16, 16, 4)


@pytest.mark.parametrize(
    ("spacing", "patch", "name"),
    [
        ((1, 1), (32, 32, 8), "spacing_mm"),
        ((1, 1, 0), (32, 32, 8), "spacing_mm"),
        ((1, 1, float("nan")), (32, 32, 8), "spacing_mm"),
        ((1, 1, 4), (32, 32), "patch_size"),
        ((1, 1, 4), (32, 32, 0), "patch_size"),
        ((1, 1, 4), (32.5, 32, 8), "patch_size"),
    ],
)
def test_what_cannot_be_planned_is_named(spacing, patch, name):
    with pytest.raises(SettingError, match=name) as error:
        plan_unet(spacing, patch)
    assert "\n" not in str(error.value)


# --- the network --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1.0, 2, 3.333, 3.5, 4])
@pytest.mark.parametrize(("size", "depth"), [((32, 32), 8), ((13, 37), 5), ((1, 8), 1)])
@torch.inference_mode()
def test_both_grids_cover_the_field_of_view(ratio, size, depth):
    network = tiny(classes=3)
    found = network(stack(depth, size, batch=2), ratio, complete=True)
    assert isinstance(found, ThickSegmentation)
    assert found.thick.shape == (2, 3, *size, depth)
    assert found.thin.shape == (2, 3, *size, rescaled_size(depth, ratio))
    half = [-(-n // 2) for n in size]
    assert found.feature.shape == (2, network.feature_channels, *half, depth)
    assert all(one.isfinite().all() for one in found)


@torch.inference_mode()
def test_one_call_gives_the_same_as_its_steps():
    network, image = tiny(), stack(7, (30, 33))
    complete, features = network(image, 2.5, complete=True), network.features(image)
    assert features.shape == (1, 4, 30, 33, 7)
    assert torch.equal(complete.thin, network(image, 2.5))
    assert torch.equal(complete.thin, network.read_thin(features, 2.5))
    assert torch.equal(complete.thick, network.read_thick(features))


@torch.inference_mode()
def test_thin_logits_that_nobody_wants_are_left_out_and_the_rest_stays():
    network, image = tiny(), stack(5)
    whole, part = network(image, complete=True), network(image, complete=True, thin=False)
    assert part.thin is None
    assert torch.equal(part.thick, whole.thick)
    assert torch.equal(part.feature, whole.feature)


@torch.inference_mode()
def test_the_stage_1_feature_is_the_encoder_s_first_coarse_one():
    network, image = tiny(), stack(4)
    assert network.size_multiple == (8, 8, 2)
    feature = network(image, complete=True).feature
    assert torch.equal(feature, network.downsamples[0](network.input_block(image)))
    # An isotropic plan halves the slices as well.
    isotropic = tiny(spacing_mm=(1, 1, 1), patch_size=(32, 32, 32))
    assert isotropic(stack(7), complete=True).feature.shape == (1, 8, 16, 16, 4)


@torch.inference_mode()
def test_padding_replicates_the_far_ends():
    network, image = tiny(), stack(5, (30, 32))
    padded = torch.cat([image, *[image[:, :, -1:]] * 2], dim=2)
    padded = torch.cat([padded, padded[..., -1:]], dim=4)
    assert torch.equal(network.features(image), network.features(padded)[:, :, :30, :, :5])


def test_the_default_scale_is_the_network_s_own():
    assert tiny(scale=2.5)(stack(4)).shape[-1] == 10


@pytest.mark.parametrize("ratio", [2, 3.5, 4])
@torch.inference_mode()
def test_a_feature_is_read_exactly_where_a_thin_slice_lies(ratio):
    network = tiny()
    network.thick_head, network.thin_head = nn.Identity(), Nothing()
    ramp = torch.arange(7.0).expand(1, 4, 3, 2, 7)
    expected = slice_positions(7, rescaled_size(7, ratio), ratio).clip(0, 6)
    found = network.read_thin(ramp, ratio)
    assert np.allclose(found[0, 1, 2, 0].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("ratio", [2, 3.5, 4])
@torch.inference_mode()
def test_a_fresh_thin_head_interpolates_the_logits_of_the_thick_one(ratio):
    found = fresh()(stack(7), ratio, complete=True)
    matrix = interpolation_matrix(7, slice_positions(7, rescaled_size(7, ratio), ratio), kind="linear")
    expected = found.thick @ torch.as_tensor(matrix, dtype=torch.float32).T
    assert torch.allclose(found.thin, expected, atol=1e-5)


@pytest.mark.parametrize("ratio", [2, 3.5, 4])
@torch.inference_mode()
def test_slices_that_are_all_the_same_stay_so_away_from_the_ends(ratio):
    # Without strides along the slices, 8 of them and the thin head are in sight on either side.
    network = tiny(max_stages=3)
    assert network.size_multiple == (4, 4, 1)
    image = stack(1).expand(-1, -1, -1, -1, 30)
    found = network(image, ratio, complete=True)
    inner = found.thick[..., 8:-8]
    assert torch.allclose(inner, inner[..., :1].expand_as(inner), atol=1e-5)
    reach = round(9 * ratio) + network.thin_halo
    inner = found.thin[..., reach:-reach]
    assert inner.shape[-1] >= 15
    assert torch.allclose(inner, inner[..., :1].expand_as(inner), atol=1e-5)
    assert float(inner.std()) > 0.1
    assert not torch.allclose(found.thin, inner[..., :1].expand_as(found.thin), atol=1e-3)


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("voxels", [1, 32 * 32 * 5, 10**9])
def test_chunks_of_thin_slices_equal_the_whole(monkeypatch, kernel, voxels):
    network, image = tiny(thin_kernel=kernel), stack(6)
    whole = network(image, 3.5)
    assert whole.requires_grad
    monkeypatch.setattr(thick_segmentation, "_VOXELS_AT_ONCE", voxels)
    calls = []
    network.thin_head.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        chunked = network(image, 3.5)
    assert len(calls) == {1: 21, 32 * 32 * 5: 5}.get(voxels, 1)
    assert torch.allclose(chunked, whole.detach(), atol=1e-5)


@torch.inference_mode()
def test_positions_choose_among_the_slices_of_the_whole_result():
    network, image = tiny(), stack(8)
    positions = slice_positions(8, 20, 2.5)
    part, whole = network(image, positions=positions[4:17]), network(image, 2.5)
    inner = slice(network.thin_halo, -network.thin_halo)
    assert part.shape[-1] == 13
    assert torch.allclose(part[..., inner], whole[..., 4:17][..., inner], atol=1e-5)


@torch.inference_mode()
def test_the_thick_head_may_be_read_before_or_after_blending():
    network = tiny(classes=3)
    first, second = (torch.randn(1, 4, 9, 8, 5) for _ in range(2))
    blended = network.read_thick(0.3 * first + 0.7 * second)
    expected = 0.3 * network.read_thick(first) + 0.7 * network.read_thick(second)
    assert torch.allclose(blended, expected, atol=1e-5)


def test_gradients_reach_every_parameter():
    network = tiny(classes=3).train()
    found = network(stack(5, (30, 32)), 3.5, complete=True)
    (found.thick.square().mean() + found.thin.square().mean()).backward()
    silent = [k for k, p in network.named_parameters() if p.grad is None or not float(p.grad.abs().max()) > 0]
    assert silent == []


def test_every_weight_is_stored_once():
    network = tiny()
    parameters = dict(network.named_parameters())
    assert set(network.state_dict()) == set(parameters)
    assert len({p.data_ptr() for p in parameters.values()}) == len(parameters)


@torch.inference_mode()
def test_bfloat16_changes_little():
    network, image = tiny(width=8), stack(8)
    exact = network(image, complete=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = network(image, complete=True)
        assert network.features(image).dtype == torch.float32
    for one, other in zip(exact, fast, strict=True):
        assert float((one - other.float()).abs().mean()) < 0.02 * float(one.std())


@pytest.mark.parametrize(
    ("settings", "expected"), [({}, 5466), ({"width": 32}, 17_842), ({"thin_kernel": 3}, 3898)]
)
def test_the_thin_head_has_the_published_size_at_the_published_width(settings, expected):
    with torch.device("meta"):
        network = ThickSegmentationNet(**settings)
    assert sum(p.numel() for p in network.thin_head.parameters()) == expected


def test_a_volume_of_the_default_network_needs_less_than_400_giga_multiplications():
    network, small = ThickSegmentationNet(), torch.zeros(1, 1, 32, 32, 8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(small, complete=True)
    per_voxel = counter.get_total_flops() / 2 / small.numel()
    assert 100e9 < per_voxel * 240 * 240 * 40 < 400e9
    assert sum(p.numel() for p in network.parameters()) < 5e6


def test_weights_and_results_are_those_of_the_last_release(golden):
    network = tiny(classes=3)
    names = "\n".join(f"{key} {tuple(value.shape)}" for key, value in network.state_dict().items())
    with torch.inference_mode():
        found = network(stack(5, (30, 33)), 3.5, complete=True)
    statistics: dict[str, Any] = {
        "tensors": hashlib.sha256(names.encode()).hexdigest(),
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    for name, values in found._asdict().items():
        exact = values.double()
        statistics |= {
            f"{name}_mean": [float(v) for v in exact.mean(dim=(0, 2, 3, 4))],
            f"{name}_std": [float(v) for v in exact.std(dim=(0, 2, 3, 4))],
            f"{name}_ends": [float(exact[..., 0].mean()), float(exact[..., -1].mean())],
            f"{name}_corner": float(exact[0, 0, 0, 0, 0]),
            f"{name}_centre": float(exact[0, 1, 7, 9, 2]),
            f"{name}_roughness": float(exact.diff(dim=-1).abs().mean()),
        }
    expected = golden("thick_segmentation", statistics)
    assert set(statistics) == set(expected)
    assert statistics["tensors"] == expected["tensors"], "released weights would no longer load"
    assert statistics["parameters"] == expected["parameters"]
    for key in sorted(set(statistics) - {"tensors", "parameters"}):
        # Kernels differ between machines in the last bits of a float32.
        assert statistics[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-4), key


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"classes": 1}, "classes >= 2.* got 1, "),
        ({"width": 1}, "width >= 2.* 1, "),
        ({"width": "x"}, "width must be a whole number, got 'x'"),
        ({"thin_kernel": 4}, "odd thin_kernel.* 4$"),
        ({"thin_channels": 0}, "thin_channels >= 1.* 0, "),
        ({"patch_size": (8, 8, 4)}, r"\(8, 8, 4\).* 2 stages of at least 3"),
        ({"max_stages": 2}, "max_stages 2 gives 2 stages"),
    ],
)
def test_settings_out_of_range_are_named(settings, word):
    with pytest.raises(SettingError, match=word) as error:
        tiny(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_ratio_that_is_none_is_refused(scale):
    with pytest.raises(GeometryError, match="ratio > 0"):
        tiny()(stack(), scale)
