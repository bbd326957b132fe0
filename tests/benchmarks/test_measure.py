from __future__ import annotations

import itertools
import mmap
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from medsr.networks.fmen import FMEN
from medsr.networks.se_gan import SEGenerator
from medsr.networks.vdsr import VDSR

from benchmarks.measure import (
    added_peak,
    giga_multiplications,
    interleaved,
    peak_of,
    print_ratio,
    tensors_peak,
)


def test_contestants_take_turns_and_the_first_run_does_not_count() -> None:
    calls: list[str] = []
    times = interleaved(
        {name: (lambda name=name: calls.append(name)) for name in "ab"},
        5,
        clock=itertools.count().__next__,
    )
    assert calls[:2] == ["a", "b"]
    assert all(set(calls[k : k + 2]) == {"a", "b"} for k in range(0, len(calls), 2))
    assert [times[name].tolist() for name in "ab"] == [[1] * 5] * 2


def test_the_ratio_is_the_median_of_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    # The machine was ten times slower in one round, for both alike.
    print_ratio("a / b", np.array([2.0, 20.0, 2.0]), np.array([1.0, 10.0, 4.0]))
    assert capsys.readouterr().out.startswith("a / b: 2.00 (10 to 90 %: 0.80 to 2.00, 3 pairs)")


@pytest.mark.parametrize(
    ("make", "expected"),
    [(lambda: FMEN(fused=True), 22.28), (VDSR, 699.41), (lambda: SEGenerator(image_skip=True), 129.97)],
)
def test_multiplications_are_counted_without_computing(
    make: Callable[[], torch.nn.Module], expected: float
) -> None:
    network = make().eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert giga_multiplications(network, 1, 3, 256, 256) == pytest.approx(expected, abs=0.01)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_tensors_count_while_they_are_there() -> None:
    def run() -> torch.Tensor:
        first = torch.zeros(2**20)
        second = first + 1
        del first
        return second * 2

    # Two of 4 MiB at a time, of three; again and again.
    assert [tensors_peak(run) for _ in range(3)] == pytest.approx([8, 8, 8], abs=0.1)
    assert tensors_peak(lambda: None) == 0


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell")


@needs_linux
def test_the_peak_is_seen_after_it_is_over() -> None:
    def run() -> None:
        # From the system itself: NumPy may get what earlier tests gave back to the process.
        with mmap.mmap(-1, 64 * 2**20) as block:
            for page in range(0, len(block), mmap.PAGESIZE):
                block[page] = 1

    found = added_peak(run)
    assert found == pytest.approx(64, abs=8)
    assert added_peak(lambda: None) == pytest.approx(0, abs=8)


@needs_linux
@pytest.mark.slow
def test_the_peak_of_another_process_and_its_error() -> None:
    result_mib = 3 * 2048**2 * 4 / 2**20
    found = peak_of("benchmarks.quality.sisr:measured", "bicubic", 512, 512)
    assert found is not None
    assert result_mib < found < 8 * result_mib
    with pytest.raises(RuntimeError, match="ModuleNotFoundError"):
        peak_of("benchmarks.no_such_module:run")
