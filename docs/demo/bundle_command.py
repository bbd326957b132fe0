"""What the demos share: a bundle's own command, shown and run."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

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
