from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from medsr.inferers.self_ensemble import SelfEnsemble
from medsr.inferers.tiles import TileInferer
from monai.data import MetaTensor
from monai.inferers import Inferer, SimpleInferer
from torch import Tensor, nn


class Equivariant(nn.Module):
    """Knows no direction: pixels are squared and enlarged."""

    def forward(self, image: Tensor) -> Tensor:
        return image.square().repeat_interleave(2, -2).repeat_interleave(2, -1)


class Directed(nn.Module):
    """A convolution whose weights are the same in no two directions."""

    scale, size_multiple, exact_halo, half_precision_safe = 2, 1, 1, True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 12, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return torch.pixel_shuffle(self.layer(image), 2)


def members(image: Tensor, network: nn.Module) -> Tensor:
    """The eight answers side by side, each brought back by hand."""
    found = []
    for transposed in (False, True):
        for axes in ((), (-1,), (-2,), (-2, -1)):
            seen = image.flip(axes).transpose(-2, -1) if transposed else image.flip(axes)
            answer = network(seen)
            found.append((answer.transpose(-2, -1) if transposed else answer).flip(axes))
    return torch.cat(found)


def photograph(height: int = 9, width: int = 14) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [(9, 14), (12, 12), (1, 5)])
def test_mean_and_deviation_are_those_of_the_eight(size):
    run, network, image = SelfEnsemble(SimpleInferer()), Directed(), photograph(*size)
    found = run(image, network)
    with torch.no_grad():
        expected = members(image, network)
    assert found.shape == (1, 3, 2 * size[0], 2 * size[1])
    assert torch.allclose(found[0], expected.mean(0), atol=1e-6)
    deviation = expected.std(0, correction=0).mean(0)
    assert run.uncertainty.shape == (1, 1, 2 * size[0], 2 * size[1])
    assert torch.allclose(run.uncertainty[0, 0], deviation, atol=1e-6)
    assert run.facts["mean_uncertainty"] == pytest.approx(float(deviation.mean()), rel=1e-4)
    # The comparison can tell.
    assert float(deviation.min()) > 1e-3


@pytest.mark.parametrize("size", [(9, 14), (12, 12)])
def test_a_network_that_knows_no_direction_is_certain(size):
    run, image = SelfEnsemble(SimpleInferer()), photograph(*size)
    assert torch.equal(run(image, Equivariant()), Equivariant()(image))
    assert torch.equal(run.uncertainty, torch.zeros(1, 1, 2 * size[0], 2 * size[1]))
    assert run.facts["mean_uncertainty"] == 0


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
@pytest.mark.parametrize("flipped", [False, True])
def test_the_ensemble_knows_no_direction(turns, flipped):
    def seen(image: Tensor) -> Tensor:
        return torch.rot90(image.flip(-2) if flipped else image, turns, (-2, -1))

    run, network = SelfEnsemble(SimpleInferer()), Directed()
    expected = seen(run(photograph(), network))
    uncertainty = seen(run.uncertainty)
    assert torch.allclose(run(seen(photograph()), network), expected, atol=1e-6)
    assert torch.allclose(run.uncertainty, uncertainty, atol=1e-6)


def test_values_far_from_zero_lose_no_digits():
    class Shifted(Directed):
        def forward(self, image: Tensor) -> Tensor:
            return super().forward(image) + 1000

    plain, shifted = SelfEnsemble(SimpleInferer()), SelfEnsemble(SimpleInferer())
    plain(photograph(), Directed())
    shifted(photograph(), Shifted())
    # The squares of the values themselves would cost all seven digits.
    assert torch.allclose(plain.uncertainty, shifted.uncertainty, atol=2e-4)


def test_around_tiles_it_is_that_of_the_whole_image():
    network, image = Directed(), photograph(40, 57)
    whole, tiled = (
        SelfEnsemble(SimpleInferer()),
        SelfEnsemble(TileInferer(16, max_whole=1, amp="float32")),
    )
    assert torch.allclose(tiled(image, network), whole(image, network), atol=1e-5)
    assert torch.allclose(tiled.uncertainty, whole.uncertainty, atol=1e-5)
    assert tiled.facts["members"] == 8
    assert tiled.facts["mode"] == "tiles"
    assert tiled.facts["warnings"] == []


def test_the_warnings_of_all_members_are_kept_once():
    class Warns(Inferer):
        def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Tensor:
            self.facts = {"warnings": ["always", f"{inputs.shape[-2]} rows"], "mode": "whole"}
            return inputs

    run = SelfEnsemble(Warns())
    run(photograph(9, 14), nn.Identity())
    assert run.facts["warnings"] == ["always", "9 rows", "14 rows"]
    assert run.facts["mode"] == "whole"


def test_the_result_is_a_plain_tensor_without_gradient():
    image = photograph()
    before = image.clone()
    run = SelfEnsemble(SimpleInferer())
    for network in (Directed(), nn.Identity()):
        found = run(MetaTensor(image), network)
        assert type(found) is Tensor
        assert not found.requires_grad
        found += 1
        assert torch.equal(image, before)


def test_every_thread_keeps_the_uncertainty_of_its_own_image():
    run, network = SelfEnsemble(SimpleInferer()), Directed()
    assert run.uncertainty.numel() == 0
    both = Barrier(2, timeout=60)

    def enlarge(size: int) -> tuple[int, ...]:
        run(photograph(size, size), network)
        both.wait()
        return tuple(run.uncertainty.shape)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(enlarge, (6, 8))) == [(1, 1, 12, 12), (1, 1, 16, 16)]


class Pairwise(Directed):
    """Each view gets something of the other one; the two are not treated alike."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(6, 24, 3, padding=1)


def test_a_pair_has_four_members_that_keep_its_rows():
    def swapped(views: Tensor) -> Tensor:
        return torch.cat(views.chunk(2, 1)[::-1], 1)

    run, network = SelfEnsemble(SimpleInferer(), views=2), Pairwise()
    left, right = photograph(), photograph().flip(-1).square()
    pair = torch.cat([left, right], 1)
    found = run(pair, network)
    with torch.no_grad():
        expected = torch.cat(
            [
                network(pair),
                network(pair.flip(-2)).flip(-2),
                swapped(network(swapped(pair.flip(-1)))).flip(-1),
                swapped(network(swapped(pair.flip((-1, -2))))).flip((-1, -2)),
            ]
        )
    assert torch.allclose(found[0], expected.mean(0), atol=1e-6)
    deviation = expected.std(0, correction=0).unflatten(0, (2, 3)).mean(1)
    assert run.uncertainty.shape == (1, 2, 18, 28)
    assert torch.allclose(run.uncertainty[0], deviation, atol=1e-6)
    assert not torch.allclose(deviation[0], deviation[1], atol=1e-3)
    assert run.facts["members"] == 4
