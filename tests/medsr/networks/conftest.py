"""What is asked of networks for images, alike."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

Golden = Callable[[str, dict[str, Any]], dict[str, Any]]


@pytest.fixture
def trained() -> Callable[..., Any]:
    """Give every parameter a say, as after some training."""

    def give(network: nn.Module, std: float = 0.15) -> nn.Module:
        torch.manual_seed(3)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=std)
        return network

    return give


@pytest.fixture
def pair() -> Callable[..., Tensor]:
    """Make the two views that networks for stereo pairs take."""

    def make(height: int = 8, width: int = 12, *, batch: int = 1, channels: int = 3) -> Tensor:
        made = torch.Generator().manual_seed(2)
        return torch.rand(batch, 2 * channels, height, width, generator=made)

    return make


@pytest.fixture
def same_as_released(golden: Golden) -> Callable[..., None]:
    """Compare names and shapes of weights, and statistics of a result, with those of the last release."""

    def check(
        name: str,
        forms: Mapping[str, nn.Module],
        result: Tensor,
        *,
        centre: tuple[int, int],
        **more: Sequence[float],
    ) -> None:
        statistics: dict[str, Any] = dict(more)
        for form, network in forms.items():
            prefix = f"{form}_" if form else ""
            tensors = "\n".join(f"{key} {tuple(value.shape)}" for key, value in network.state_dict().items())
            statistics[f"{prefix}tensors"] = hashlib.sha256(tensors.encode()).hexdigest()
            statistics[f"{prefix}parameters"] = sum(p.numel() for p in network.parameters())
        found = result.double()
        statistics |= {
            "mean": [float(v) for v in found.mean(dim=(0, 2, 3))],
            "std": [float(v) for v in found.std(dim=(0, 2, 3))],
            "roughness": [float(found.diff(dim=axis).abs().mean()) for axis in (-2, -1)],
            "corner": [float(v) for v in found[0, :, 0, 0]],
            "centre": [float(v) for v in found[(0, slice(None), *centre)]],
        }
        expected = golden(name, statistics)
        assert set(statistics) == set(expected)
        for key in sorted(statistics):
            if key.endswith("tensors"):
                assert statistics[key] == expected[key], "released weights would no longer load"
            else:
                # Kernels differ between machines in the last bits of a float32.
                assert statistics[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-4), key

    return check


@pytest.fixture
def exported_for_every_size() -> Callable[..., None]:
    """Export a network with free sizes and compare it on other ones."""

    def check(network: nn.Module, image: Tensor, others: Sequence[Tensor]) -> None:
        free = {"image": dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)}
        with torch.no_grad():
            exported = torch.export.export(network, (image,), dynamic_shapes=free)
            for other in others:
                assert torch.allclose(exported.module()(other), network(other), atol=1e-6)
        # Control flow and contexts would appear as functions that take graphs, which converters do not know.
        strange = [n for n in exported.graph.nodes if isinstance(n.target, torch._ops.HigherOrderOperator)]
        assert strange == []

    return check
