"""What the demos share: a bundle's own command, shown and run, and what it gave."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medsr.metrics.image import ImageProtocol

ROOT = Path(__file__).resolve().parents[2]


def run_bundle(name: str, inputs: Path, output: Path) -> float:
    """Run a bundle on a folder as a user would, and return the seconds that it took."""
    config = ROOT / "bundles" / name / "configs" / "inference.json"
    command = ["-m", "monai.bundle", "run", "--config_file", str(config)]
    command += ["--dataset_dir", str(inputs), "--output_dir", str(output)]
    print("running:", " ".join(["python", *(word.replace(f"{ROOT}/", "") for word in command)]))
    since = time.monotonic()
    subprocess.run([sys.executable, *command], check=True, stderr=subprocess.DEVNULL)
    return time.monotonic() - since


def print_scores(
    protocol: ImageProtocol, results: Mapping[str, Sequence[Any]], truth: Sequence[Any], mask: Any = None
) -> None:
    """Print PSNR and SSIM of each result, means over its images."""
    for name, images in results.items():
        scores = [protocol.score(image, true, mask) for image, true in zip(images, truth, strict=True)]
        psnr_db, ssim = (sum(float(one[key]) for one in scores) / len(scores) for key in ("psnr_db", "ssim"))
        print(f"  {name:22s} {psnr_db:6.2f} dB   SSIM {ssim:.4f}")


def print_files(folder: Path, names: Sequence[str]) -> None:
    """Say where the results lie."""
    print("\nlook at:")
    for name in names:
        print(f"  {folder / name}")
