"""The network that is measured: architecture and weights as the bundle's inference config names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from medsr import catalog
from medsr.engines.weight_files import load_weights
from medsr.networks.layout import channels_last
from medsr.networks.slice_sr import SliceSRNet

BUNDLE = "mri_rehrseg_superres"


def settings(config: str = "inference.json") -> dict[str, Any]:
    """Settings of one of the bundle's configs."""
    return catalog.read_settings(catalog.bundle_root(BUNDLE), config)


def shipped_network(weights: Path | None = None) -> SliceSRNet:
    """The shipped network, or the same with other weights, ready to run."""
    chosen = settings()
    network = SliceSRNet(chosen["width"], head="uncertainty", prior=chosen["prior"])
    load_weights(weights or catalog.bundle_root(BUNDLE) / "models" / "model.pt", network)
    network = channels_last(network)
    assert isinstance(network, SliceSRNet)
    return network.eval()


def naive_network() -> SliceSRNet:
    """The same in PyTorch's default memory order."""
    network = shipped_network()
    for parameter in network.parameters():
        parameter.data = parameter.data.contiguous(memory_format=torch.contiguous_format)
    return network
