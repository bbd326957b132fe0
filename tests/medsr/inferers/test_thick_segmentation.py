from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from medsr.errors import DataError, SettingError
from medsr.geometry import rescaled_size, slice_positions
from medsr.inferers.thick_segmentation import ThickSegmentationInferer
from medsr.networks.thick_segmentation import ThickSegmentationNet
from medsr.resampling import interpolation_matrix
from monai.data import MetaTensor
from torch import Tensor, nn

AXES = [axes for count in range(4) for axes in combinations((-3, -2, -1), count)]


class Echo(nn.Module):
    """Its feature is the image; the logit of class 1 is the feature there, that of class 0 is zero."""

    patch_size = (16, 12, 8)
    spacing_mm = (1.0, 1.0, 4.0)

    def __init__(self) -> None:
        super().__init__()
        self.windows: list[tuple[int, ...]] = []
        self.autocast: list[bool] = []

    def features(self, image: Tensor) -> Tensor:
        self.windows.append(tuple(image.shape))
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        return image.clone()

    def read_thick(self, features: Tensor) -> Tensor:
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        return torch.cat([torch.zeros_like(features), features], dim=1)

    def read_thin(self, features: Tensor, scale: float) -> Tensor:
        depth = features.shape[-1]
        positions = slice_positions(depth, rescaled_size(depth, scale), scale)
        matrix = torch.as_tensor(interpolation_matrix(depth, positions, kind="linear"), dtype=torch.float32)
        return self.read_thick(features @ matrix.T)


class Constant(Echo):
    """Whatever it sees, its feature is the same: only blending could make a difference."""

    def features(self, image: Tensor) -> Tensor:
        return torch.full_like(image, 0.7)


def volume(depth: int = 9, size: tuple[int, int] = (27, 20), *, slice_mm: float = 4.0) -> MetaTensor:
    values = torch.randn(1, 1, *size, depth, generator=torch.Generator().manual_seed(0))
    return scan(values, slice_mm=slice_mm)


def scan(values: Tensor, *, slice_mm: float = 4.0) -> MetaTensor:
    # A batch of a loader holds its affine with a batch axis.
    affine = torch.diag(torch.tensor([1.0, 1.0, slice_mm, 1.0], dtype=torch.float64))[None]
    return MetaTensor(values, affine=affine)


def inferer(**settings: Any) -> ThickSegmentationInferer:
    return ThickSegmentationInferer(**{"amp": "float32", **settings})


def trained(**settings: Any) -> ThickSegmentationNet:
    torch.manual_seed(0)
    return ThickSegmentationNet(**{"patch_size": (32, 32, 8), "width": 4, "classes": 3, **settings})


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("slice_mm", [1.0, 3.5, 4.0])
@pytest.mark.parametrize("depth", [1, 3, 7, 41])
def test_every_slice_of_both_grids_is_at_its_place(depth, slice_mm, mirror):
    run, network = inferer(mirror=mirror), Echo()
    index = torch.arange(float(depth)).expand(1, 1, 21, 17, depth) / 8
    thin = run(scan(index.clone(), slice_mm=slice_mm), network)
    new_depth = rescaled_size(depth, slice_mm)
    assert thin.shape == (1, 2, 21, 17, new_depth)
    assert run.thick.shape == (1, 2, 21, 17, depth)
    positions = torch.as_tensor(slice_positions(depth, new_depth, slice_mm)).clip(0, depth - 1) / 8
    assert torch.allclose(run.thick[:, 1].logit(), index[:, 0], atol=1e-3)
    assert torch.allclose(thin[0, 1].logit(), positions.float().expand(21, 17, -1), atol=1e-3)


def test_the_number_of_thin_slices_is_the_rounded_one():
    assert inferer()(volume(11, slice_mm=3.5), Echo()).shape[-1] == 39
    assert inferer(spacing_mm=2.0)(volume(11), Echo()).shape[-1] == 22


@pytest.mark.parametrize("slice_mm", [2.0, 3.5])
def test_one_window_over_the_whole_volume_is_the_network_itself(slice_mm):
    network, run, image = trained(), inferer(), volume(6, (29, 32), slice_mm=slice_mm)
    thin = run(image, network)
    with torch.inference_mode():
        expected = network(image.as_tensor(), slice_mm, complete=True)
    assert torch.allclose(thin, expected.thin.softmax(1), atol=1e-5)
    assert torch.allclose(run.thick, expected.thick.softmax(1), atol=1e-5)


def test_the_middle_of_a_window_counts_more_than_its_ends():
    class Numbered(Echo):
        def features(self, image: Tensor) -> Tensor:
            return torch.full_like(super().features(image), len(self.windows))

    run = inferer(overlap=0.5)
    run(volume(12, (16, 12)), Numbered())
    # Windows one and two share four slices.
    found = run.thick[0, 1, 8, 6].logit() - 1
    assert torch.allclose(found[[0, 1, 2, 3, 8, 9, 10, 11]], torch.tensor([0.0] * 4 + [1.0] * 4), atol=1e-4)
    assert bool((found[3:9].diff() > 0.001).all())


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("mirror", [False, True])
def test_constant_features_show_no_seams(overlap, mirror):
    run = inferer(overlap=overlap, mirror=mirror)
    thin = run(volume(19, (41, 33)), Constant())
    expected = torch.tensor(0.7).sigmoid()
    assert torch.allclose(thin[:, 1], expected, atol=1e-6)
    assert torch.allclose(run.thick[:, 1], expected, atol=1e-6)


def test_windows_are_the_training_patch_or_as_large_as_the_volume():
    network = Echo()
    inferer()(volume(19, (41, 10)), network)
    assert set(network.windows) == {(1, 1, 16, 10, 8)}
    network = Echo()
    inferer(patch_size=(20, 8, 30), batch=2)(volume(19, (41, 10)), network)
    # Ten is a quarter longer than eight: one window saves two.
    assert {shape[2:] for shape in network.windows} == {(20, 10, 19)}
    assert max(shape[0] for shape in network.windows) == 2


@pytest.mark.parametrize("mirror", [False, True])
def test_around_the_head_everything_is_background_and_nothing_is_computed(mirror):
    head = (slice(None), slice(None), slice(7, 20), slice(9, 19))
    values = torch.zeros(1, 1, 40, 30, 8)
    values[head] = volume(8, (13, 10)).as_tensor().abs() + 0.5
    network, run = Echo(), inferer(mirror=mirror)
    thin = run(scan(values), network)
    assert {shape[2:] for shape in network.windows} == {(13, 10, 8)}
    for found in (thin, run.thick):
        outside = torch.ones(40, 30, dtype=torch.bool)
        outside[head[2:]] = False
        assert torch.equal(found[0, 0][outside], torch.ones_like(found[0, 0][outside]))
        assert torch.allclose(found.sum(1), torch.tensor(1.0), atol=1e-6)
    assert torch.allclose(run.thick[head][:, 1].logit(), values[head][:, 0], atol=1e-4)


def test_windows_blend_into_probabilities_of_the_whole_volume():
    network, run = trained(), inferer(overlap=0.5)
    thin = run(volume(13, (50, 41)), network)
    for found in (thin, run.thick):
        assert torch.allclose(found.sum(1), torch.tensor(1.0), atol=1e-5)
        assert float(found.min()) >= 0
    assert thin.shape[-1] == 52


def test_mirroring_averages_the_probabilities_of_all_flips():
    network, image = trained(), volume(6, (32, 24), slice_mm=3.5)
    run = inferer(mirror=True)
    found = run(image, network)
    once = inferer()
    parts = [once(scan(image.as_tensor().flip(axes), slice_mm=3.5), network).flip(axes) for axes in AXES]
    assert torch.allclose(found, torch.stack(parts).mean(0), atol=1e-5)
    assert not torch.allclose(found, parts[0], atol=1e-3)
    thick = run.thick
    mirrored = run(scan(image.as_tensor().flip(-1), slice_mm=3.5), network)
    assert torch.allclose(mirrored.flip(-1), found, atol=1e-5)
    assert torch.allclose(run.thick.flip(-1), thick, atol=1e-5)


def test_bfloat16_is_for_the_features_alone():
    run, network = ThickSegmentationInferer(amp="bfloat16", patch_size=(64, 64, 64)), Echo()
    found = run(volume(), network)
    assert run.facts["convolutions"] == "bfloat16"
    # The trial in both precisions, the features, the two heads.
    assert network.autocast == [False, True, True, False, False]
    assert found.dtype == run.thick.dtype == torch.float32


def test_rounding_to_bfloat16_is_no_difference():
    run, image = ThickSegmentationInferer(amp="bfloat16"), volume(8, (32, 32))
    found, exact = run(image, trained()), inferer()(image, trained())
    assert run.facts["convolutions"] == "bfloat16"
    assert 0 < float((found - exact).abs().mean()) < 0.01


def test_bfloat16_that_differs_is_not_used(caplog):
    class Coarse(Echo):
        def features(self, image: Tensor) -> Tensor:
            return image.round() if torch.is_autocast_enabled("cpu") else image.clone()

    run, network = ThickSegmentationInferer(amp="bfloat16"), Coarse()
    found = run(volume(), network)
    assert run.facts["convolutions"] == "float32"
    assert "using float32" in caplog.text
    assert torch.equal(found, inferer()(volume(), Echo()))


def test_the_facts_are_those_of_the_last_volume():
    run = inferer()
    run(volume(2, slice_mm=3.333), Echo())
    assert run.facts["ratio"] == 3.333
    assert "only 2 slices" in run.facts["warnings"][0]
    run(volume(), Echo())
    assert run.facts == {"ratio": 4.0, "convolutions": "float32", "warnings": []}


@pytest.mark.parametrize(("slice_mm", "warned"), [(2.0, False), (8.0, False), (1.9, True), (8.4, True)])
def test_a_spacing_far_from_the_planned_one_is_reported(slice_mm, warned):
    run = inferer()
    run(volume(slice_mm=slice_mm), Echo())
    assert [f"{slice_mm:g} mm is far from" in one for one in run.facts["warnings"]] == [True] * warned


def test_the_result_is_a_plain_tensor_and_the_input_stays_as_it_was():
    run, network, image = inferer(mirror=True), trained().train(), volume(5)
    before = image.clone()
    found = run(image, network)
    assert type(found) is type(run.thick) is Tensor
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert not network.training
    found += 1
    assert torch.equal(image, before)


def test_whole_numbers_are_accepted_as_intensities():
    values = torch.randint(0, 9, (1, 1, 16, 12, 5))
    expected = inferer()(scan(values.float()), Echo())
    assert torch.equal(inferer()(scan(values), Echo()), expected)


def test_volumes_of_different_geometry_do_not_share_a_batch():
    image = MetaTensor(torch.rand(2, 1, 8, 8, 5), affine=torch.eye(4))
    with pytest.raises(SettingError, match="batch size 1, got 2"):
        inferer()(image, Echo())


@pytest.mark.parametrize(
    ("image", "word"),
    [
        (torch.rand(1, 1, 8, 8, 5), "got 1 in a Tensor"),
        (MetaTensor(torch.rand(1, 3, 8, 8, 5), affine=torch.eye(4)), "got 3 in a MetaTensor"),
    ],
)
def test_a_volume_without_geometry_or_with_channels_is_refused(image, word):
    with pytest.raises(DataError, match=f"one channel with an affine is needed, {word}"):
        inferer()(image, Echo())


def test_a_target_coarser_than_the_slices_is_refused():
    for wanted, text in ((5.0, "5"), (1e9, "1e[+]09")):
        with pytest.raises(
            SettingError, match=f"target_spacing_mm {text} is coarser than the slices of 4 mm"
        ):
            inferer(spacing_mm=wanted)(volume(), Echo())


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"spacing_mm": 0.0}, "target_spacing_mm"),
        ({"spacing_mm": float("inf")}, "target_spacing_mm"),
        ({"patch_size": (16, 16)}, "patch_size"),
        ({"patch_size": (16, 16, 0)}, "patch_size"),
        ({"overlap": 1.0}, "overlap"),
        ({"overlap": -0.1}, "overlap"),
        ({"amp": "half"}, "amp"),
        ({"spacing_mm": "abc"}, "target_spacing_mm must be a number > 0, got 'abc'"),
        ({"overlap": "x"}, "overlap must be a number, got 'x'"),
        ({"mirror": "off"}, "mirror must be true or false, got 'off'"),
    ],
)
def test_settings_out_of_range_are_named(settings, name):
    with pytest.raises(SettingError, match=name) as error:
        ThickSegmentationInferer(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("progress", [False, True])
def test_a_progress_bar_is_shown_on_request_only(progress, capsys):
    inferer(progress=progress)(volume(), Echo())
    assert ("it/s" in capsys.readouterr().err) == progress


def test_every_thread_keeps_the_thick_probabilities_of_its_own_volume():
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    infer = ThickSegmentationInferer(amp="float32")
    assert infer.thick.numel() == 0
    both = Barrier(2, timeout=60)

    def segment(size: int) -> tuple[int, ...]:
        affine = torch.diag(torch.tensor([1.0, 1.0, 4.0, 1.0]))
        network = ThickSegmentationNet(patch_size=(32, 32, 16), width=2)
        infer(MetaTensor(torch.rand(1, 1, size, size, 4), affine=affine), network)
        both.wait()
        return tuple(infer.thick.shape)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(segment, (24, 32))) == [(1, 2, 24, 24, 4), (1, 2, 32, 32, 4)]
