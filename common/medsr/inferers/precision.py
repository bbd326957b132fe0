"""Fewer bits where the hardware is faster with them and the network stays the same, float32 elsewhere."""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from medsr.errors import SettingError
from medsr.networks.blocks import ResidualBlocks
from medsr.networks.int8 import Int8ResidualBlocks, native_int8
from medsr.networks.plane_prior import PlanePrior

__all__ = [
    "PRECISIONS",
    "checked_precision",
    "choose_planes",
    "choose_precision",
    "native_bfloat16",
    "precision_name",
]

_log = logging.getLogger(__name__)

Example = tuple[Tensor, float, float]
"""Planes, scale and thickness."""

PRECISIONS = ("auto", "float32", "bfloat16")

_GAIN = 1.2
"""How much faster fewer bits have to be on a CPU: processors that have bfloat16 are twice as fast with it, or half as
fast; a processor that has 8 bit integers takes less than half the time with them."""


def precision_name(dtype: torch.dtype) -> str:
    """What a report calls a data type.

    Example:
        >>> precision_name(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def native_bfloat16(device: torch.device | str) -> bool:
    """Whether the device multiplies bfloat16 in hardware and, on a CPU, faster than float32.

    Emulated, it is several times slower. Some processors have the instructions of AVX-512 for it, but need more time
    with them than with float32: there, one convolution is timed, once per process.

    Example:
        >>> native_bfloat16("cpu") in (True, False)
        True
    """
    kind = torch.device(device).type
    if kind == "cuda":
        # Emulation counts by default, and the question is about the current device.
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    found = torch.cpu.get_capabilities()
    if not (found.get("avx512_bf16") or found.get("amx_bf16") or found.get("arm_bf16")):
        return False
    return _speed_up_of_bfloat16() > _GAIN


# On Windows the clock of a thread ticks only every 16 ms.
_clock = time.perf_counter if sys.platform == "win32" else time.thread_time


@functools.cache
def _speed_up_of_bfloat16() -> float:
    """Of a convolution on the CPU, under autocast to bfloat16."""
    with torch.random.fork_rng(devices=()):
        convolution = nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last)
        image = torch.rand(1, 64, 64, 64).to(memory_format=torch.channels_last)

    def run(*, reduced: bool) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=reduced):
            convolution(image)

    return _speed_up(run)


@functools.cache
def _speed_up_of_int8(other: torch.dtype = torch.float32) -> float:
    """Of a residual block on the CPU, in 8 bit integers instead of another type."""
    with torch.random.fork_rng(devices=()):
        layers = nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 32, 3, padding=1)
        exact = ResidualBlocks([nn.Sequential(*layers)]).to(memory_format=torch.channels_last)
        image = torch.rand(1, 32, 64, 64).to(memory_format=torch.channels_last)
    fast = Int8ResidualBlocks(exact, [image])

    def run(*, reduced: bool) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=other == torch.bfloat16):
            (fast if reduced else exact)(image)

    return _speed_up(run)


@torch.no_grad()
def _speed_up(run: Callable[..., None]) -> float:
    """Time that something takes as it is, divided by the time it takes ``reduced``."""
    threads = torch.get_num_threads()
    # Other work on the machine may meet one of them alone: one thread, which waits for no other, by its own clock, in
    # turns, and the fastest of several.
    torch.set_num_threads(1)
    try:
        fastest = dict.fromkeys((True, False), float("inf"))
        for _ in range(8):
            for reduced in fastest:
                start = _clock()
                run(reduced=reduced)
                fastest[reduced] = min(fastest[reduced], _clock() - start)
    finally:
        torch.set_num_threads(threads)
    return fastest[False] / fastest[True]


def checked_precision(wanted: str) -> str:
    """The setting ``amp``, refused before any computing if there is no such precision.

    Args:
        wanted: as it was given.

    Raises:
        SettingError: for an unknown word.

    Example:
        >>> checked_precision("half")
        Traceback (most recent call last):
        medsr.errors.SettingError: amp must be one of auto, float32, bfloat16, got 'half'
    """
    if wanted not in PRECISIONS:
        raise SettingError(f"amp must be one of {', '.join(PRECISIONS)}, got '{wanted}'")
    return wanted


def choose_precision(
    wanted: str, run: Callable[[Tensor], Tensor], window: Tensor, *, tolerance: float = 0.01
) -> torch.dtype:
    """Data type of the convolutions: bfloat16 only if native and, on one window, equal to float32 within tolerance.

    Some releases of the GPU libraries compute 3D convolutions wrongly in bfloat16; a glance at one window is cheap.

    Args:
        wanted: ``auto``, ``float32`` or ``bfloat16`` (which skips the question whether it is native).
        run: the network on one window.
        window: input of the trial.
        tolerance: largest mean absolute difference, relative to the spread of the float32 result.

    Raises:
        SettingError: for an unknown word.
    """
    checked_precision(wanted)
    if wanted == "float32" or (wanted == "auto" and not native_bfloat16(window.device)):
        return torch.float32
    exact = run(window).float()
    with torch.autocast(window.device.type, dtype=torch.bfloat16):
        fast = run(window).float()
    difference = float((fast - exact).abs().mean() / exact.std().clamp_min(1e-6))
    if difference <= tolerance:
        return torch.bfloat16
    _log.warning(
        "bfloat16 differs from float32 by %.3g of the spread on this device: using float32", difference
    )
    return torch.float32


@torch.no_grad()
def choose_planes(
    prior: PlanePrior,
    examples: Sequence[Example],
    trials: Sequence[Example],
    *,
    other: torch.dtype = torch.float32,
    tolerance: float = 0.01,
) -> PlanePrior:
    """The prior in 8 bit integers if the processor is faster with them and some planes stay the same; or itself.

    Args:
        prior: reads planes.
        examples: planes of the scan that show the range of the features.
        trials: other planes of the scan.
        other: data type that the prior would run in; 8 bit integers have to be faster than this one.
        tolerance: largest mean absolute difference of a channel, relative to the spread of its float32 result.

    Example:
        >>> prior, plane = PlanePrior(channels=8, hidden=[16]), (torch.rand(1, 1, 8, 4), 2.0, 1.0)
        >>> choose_planes(prior, [plane], [plane]).condition is prior.condition
        True
    """
    try:
        if not native_int8(examples[0][0].device) or _speed_up_of_int8(other) < _GAIN:
            return prior
        fast = prior.in_int8(examples)
    except (ValueError, RuntimeError, TypeError) as error:
        # What is not finite is for the checks of the result to tell, and the operators are not promised for ever.
        _log.debug("planes stay %s: %s", other, error)
        return prior
    exact, found = (
        torch.cat([run(*trial).transpose(0, 1).flatten(1) for trial in trials], 1) for run in (prior, fast)
    )
    # Logits of labels spread much wider than an image does.
    difference = float(((found - exact).abs().mean(1) / exact.std(1).clamp_min(1e-6)).max())
    if difference <= tolerance:
        return fast
    _log.info("planes in 8 bits differ by %.3g of the spread: using %s", difference, other)
    return prior
