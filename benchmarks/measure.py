"""What networks cost: interleaved times, multiplications, and the peak of the memory."""

from __future__ import annotations

import contextlib
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]


def machine() -> str:
    """What processor this is, as well as the system tells.

    Example:
        >>> bool(machine())
        True
    """
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, np.ndarray]:
    """Seconds of each contestant in each round, in a random order within it, after one run to warm up.

    What the machine does beside meets all of them alike, so the ratio of two in one round means something.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    with torch.inference_mode():
        for run in contestants.values():
            run()
        for _ in range(rounds):
            for name in random.sample(list(contestants), len(contestants)):
                since = clock()
                contestants[name]()
                times[name].append(clock() - since)
    return {name: np.array(found) for name, found in times.items()}


def print_ratio(what: str, first: np.ndarray, second: np.ndarray) -> None:
    """Print the median of the paired ratios, with the range from the 10th to the 90th percentile."""
    low, middle, high = np.percentile(first / second, [10, 50, 90])
    print(f"{what}: {middle:.2f} (10 to 90 %: {low:.2f} to {high:.2f}, {len(first)} pairs)")


def giga_multiplications(network: nn.Module, *shape: int) -> float:
    """10^9 multiply-accumulate operations of convolutions and linear layers for an input; nothing is computed."""
    with (
        FlopCounterMode(display=False) as counter,
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
    ):
        network(torch.empty(shape))
    return counter.get_total_flops() / 2 / 1e9


def peak_of(call: str, *arguments: object) -> float | None:
    """MiB above what was there before that a function's result takes at most, measured in a process of its own.

    Args:
        call: ``module:function``; the function prepares everything and returns what is to be measured.
        arguments: for the function.

    Returns:
        None where the system does not tell.
    """
    module, _, function = call.partition(":")
    code = (
        f"from {module} import {function}\n"
        "from benchmarks.measure import added_peak\n"
        f"print(added_peak({function}(*{arguments!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise RuntimeError(f"{call} in a process of its own: {done.stderr.strip()}")
    found = done.stdout.split()[-1]
    return None if found == "None" else float(found)


def added_peak(run: Callable[[], object]) -> float | None:
    """MiB by which the memory of this process grows while ``run`` runs; Linux only, else None."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")
    except OSError:
        return None
    before = _kibibytes(status, "VmRSS")
    run()
    return (_kibibytes(status, "VmHWM") - before) / 1024


def tensors_peak(run: Callable[[], object]) -> float:
    """MiB of all tensors on the CPU that ``run`` makes and that are there at once, as PyTorch's profiler saw it.

    Below :func:`added_peak` by what the C library keeps of memory that was given back, and by buffers of the kernels.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = run()
        # What is freed later the profiler does not see, and counts in the next call.
        del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    sizes = (event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")
    return max(sizes, default=0) / 2**20


def _kibibytes(status: Path, field: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))
