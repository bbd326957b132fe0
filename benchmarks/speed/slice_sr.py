"""Speed and memory of the slice network and its parts, as ratios within one run.

    python -m benchmarks.speed.slice_sr [--rounds 25] [--size 240 240 40] [--skip-volume]

Contestants are interleaved in random order on one thread and measured in process CPU time; the figure is the median
of paired ratios, with its 10 to 90 % range. A plain convolution is the probe: what the machine gives at this moment.
The whole volume is timed once more in wall time on all threads, which is only an indication on a shared machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from medsr.geometry import slice_positions
from medsr.inferers.precision import native_bfloat16
from medsr.inferers.slice_group import SliceGroupInferer
from medsr.inferers.volume import VolumeInferer
from medsr.io.writing import write_nifti
from medsr.networks.int8 import native_int8
from medsr.networks.layout import channels_last
from medsr.networks.slice_sr import SliceSRNet
from medsr.resampling import interpolation_matrix, resample_last_axis
from monai.data import MetaTensor
from torch import nn

from benchmarks.commands import run_config
from benchmarks.measure import giga_multiplications, interleaved, machine, peak_of, print_ratio, tensors_peak
from benchmarks.shipped import BUNDLE, naive_network, settings, shipped_network

RATIO = 4
"""Thin slices per thick one."""


def main() -> None:
    """Run all groups."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--size", type=int, nargs=3, default=[240, 240, 40])
    parser.add_argument("--skip-volume", action="store_true")
    arguments = parser.parse_args()
    print(f"{machine()}, torch {torch.__version__}, bf16 {native_bfloat16('cpu')}")
    torch.set_num_threads(1)
    interpolation(arguments.rounds)
    layouts(arguments.rounds)
    planes(arguments.rounds)
    full_width(max(3, arguments.rounds // 5))
    if not arguments.skip_volume:
        memory(arguments.size)
        volume(arguments.size)
        command(arguments.size)


def interpolation(rounds: int) -> None:
    """The matrix form of the cubic B-spline against SciPy."""
    from scipy.ndimage import map_coordinates

    stack = np.random.default_rng(0).random((48, 48, 40), dtype=np.float32)
    positions = slice_positions(40, 160)
    grid = np.meshgrid(np.arange(48.0), np.arange(48.0), positions, indexing="ij")

    def matrix() -> np.ndarray:
        return resample_last_axis(stack, interpolation_matrix(40, positions))

    def scipy() -> np.ndarray:
        return map_coordinates(stack, grid, order=3, mode="nearest")

    difference = float(np.abs(matrix() - scipy())[:, :, 8:-8].max())
    times = interleaved({"scipy": scipy, "matrix": matrix}, rounds)
    print_ratio("cubic B-spline: scipy / matrix", times["scipy"], times["matrix"])
    print(f"    largest difference {difference:.1e} of a range of 1")


def layouts(rounds: int) -> None:
    """The shipped network on a window: naive form, our form, and the convolution probe."""
    window = torch.rand(2, 1, 64, 64, 12)
    naive, ours = naive_network(), shipped_network()
    probe = nn.Conv3d(16, 16, 3, padding=1).to(memory_format=torch.channels_last_3d)
    block = torch.rand(2, 16, 12, 64, 64).to(memory_format=torch.channels_last_3d)

    def one_by_one() -> torch.Tensor:
        return torch.cat([naive(window[:1]), naive(window[1:])])

    contestants = {"naive": one_by_one, "ours": lambda: ours(window), "probe": lambda: probe(block)}
    with torch.inference_mode():
        print(f"largest difference of the forms {float((one_by_one() - ours(window)).abs().max()):.1e}")
    times = interleaved(contestants, rounds)
    print_ratio(
        "window 2 x 64 x 64 x 12 -> 48: naive (fp32, NCDHW, batch 1) / ours", times["naive"], times["ours"]
    )
    work = [giga_multiplications(network, *one.shape) for network, one in ((ours, window), (probe, block))]
    what = f"ours / convolution probe ({work[0]:.1f} against {work[1]:.1f} GMAC)"
    print_ratio(what, times["ours"], times["probe"])


def planes(rounds: int) -> None:
    """The shipped plane prior, in float32 and with its blocks in 8 bit integers."""
    if not native_int8("cpu"):
        print("this processor does not multiply 8 bit integers: planes stay float32")
        return
    prior = shipped_network().prior
    assert prior is not None
    some = torch.rand(4, 1, 240, 40)
    fast = prior.in_int8([(some, float(RATIO), 1.0)])
    times = interleaved(
        {"float32": lambda: prior(some, float(RATIO)), "int8": lambda: fast(some, float(RATIO))}, rounds
    )
    print_ratio("4 planes 240 x 40 -> 160: float32 / int8", times["float32"], times["int8"])


def full_width(rounds: int) -> None:
    """The published width, untrained, against what a convolution of its first stage reaches on the same voxels."""
    torch.manual_seed(0)
    network = channels_last(SliceSRNet(1.0, head="uncertainty")).eval()
    probe = nn.Conv3d(64, 64, 3, padding=1).to(memory_format=torch.channels_last_3d)
    window = torch.rand(2, 1, 64, 64, 12)
    block = torch.rand(2, 64, 12, 64, 64).to(memory_format=torch.channels_last_3d)
    times = interleaved({"network": lambda: network(window), "probe": lambda: probe(block)}, rounds)
    work = [giga_multiplications(one, *shape.shape) for one, shape in ((network, window), (probe, block))]
    print_ratio(
        f"full width: time / time at the rate of the probe ({work[0]:.0f} against {work[1]:.1f} GMAC)",
        times["network"] / work[0],
        times["probe"] / work[1],
    )


def memory(size: list[int]) -> None:
    """Peak memory of the inferer over its output (image and uncertainty, float32)."""
    output = 2 * 4 * size[0] * size[1] * size[2] * RATIO / 2**20
    what = f"peak memory of network and inferer / output ({output:.0f} MiB)"
    print(f"{what}, tensors alone: {tensors_peak(measured(*size)) / output:.2f}")
    peaks = [peak_of("benchmarks.speed.slice_sr:measured", *size) for _ in range(3)]
    found = [f"{peak / output:.2f}" for peak in peaks if peak is not None]
    if found:
        print(f"{what}, in processes of their own: {', '.join(found)}")


def measured(*size: int) -> Callable[[], object]:
    """What :func:`memory` measures, warmed up."""
    chosen, network = settings(), shipped_network()
    inferer = VolumeInferer(group=chosen["group"], tile=chosen["tile"])
    stack = MetaTensor(torch.rand(1, 1, *size), affine=torch.diag(torch.tensor([1.0, 1.0, RATIO, 1.0])))
    inferer(stack[..., :64, :64, :8], network)
    return lambda: inferer(stack, network)


def volume(size: list[int]) -> None:
    """Wall time of a whole volume on all threads, with the time of twice the slices."""
    torch.set_num_threads(2)
    network, chosen = shipped_network(), settings()
    inferer = SliceGroupInferer(group=chosen["group"], tile=chosen["tile"])
    times = []
    for depth in (size[2] // 2, size[2]):
        stack = torch.rand(1, 1, size[0], size[1], depth)
        since = time.monotonic()
        inferer(stack, network, scale=float(RATIO))
        times.append(time.monotonic() - since)
    what = f"{size[0]} x {size[1]} x {size[2]} to x {size[2] * RATIO}"
    reduced = "int8" if inferer.int8_planes else "float32"
    print(f"{what}, 2 threads, planes {reduced}: {times[1]:.1f} s of network and inferer wall time")
    print(f"twice the slices take {times[1] / times[0]:.2f} times as long")


def command(size: list[int]) -> None:
    """Wall time from the command to the files: start of Python, checks, reading, network, writing, and the figure."""
    with tempfile.TemporaryDirectory() as folder:
        scan = Path(folder) / "scan.nii.gz"
        # Tissue everywhere, which no head has: the slowest case.
        values = np.random.default_rng(0).random(size, dtype=np.float32)
        write_nifti(scan, values, affine=np.diag([1.0, 1.0, RATIO, 1.0]))
        since = time.monotonic()
        run_config(BUNDLE, ["inference.json"], {"dataset_dir": folder}, output=Path(folder) / "out")
        seconds = time.monotonic() - since
    print(
        f"{size[0]} x {size[1]} x {size[2]}, tissue everywhere: {seconds:.1f} s from the command to the files"
    )


if __name__ == "__main__":
    main()
