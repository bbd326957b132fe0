"""Speed of the networks for single images, as ratios within one run.

    python -m benchmarks.speed.image_sr [--rounds 25] [--size 128 128]

Contestants are interleaved in random order on one thread and measured in process CPU time; the figure is the median
of paired ratios, with its 10 to 90 % range. A plain convolution is the probe: what the machine gives at this moment.
Weights are random: they do not change the time.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from medsr.errors import MissingExtraError, SettingError
from medsr.export import PRECISIONS, OpenVINONetwork, export_onnx
from medsr.inferers.precision import native_bfloat16
from medsr.inferers.tiles import TileInferer
from medsr.networks.fmen import FMEN
from medsr.networks.layout import channels_last
from medsr.networks.se_gan import SEGenerator
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import giga_multiplications, interleaved, machine, print_ratio


def main() -> None:
    """Run all groups."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--size", type=int, nargs=2, default=[128, 128])
    arguments = parser.parse_args()
    print(f"{machine()}, torch {torch.__version__}, bf16 {native_bfloat16('cpu')}")
    torch.set_num_threads(1)
    image = torch.rand(1, 3, *arguments.size, generator=torch.Generator().manual_seed(0))
    gated(SEGenerator(image_skip=True), image, arguments.rounds)
    fused(FMEN(), image, arguments.rounds)


def gated(network: SEGenerator, image: Tensor, rounds: int) -> dict[str, np.ndarray]:
    """SE-GAN as written down, as the inferer runs it, and in OpenVINO, beside the probe.

    Args:
        network: in PyTorch's default memory order and float32.
        image: ``(1, C, H, W)``.
        rounds: pairs for each ratio.
    """
    # The published start of the last convolution would give the interpolation alone, whatever the precision.
    nn.init.normal_(network.out.weight, std=0.01)
    eager, ours, infer = network.eval(), channels_last(copy.deepcopy(network)), TileInferer()
    probe = nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last)
    block = torch.rand(1, 64, *image.shape[-2:]).to(memory_format=torch.channels_last)
    contestants: dict[str, Callable[[], Tensor]] = {
        "eager": lambda: eager(image),
        "inferer": lambda: infer(image, ours),
        **_openvino(network, image),
    }
    what = f"SE-GAN, {image.shape[-2]} x {image.shape[-1]} x{network.scale}"
    _print_differences(what, contestants, "eager")
    times = interleaved({**contestants, "probe": lambda: probe(block)}, rounds)
    for name in contestants:
        if name != "eager":
            shown = f"{name} ({infer.facts['precision']})" if name == "inferer" else name
            print_ratio(f"{what}: eager float32 NCHW / {shown}", times["eager"], times[name])
    _print_rate(what, network, image, times["inferer"], (probe, block, times["probe"]))
    return times


def fused(network: FMEN, image: Tensor, rounds: int) -> dict[str, np.ndarray]:
    """FMEN as it runs, against the same convolutions written down plainly, and against the form that is trained.

    Args:
        network: the training form.
        image: ``(1, C, H, W)``.
        rounds: pairs for each ratio.
    """
    training = channels_last(network.eval())
    merged = channels_last(network.fuse())
    default = network.fuse()
    contestants: dict[str, Callable[[], Tensor]] = {
        "fused": lambda: merged(image),
        "plain": lambda: plain_form(merged, image),
        "plain NCHW": lambda: plain_form(default, image),
        "training form": lambda: training(image),
    }
    what = f"FMEN, {image.shape[-2]} x {image.shape[-1]} x{network.scale}"
    _print_differences(what, contestants, "plain NCHW")
    times = interleaved(contestants, rounds)
    print_ratio(f"{what}: fused / the same convolutions, plain, same layout", times["fused"], times["plain"])
    print_ratio(f"{what}: fused / the same convolutions, plain, NCHW", times["fused"], times["plain NCHW"])
    print_ratio(f"{what}: training form / fused", times["training form"], times["fused"])
    return times


def _print_differences(what: str, contestants: Mapping[str, Callable[[], Tensor]], reference: str) -> None:
    with torch.inference_mode():
        exact = contestants[reference]()
        for name, run in contestants.items():
            difference = 255 * float((run() - exact).abs().max())
            print(f"{what}: {name} differs from {reference} by {difference:.2g} of 255")


def plain_form(network: FMEN, image: Tensor) -> Tensor:
    """The merged network as one would write it down from the paper: the same convolutions, nothing in place."""

    def residual(erb: nn.Module, x: Tensor) -> Tensor:
        return erb.conv2(F.leaky_relu(erb.conv1(x), 0.1))

    def attention(block: nn.Module, x: Tensor) -> Tensor:
        y = F.leaky_relu(block.squeeze(x), 0.1)
        for erb in block.erbs:
            y = residual(erb, y)
        return torch.sigmoid(block.excite(F.leaky_relu(y, 0.1))) * x

    head = network.head(image)
    features = head
    for block in network.body:
        if hasattr(block, "squeeze"):
            features = attention(block, features)
        else:
            features = residual(block, features) if hasattr(block, "conv1") else block(features)
    return F.pixel_shuffle(network.tail(features + head), network.scale)


def _openvino(network: nn.Module, image: Tensor) -> dict[str, Callable[[], Tensor]]:
    """OpenVINO in every precision that there is; why not, where there is none."""
    found: dict[str, Callable[[], Tensor]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        for precision in PRECISIONS:
            try:
                if not file.exists():
                    export_onnx(network, file)
                found[f"OpenVINO {precision}"] = partial(
                    OpenVINONetwork(file, precision=precision, threads=1), image
                )
            except (MissingExtraError, SettingError) as error:
                print(f"OpenVINO {precision} left out: {error}")
    return found


def _print_rate(
    what: str,
    network: nn.Module,
    image: Tensor,
    seconds: np.ndarray,
    probe: tuple[nn.Module, Tensor, np.ndarray],
) -> None:
    """Share of the probe's rate that the inferer reaches."""
    work, unit = giga_multiplications(network, *image.shape), giga_multiplications(probe[0], *probe[1].shape)
    print_ratio(f"{what}: rate of the inferer / rate of the probe (float32)", work / seconds, unit / probe[2])


if __name__ == "__main__":
    main()
