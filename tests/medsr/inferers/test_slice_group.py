from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from medsr.errors import SettingError
from medsr.geometry import rescaled_size, slice_positions
from medsr.inferers import slice_group
from medsr.inferers.slice_group import SliceGroupInferer
from medsr.networks.slice_sr import SliceSRNet
from monai.data import MetaTensor
from torch import Tensor, nn
from torch.nn import functional as F


class Positions(nn.Module):
    """Answers with the absolute position that it was asked for: its input must be the ramp ``slice index``.

    A window that starts at slice ``low`` holds ``low`` in its first slice, so a wrong offset, a lost or a
    doubled slice shows as a wrong value. The second channel carries the in-plane place in the same way.
    """

    scale = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, ...]] = []
        self.asked: list[float] = []
        self.given: list[dict[str, float]] = []

    def forward(self, image: Tensor, *, positions: Sequence[float], scale: float, thickness: float) -> Tensor:
        self.calls.append(tuple(image.shape))
        self.given.append({"scale": scale, "thickness": thickness})
        places = torch.as_tensor(np.asarray(positions), dtype=image.dtype)
        # A window reads what it needs, and a thin slice is asked for where its own thick slice is inside.
        assert float(places.min()) >= -0.5 - 1e-6
        assert float(places.max()) <= image.shape[-1] - 0.5 + 1e-6
        absolute = image[:, :1, ..., :1] + places
        place = image[:, 1:2, ..., :1].expand(*absolute.shape[:-1], len(places))
        self.asked += absolute[0, 0, 0, 0].tolist()
        return torch.cat([absolute, place], dim=1)


class Local(nn.Module):
    """A network without global pooling: two 3 x 3 x 3 convolutions, then linear interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 2, 3, padding=1)

    def forward(self, image: Tensor, *, positions: Sequence[float], scale: float, thickness: float) -> Tensor:
        features = self.second(torch.relu(self.first(image)))
        places = torch.as_tensor(np.asarray(positions), dtype=image.dtype)
        index = (places + 0.5).floor().long().clamp(0, image.shape[-1] - 1)
        return features[..., index] * (1 + (places - index))


def ramp(depth: int, size: tuple[int, int] = (9, 11), *, batch: int = 1) -> Tensor:
    """Channel 0: slice index; channel 1: number of the pixel."""
    index = torch.arange(float(depth)).expand(batch, 1, *size, depth)
    pixel = torch.arange(float(np.prod(size))).reshape(1, 1, *size, 1).expand(batch, 1, *size, depth)
    return torch.cat([index, pixel], dim=1).contiguous()


def inferer(**settings: Any) -> SliceGroupInferer:
    return SliceGroupInferer(**{"amp": "float32", **settings})


@settings(max_examples=300)
@given(
    depth=st.integers(1, 30),
    group=st.integers(1, 13),
    context=st.integers(0, 4),
    ratio=st.one_of(st.sampled_from([1.0, 1.5, 2.0, 2.5, 3.0, 3.333, 4.0, 6.0, 8.0]), st.floats(1.2, 8.0)),
    tile=st.sampled_from([None, 8, 9, 16]),
    halo=st.integers(0, 5),
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_every_thin_slice_is_written_once_at_its_place(depth, group, context, ratio, tile, halo, batch, size):
    network = Positions()
    run = inferer(group=group, context=context, tile=tile, halo=halo, batch=batch)
    found = run(ramp(depth, size), network, scale=ratio)
    expected = torch.as_tensor(
        slice_positions(depth, rescaled_size(depth, ratio), ratio), dtype=torch.float32
    )
    assert found.shape == (1, 2, *size, len(expected))
    assert torch.allclose(found[0, 0], expected.expand(*size, -1), atol=1e-4)
    assert torch.equal(found[0, 1, ..., 0], torch.arange(float(np.prod(size))).reshape(size))
    assert torch.equal(found[0, 1], found[0, 1, ..., :1].expand_as(found[0, 1]))


@given(depth=st.integers(1, 30), group=st.integers(1, 13), ratio=st.sampled_from([1.5, 2.5, 4.0, 7.3]))
def test_no_thin_slice_is_computed_twice(depth, group, ratio):
    network = Positions()
    inferer(group=group, tile=None)(ramp(depth), network, scale=ratio)
    expected = slice_positions(depth, rescaled_size(depth, ratio), ratio)
    assert np.allclose(network.asked, expected, atol=1e-4)


def test_windows_are_bounded_in_every_direction():
    network = Positions()
    inferer(group=4, context=2, tile=8, halo=3, batch=2)(ramp(23, (40, 29)), network, scale=2)
    assert max(shape[0] for shape in network.calls) == 2
    assert max(max(shape[2:4]) for shape in network.calls) <= 8 + 2 * 3
    assert max(shape[4] for shape in network.calls) == 4 + 2 * 2


def test_the_facts_of_the_acquisition_reach_the_network():
    network = Positions()
    inferer()(ramp(5), network, scale=2.5, thickness=0.7)
    assert network.given[0] == {"scale": 2.5, "thickness": 0.7}


def test_the_scale_defaults_to_the_network_s():
    assert inferer()(ramp(5), Positions()).shape[-1] == 10


@pytest.mark.parametrize(("tile", "halo"), [(8, 2), (8, 5), (13, 3)])
@pytest.mark.parametrize("size", [(33, 20), (17, 41)])
def test_tiles_with_a_sufficient_halo_equal_the_whole_plane(tile, halo, size):
    torch.manual_seed(0)
    network, image = Local(), torch.rand(1, 1, *size, 9)
    whole = inferer(tile=None, group=100)(image, network, scale=2.5)
    tiled = inferer(tile=tile, halo=halo, group=4, context=2)(image, network, scale=2.5)
    assert torch.allclose(tiled, whole, atol=1e-5)
    # The comparison can tell: without a halo the seams show.
    seams = inferer(tile=8, halo=0, group=100)(image, network, scale=2.5)
    assert not torch.allclose(seams, whole, atol=1e-3)


def trained(head: str = "plain") -> SliceSRNet:
    torch.manual_seed(0)
    network = SliceSRNet(0.125, head=head, branches=4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return network


@pytest.mark.parametrize("scale", [2.0, 2.5, 3.0])
@pytest.mark.parametrize("depth", [5, 6])
def test_both_directions_make_the_result_symmetric(scale, depth):
    network, image = trained("uncertainty"), torch.rand(1, 1, 16, 13, depth)
    one_way, both_ways = inferer(group=3), inferer(group=3, both_directions=True)
    forward = both_ways(image, network, scale=scale)
    backward = both_ways(image.flip(-1), network, scale=scale)
    assert torch.allclose(backward.flip(-1), forward, atol=1e-6)
    once = one_way(image, network, scale=scale)
    assert not torch.allclose(one_way(image.flip(-1), network, scale=scale).flip(-1), once, atol=1e-3)


@pytest.mark.parametrize("tiling", [{"tile": None}, {"tile": 8, "halo": 3, "batch": 3}])
def test_samples_of_a_batch_do_not_mix(tiling):
    torch.manual_seed(0)
    network, images = Local(), torch.rand(3, 1, 26, 19, 5)
    together = inferer(**tiling)(images, network, scale=3)
    assert together.shape == (3, 2, 26, 19, 15)
    for k in range(3):
        alone = inferer(**tiling)(images[k : k + 1], network, scale=3)
        assert torch.allclose(together[k : k + 1], alone, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("settings", [{}, {"both_directions": True}, {"amp": "bfloat16"}])
def test_windows_alone_and_together_give_the_same_result(batch, settings):
    torch.manual_seed(0)
    network, images = trained("uncertainty"), torch.rand(batch, 1, 29, 44, 7)
    run = inferer(tile=16, halo=4, group=4, context=1, **settings)
    together = run(images, network, scale=2.5)
    network.alone_from = 0
    alone = run(images, network, scale=2.5)
    assert torch.allclose(alone, together, atol=1e-2 if "amp" in settings else 1e-6)
    assert not torch.allclose(
        alone, network.first_estimate(images, 2.5, 1.0, positions=slice_positions(7, 18, 2.5)), atol=1e-2
    )


def test_sizes_that_fit_neither_tile_nor_network_are_served():
    found = inferer(tile=8, halo=4, group=2)(torch.rand(1, 1, 29, 17, 5), trained(), scale=3.5)
    assert found.shape == (1, 1, 29, 17, 18)
    assert found.isfinite().all()


@pytest.mark.parametrize("progress", [False, True])
def test_a_progress_bar_is_shown_on_request_only(progress, capsys):
    inferer(progress=progress)(ramp(5), Positions(), scale=2)
    assert ("super-resolution" in capsys.readouterr().err) == progress


def test_the_result_is_a_plain_tensor_that_may_be_changed():
    image = MetaTensor(torch.rand(1, 1, 16, 16, 5))
    network = trained().train()
    found = inferer()(image, network, scale=2)
    assert type(found) is Tensor
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert not found.is_inference()
    assert not network.training
    found += F.relu(found)


def test_the_input_stays_as_it_was():
    image = torch.rand(1, 1, 16, 16, 5)
    before = image.clone()
    inferer(both_directions=True)(image, trained(), scale=2)
    assert torch.equal(image, before)


@pytest.mark.parametrize(
    ("name", "value"), [("group", 0), ("context", -1), ("tile", 4), ("halo", -1), ("tile", 8.5)]
)
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(SettingError, match=f"{name} must be a whole number >= .*{value}"):
        SliceGroupInferer(**{name: value})


def test_a_misspelt_precision_is_named_before_any_volume_is_read():
    with pytest.raises(SettingError, match="half"):
        SliceGroupInferer(amp="half")


def planes_chosen(
    amp: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    prior: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, list[Any], Tensor]:
    """Run a network whose planes in 8 bits give zero; note the planes that were to decide."""
    seen: list[Any] = []

    class Zero(nn.Module):
        def forward(self, planes: Tensor, scale: float, thickness: float, positions: Any) -> Tensor:
            return torch.zeros(*planes.shape[:-1], len(positions))

    def choose(prior: nn.Module, examples: list[Any], trials: list[Any], *, other: torch.dtype) -> nn.Module:
        assert other == dtype
        seen.append((examples, trials))
        return Zero()

    monkeypatch.setattr(slice_group, "choose_planes", choose)
    monkeypatch.setattr(slice_group, "choose_precision", lambda *_, **__: dtype)
    torch.manual_seed(0)
    network, run = SliceSRNet(0.125, prior=prior).eval(), SliceGroupInferer(amp=amp, tile=None)
    stack = torch.rand(2, 1, 24, 17, 5, generator=torch.Generator().manual_seed(1))
    stack[1, 0, 7, 3, 2], stack[0, 0, 20, 11, 4] = 9.0, -9.0
    return run, seen, run(stack, network, scale=2.0, thickness=0.8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planes_may_run_in_fewer_bits_and_the_network_stays_as_it_was(dtype, monkeypatch):
    run, seen, found = planes_chosen("auto", monkeypatch, dtype=dtype)
    assert run.int8_planes
    # What the network adds starts at zero.
    assert float(found.abs().max()) < 1e-6
    ((examples, trials),) = seen
    for planes, scale, thickness in (*examples, *trials):
        assert (scale, thickness) == (2.0, 0.8)
        assert planes.shape[1] == 1
        assert planes.shape[-1] == 5
        # One at a time: the features of all together would take more memory than the result.
        assert len(planes) == 1
    shown, tried = ([planes for planes, *_ in part] for part in (examples, trials))
    assert {planes.shape[2] for planes in shown} == {17, 24} == {planes.shape[2] for planes in tried}
    # Along both axes the brightest and the darkest voxel are among what shows the range.
    for size in (17, 24):
        values = torch.cat([planes.flatten() for planes in shown if planes.shape[2] == size])
        assert (float(values.max()), float(values.min())) == (9.0, -9.0)


@pytest.mark.parametrize(("amp", "prior"), [("float32", True), ("auto", False)])
def test_planes_keep_all_bits_where_that_is_wanted_or_there_are_none(amp, prior, monkeypatch):
    run, seen, found = planes_chosen(amp, monkeypatch, prior=prior)
    assert not run.int8_planes
    assert seen == []
    assert float(found.abs().max()) > 1


def test_the_first_estimate_has_the_chosen_precision_too_but_interpolates_exactly():
    torch.manual_seed(0)
    network, image = SliceSRNet(0.125, prior=True), torch.rand(1, 1, 24, 20, 5)
    seen = []
    network.prior.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    run = inferer(amp="bfloat16")
    found = run(image, network, scale=2.5)
    assert run.used_dtype == torch.bfloat16
    # After what the trial compares with, in float32.
    assert all(seen[seen.index(True) :])
    # Untrained, planes and volume network add nothing to the interpolation.
    assert torch.allclose(found, inferer()(image, network, scale=2.5), atol=1e-6)


def test_a_first_estimate_is_made_once_for_the_whole_stack_and_knows_no_tiles():
    torch.manual_seed(0)
    network = SliceSRNet(0.125, head="uncertainty", branches=4, prior=True)
    with torch.no_grad():
        network.prior.readout.weights.weight.normal_(0, 0.3)
    image = torch.rand(1, 1, 40, 24, 7)
    with torch.inference_mode():
        whole = network.eval()(image, scale=2.5)
    planes = []
    network.prior.register_forward_hook(lambda _, inputs, __: planes.append(len(inputs[0])))
    found = inferer(tile=8, halo=0, group=2, context=0)(image, network, scale=2.5)
    # The untrained volume network adds nothing: what is left is the estimate, with the context of whole planes.
    assert torch.allclose(found[:, :1], whole[:, :1], atol=1e-6)
    # Every plane of both axes once.
    assert sum(planes) == 40 + 24


def test_progress_is_shown_for_the_first_estimate_too(capsys, monkeypatch):
    monkeypatch.setattr(slice_group, "tqdm", partial(slice_group.tqdm, mininterval=0))
    network = SliceSRNet(0.125, prior=True)
    inferer(progress=True)(torch.rand(1, 1, 24, 16, 5), network, scale=2)
    shown = capsys.readouterr().err
    assert "first estimate: 100%" in shown
    assert "40/40" in shown
    assert "super-resolution: 100%" in shown


def test_a_quiet_inferer_shows_nothing(capsys):
    inferer()(torch.rand(1, 1, 24, 16, 5), SliceSRNet(0.125, prior=True), scale=2)
    assert capsys.readouterr() == ("", "")


def test_a_quiet_command_outweighs_the_setting(monkeypatch):
    # medsr run --quiet sets TQDM_DISABLE, which tqdm reads only where nothing is said of it.
    said, shown = [], slice_group.tqdm

    def recorded(*given, **more):
        said.append(more)
        return shown(*given, **more)

    monkeypatch.setattr(slice_group, "tqdm", recorded)
    inferer(progress=True)(torch.rand(1, 1, 24, 16, 5), SliceSRNet(0.125, prior=True), scale=2)
    assert len(said) == 2
    assert all("disable" not in one for one in said)
