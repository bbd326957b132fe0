"""Memory and speed of the stereo network and of its exchange between the views, as ratios within one run.

    python -m benchmarks.speed.stereo_sr [--rounds 5] [--size 512 640] [--reference-rows 64] [--scale 2]
        [--attention-size 256 320] [--only attention exchange network]

The exchange (biPAM) is measured on features of the small pair, in float32 and on one thread. Its reference path holds
all scores at once, 12 GB at the full size. Rows are independent of each other: the reference is given
``--reference-rows`` of them. Its memory is scaled to all rows; times of all paths are of these rows, so that nothing is
scaled. ``--reference-rows 512`` takes all of them.

Attention alone, from what is compared to the features that are brought, is measured against the formulation that was
published as well, on the same rows and on a smaller pair: it holds more maps than the reference path, which is ours.

The whole network is compared with its own convolutions, each run by itself on the same shapes and layouts: what no
reordering of the rest could go below. Contestants are interleaved in random order and measured in process CPU time; the
figure is the median of paired ratios, with its 10 to 90 % range. Weights are random: they do not change the time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from medsr.inferers.precision import native_bfloat16
from medsr.inferers.stereo_superres import StereoSuperResInferer
from medsr.networks.layout import channels_last
from medsr.networks.parallax import PARALLAX_PATHS, BiPAM, ParallaxResult, parallax_attention
from medsr.networks.segsrnet import SEGSRNet
from medsr.networks.stereo_fmen import StereoFMEN
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import interleaved, machine, peak_of, print_ratio

FEATURES, LEVELS = 64, 4
"""Width and levels of the exchange in the network as it was published."""

NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "StereoFMEN": lambda scale: StereoFMEN(scale, fused=True),
    "SEGSRNet": SEGSRNet,
}
"""The default network of the bundle, and SEGSRNet at the published width, by scale."""

GOAL_MEMORY, GOAL_TIME = 1000.0, 1.5
"""MB that the exchange should take at most, and time of the network over that of its convolutions."""

PUBLISHED, GOAL_ATTENTION = "published", 5.0
"""Name of the published formulation beside our paths, and its time over that of the chunked path at least."""

GROUPS = ("attention", "exchange", "network")


def main() -> None:
    """Run all groups."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--size", type=int, nargs=2, default=[512, 640], help="rows and columns of the small pair"
    )
    parser.add_argument(
        "--reference-rows", type=int, default=64, help="rows that the reference path is given"
    )
    parser.add_argument("--scale", type=int, default=2)
    parser.add_argument(
        "--attention-size", type=int, nargs=2, default=[256, 320], help="rows and columns for attention alone"
    )
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS)
    arguments = parser.parse_args()
    print(f"{machine()}, torch {torch.__version__}, bf16 {native_bfloat16('cpu')}")
    torch.set_num_threads(1)
    size, rows = tuple(arguments.size), min(arguments.reference_rows, arguments.size[0])
    if "attention" in arguments.only:
        for one in (tuple(arguments.attention_size), (rows, size[1])):
            attention_memory(one)
            attention_times(one, arguments.rounds)
    if "exchange" in arguments.only:
        exchange_memory(size, reference_rows=rows)
        exchange_times((rows, size[1]), arguments.rounds)
    if "network" in arguments.only:
        for name, make in NETWORKS.items():
            network_memory(name, size, arguments.scale)
            torch.manual_seed(0)
            network = channels_last(make(arguments.scale).eval())
            network_times(network, torch.rand(1, network.in_channels, *size), arguments.rounds)


def published_attention(query: Tensor, key: Tensor, features: Tensor) -> ParallaxResult:
    """Parallax attention as the publication computes it for inference, written from its equations.

    Both maps are there in full. For the mask of either view the map is moved by each of five columns, the five are
    stacked and added, and each pixel's row of the sum is multiplied with its column of the other map.

    Args:
        query: what is compared of the left views, ``(B, C, H, W)``.
        key: what is compared of the right views, the same.
        features: what is exchanged, the left views first, ``(2B, F, H, W)``.

    Reference:
        arXiv 2011.03802
    """
    batch, _, height, width = query.shape

    def rows(x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).reshape(-1, width, x.shape[1])

    scores = torch.bmm(rows(query), rows(key).transpose(1, 2))
    to_left, to_right = scores.softmax(2), scores.transpose(1, 2).contiguous().softmax(2)
    left, right = map(rows, features.chunk(2))
    filled, valid = [], []
    for to, back, own, other in ((to_left, to_right, left, right), (to_right, to_left, right, left)):
        bordered = F.pad(to, (0, 0, 2, 2))
        relaxed = torch.stack([bordered[:, shift : shift + width] for shift in range(5)]).sum(0)
        agrees = torch.bmm(relaxed.reshape(-1, 1, width), back.transpose(1, 2).reshape(-1, width, 1))
        mask = (5 * agrees).tanh().reshape(-1, width, 1)
        filled.append(mask * torch.bmm(to, other) + (1 - mask) * own)
        valid.append(mask)
    return ParallaxResult(
        *(torch.cat(one).unflatten(0, (2 * batch, height)).permute(0, 3, 1, 2) for one in (filled, valid))
    )


def attention_memory(size: Sequence[int]) -> dict[str, float]:
    """Peak memory over the inputs of attention alone, each contestant in a process of its own, in MB."""
    found = {}
    for path in ("chunked", "reference", PUBLISHED):
        peak = peak_of("benchmarks.speed.stereo_sr:attention", path, *size)
        if peak is not None:
            found[path] = peak * 2**20 / 1e6
            print(f"attention, {size[0]} x {size[1]}: {path} takes {found[path]:.0f} MB over its inputs")
    return found


def attention(path: str, rows: int, columns: int, features: int = FEATURES) -> Callable[[], object]:
    """Attention on features of a pair, warmed up; what :func:`attention_memory` measures."""
    torch.set_num_threads(1)
    run = _attention(path, (rows, columns), features)
    _attention(path, (8, 16), features)()
    return run


def attention_times(size: Sequence[int], rounds: int, *, features: int = FEATURES) -> dict[str, np.ndarray]:
    """Attention alone: the chunked path against the published formulation and our reference.

    Args:
        size: rows and columns of the features.
        rounds: pairs for each ratio.
        features: width of the network.
    """
    contestants = {path: _attention(path, size, features) for path in ("chunked", "reference", PUBLISHED)}
    what = f"attention, {size[0]} x {size[1]}"
    difference = float((contestants["chunked"]() - contestants[PUBLISHED]()).abs().max())
    print(f"{what}: chunked differs from the published formulation by {difference:.1e}")
    times = interleaved(contestants, rounds)
    print_ratio(
        f"{what}: time of the published formulation / chunked (goal {GOAL_ATTENTION:g})",
        times[PUBLISHED],
        times["chunked"],
    )
    print_ratio(f"{what}: time of the reference / chunked", times["reference"], times["chunked"])
    return times


def exchange_memory(size: Sequence[int], *, reference_rows: int) -> dict[str, float]:
    """Peak memory over the inputs of every path, each in a process of its own, in MB.

    Args:
        size: rows and columns of the features.
        reference_rows: rows that the reference path is given; the result is scaled to all.
    """
    found = {}
    for path in PARALLAX_PATHS:
        rows = reference_rows if path == "reference" else size[0]
        peak = peak_of("benchmarks.speed.stereo_sr:exchange", path, rows, size[1])
        if peak is not None:
            found[path] = peak * 2**20 / 1e6 * size[0] / rows
    for path, peak in found.items():
        note = f", {found['reference'] / peak:.1f} times less than the reference; goal {GOAL_MEMORY:.0f} MB"
        if path == "reference":
            note = f" (scaled from {reference_rows} rows)" if reference_rows < size[0] else ""
        print(f"biPAM, {size[0]} x {size[1]}: {path} takes {peak:.0f} MB over its inputs{note}")
    return found


def exchange(path: str, rows: int, columns: int, features: int = FEATURES) -> Callable[[], object]:
    """One exchange on features of a pair, warmed up; what :func:`exchange_memory` measures."""
    torch.set_num_threads(1)
    run = _exchange(path, (rows, columns), features)
    _exchange(path, (8, 16), features)()
    return run


def exchange_times(size: Sequence[int], rounds: int, *, features: int = FEATURES) -> dict[str, np.ndarray]:
    """All paths on the same rows.

    Args:
        size: rows and columns of the features.
        rounds: pairs for each ratio.
        features: width of the network.
    """
    contestants = {path: _exchange(path, size, features) for path in (*PARALLAX_PATHS, PUBLISHED)}
    exact = contestants["reference"]()
    for path in PARALLAX_PATHS[:-1]:
        difference = float((contestants[path]() - exact).abs().max())
        print(f"biPAM: {path} differs from the reference by {difference:.1e}")
    times = interleaved(contestants, rounds)
    for path in PARALLAX_PATHS[:-1]:
        for name in ("reference", PUBLISHED):
            print_ratio(
                f"biPAM, {size[0]} x {size[1]}: time of the {name} / {path}", times[name], times[path]
            )
    return times


def network_memory(name: str, size: Sequence[int], scale: int) -> float | None:
    """Peak memory of the whole network with its inferer over the small pair, in MB; the result is part of it."""
    peak = peak_of("benchmarks.speed.stereo_sr:whole", name, *size, scale)
    if peak is None:
        return None
    peak *= 2**20 / 1e6
    result = 2 * 3 * 4 * scale**2 * size[0] * size[1] / 1e6
    print(
        f"{name} x{scale} to {scale * size[0]} x {scale * size[1]}: {peak:.0f} MB over its input, of which the "
        f"result is {result:.0f}"
    )
    return peak


def whole(name: str, rows: int, columns: int, scale: int) -> Callable[[], object]:
    """A network on a pair, as the bundle runs it in float32, warmed up; what :func:`network_memory` measures."""
    torch.set_num_threads(1)
    network, infer = channels_last(NETWORKS[name](scale).eval()), StereoSuperResInferer(amp="float32")
    infer(torch.rand(1, network.in_channels, 8, 16), network)
    pair = torch.rand(1, network.in_channels, rows, columns)
    return lambda: infer(pair, network)


def network_times(network: nn.Module, image: Tensor, rounds: int) -> dict[str, np.ndarray]:
    """A network against its convolutions alone.

    Args:
        network: the one to be measured.
        image: its input.
        rounds: pairs for each ratio.
    """
    calls = convolutions_of(network, image)
    shared = torch.rand(max(int(np.prod(call.shape)) for call in calls))
    contestants = {"network": lambda: network(image), "convolutions": lambda: run_convolutions(calls, shared)}
    times = interleaved(contestants, rounds)
    what = f"{type(network).__name__}, {image.shape[-2]} x {image.shape[-1]}: network / its {len(calls)} convolutions"
    print_ratio(f"{what} (goal {GOAL_TIME:g})", times["network"], times["convolutions"])
    print(
        f"{what}: {np.median(times['network']):.1f} against {np.median(times['convolutions']):.1f} s, one thread"
    )
    return times


class Convolution(NamedTuple):
    """One call of a convolution: the shape and layout of its input, and its other arguments."""

    shape: tuple[int, ...]
    channels_last: bool
    arguments: tuple[Any, ...]


def convolutions_of(network: nn.Module, image: Tensor) -> list[Convolution]:
    """All convolutions that a network does for an input of this shape, in their order; nothing is computed."""
    recorder = _Recorder()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), recorder:
        network(torch.empty(image.shape))
    return recorder.calls


def run_convolutions(calls: Sequence[Convolution], shared: Tensor) -> None:
    """Run convolutions one by one, each on numbers of its own shape; all inputs share one piece of memory."""
    for call in calls:
        batch, channels, height, width = call.shape
        values = shared[: batch * channels * height * width]
        if call.channels_last:
            image = values.view(batch, height, width, channels).permute(0, 3, 1, 2)
        else:
            image = values.view(call.shape)
        torch.convolution(image, *call.arguments)


class _Recorder(TorchDispatchMode):
    """Keeps what every convolution is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Convolution] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.convolution.default:
            image = args[0]
            self.calls.append(Convolution(tuple(image.shape), image.stride(1) == 1, args[1:]))
        return func(*args, **(kwargs or {}))


def _exchange(path: str, size: Sequence[int], features: int) -> Callable[[], Tensor]:
    """One exchange; the published one projects as ours does, but the whole image at once."""
    module, levels, own = _inputs(size, features)
    if path != PUBLISHED:
        module.path = path

    def run() -> Tensor:
        with torch.inference_mode():
            if path == PUBLISHED:
                return published_attention(*module.project(levels), own).features
            found: Tensor = module(levels, own).features
        return found

    return run


def _attention(path: str, size: Sequence[int], features: int) -> Callable[[], Tensor]:
    """The part of an exchange that follows the projections."""
    module, levels, own = _inputs(size, features)
    with torch.inference_mode():
        query, key = module.project(levels)

    def run() -> Tensor:
        with torch.inference_mode():
            if path == PUBLISHED:
                return published_attention(query, key, own).features
            return parallax_attention(query, key, own, path=path).features

    return run


def _inputs(size: Sequence[int], features: int) -> tuple[BiPAM, Tensor, Tensor]:
    """An exchange and its inputs, with weights and features of a fixed seed."""
    seeded = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    module = channels_last(BiPAM(features, LEVELS).eval())
    levels, own = (
        torch.rand(2, channels, *size, generator=seeded).to(memory_format=torch.channels_last)
        for channels in (LEVELS * features, features)
    )
    return module, levels, own


if __name__ == "__main__":
    main()
