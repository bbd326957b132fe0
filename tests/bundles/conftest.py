"""What the tests of bundles share: one phantom on disk, and the two front doors as processes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from medsr.cli import main

SIZE, ROWS, SPACING_MM = 40, 36, 4.0


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    import nibabel as nib

    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine, dtype=array.dtype)
    image.set_qform(affine, code=1)
    nib.save(image, path)
    return path


@pytest.fixture(scope="session")
def head_phantom() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """The head as an array with its affine: 40 x 36 x 10 with 4 mm slices, or isotropic with ``spacing_mm=1``.

    Two different in-plane sizes, so that exchanged axes show.
    """

    def make(spacing_mm: float = SPACING_MM) -> tuple[np.ndarray, np.ndarray]:
        import torch
        from medsr.phantoms import head
        from medsr.transforms.thick_slices import SimulateThickSlices
        from monai.data import MetaTensor

        sharp, affine = head(SIZE)
        sharp = sharp[:, :ROWS]
        if spacing_mm == 1:
            return sharp, affine
        image = MetaTensor(torch.as_tensor(sharp)[None], affine=torch.as_tensor(affine))
        thick = SimulateThickSlices(spacing_mm)(image)
        return np.asarray(thick[0]), np.asarray(thick.affine, dtype=np.float64)

    return make


@pytest.fixture(scope="session")
def phantom(head_phantom: Callable[..., Any]) -> Callable[..., Path]:
    """Write the head phantom as NIfTI and return its path; ``spacing_mm`` as in ``head_phantom``."""

    def write(path: Path, spacing_mm: float = SPACING_MM) -> Path:
        return write_nifti(path, *head_phantom(spacing_mm))

    return write


@pytest.fixture(scope="session")
def phantom_mask(head_phantom: Callable[..., Any]) -> Callable[..., Path]:
    """Write a mask of what is bright in the head phantom; ``spacing_mm`` as in ``head_phantom``."""

    def write(path: Path, spacing_mm: float = SPACING_MM) -> Path:
        volume, affine = head_phantom(spacing_mm)
        return write_nifti(path, np.uint8(volume > 600), affine)

    return write


@pytest.fixture(scope="session")
def nifti() -> Callable[[Path, np.ndarray, np.ndarray], Path]:
    return write_nifti


def _call(words: Sequence[object], **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        **settings,
    )


@pytest.fixture(scope="session")
def call() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``python -m <words>`` to its end; ``cwd`` and other settings of ``subprocess.run`` may be given."""
    return _call


@pytest.fixture(scope="session")
def monai_run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``python -m monai.bundle run`` with config files and settings; None leaves a setting out."""

    def run(
        configs: Path | Sequence[Path], *, cwd: Path | None = None, **settings: object
    ) -> subprocess.CompletedProcess[str]:
        files = str(configs) if isinstance(configs, Path) else str([str(path) for path in configs])
        words: list[object] = ["monai.bundle", "run", "--config_file", files]
        for key, value in settings.items():
            words += [] if value is None else [f"--{key}", value]
        return _call(words, cwd=cwd)

    return run


@pytest.fixture(scope="session")
def medsr_run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``medsr run`` on inputs, with settings; ``python -m medsr.cli`` would not be the installed command."""

    def run(
        bundle: object, inputs: Sequence[Path], output: Path, *, cwd: Path | None = None, **settings: object
    ) -> subprocess.CompletedProcess[str]:
        words = [Path(sys.executable).with_name("medsr"), "run", bundle, *inputs, "-o", output]
        if settings:
            words += ["--set", *(f"{key}={value}" for key, value in settings.items())]
        return subprocess.run(
            [str(word) for word in words], capture_output=True, text=True, timeout=300, cwd=cwd
        )

    return run


@pytest.fixture
def medsr_here(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str]]]:
    """``medsr run`` in this process, which saves the imports: exit status and the lines on stderr."""

    def run(
        bundle: str, *inputs: Path, out: Path, config: Sequence[str] = (), settings: Sequence[str] = ()
    ) -> tuple[int, list[str]]:
        words = ["run", bundle, *map(str, inputs), "-o", str(out), "--quiet"]
        words += ["--config", *config] if config else []
        words += ["--set", *settings] if settings else []
        capfd.readouterr()
        status = main(words)
        return status, [line for line in capfd.readouterr().err.splitlines() if line.strip()]

    return run


@pytest.fixture
def weights(tmp_path: Path) -> Callable[..., Path]:
    """Write the weights of a network, named after its class, and return the file."""

    def write(network: Any) -> Path:
        from medsr.handlers.training import save_weights

        path = tmp_path / "random" / f"{type(network).__name__}.pt"
        path.parent.mkdir(exist_ok=True)
        save_weights(network.state_dict(), path)
        return path

    return write


def error_lines(text: str) -> list[str]:
    """What a user sees of an error on stderr: our own line, or a log record of level ERROR."""
    return [line for line in text.splitlines() if line.startswith("medsr: error:") or " - ERROR - " in line]


@pytest.fixture(scope="session")
def one_error() -> Callable[[subprocess.CompletedProcess[str]], str]:
    """The single line in which a process that failed says why; no traceback beside it."""

    def check(process: subprocess.CompletedProcess[str]) -> str:
        assert process.returncode != 0, process.stderr
        assert "Traceback" not in process.stderr, process.stderr
        lines = error_lines(process.stderr)
        assert len(lines) == 1, process.stderr
        return lines[0]

    return check


@pytest.fixture
def vgg19_file(tmp_path: Path) -> tuple[Path, str]:
    """A file with the tensors of VGG19, all of one value, and its SHA-256."""
    import torch

    file = tmp_path / "vgg19.pth"
    blocks = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))
    state, channels, place = {}, 3, 0
    for width, convolutions in blocks:
        for _ in range(convolutions):
            # Constants that need no space.
            state[f"features.{place}.weight"] = torch.full((1,), 1 / (9 * channels)).expand(
                width, channels, 3, 3
            )
            state[f"features.{place}.bias"] = torch.zeros(1).expand(width)
            channels, place = width, place + 2
        place += 1
    torch.save(state, file)
    return file, hashlib.sha256(file.read_bytes()).hexdigest()
