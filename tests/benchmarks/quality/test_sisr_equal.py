from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from medsr import catalog
from PIL import Image

from benchmarks.quality import sisr_equal


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What trainings are asked for; each leaves the shipped weights and a record."""
    found: list[dict[str, Any]] = []

    def train(
        bundle: str, configs: list[str], settings: dict[str, Any], *, output: Path, environment: Any
    ) -> None:
        found.append(
            {"bundle": bundle, "configs": configs, "threads": environment["OMP_NUM_THREADS"], **settings}
        )
        output.mkdir(parents=True)
        weights = torch.load(catalog.bundle_root(bundle) / "models" / "model.pt", weights_only=True)
        torch.save(weights, output / "model.pt")
        record = {"iterations": 1000, "minutes": 2.0, "precision": "float32"}
        record["settings"] = {"batch_size": 4, "crop_size": 50}
        (output / "train_record.json").write_text(json.dumps(record))

    monkeypatch.setattr(sisr_equal, "run_once", train)
    return found


def test_all_get_the_same_and_are_measured_on_the_same(
    asked: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {name: sisr_equal.METHODS[name] for name in ("VDSR", "FMEN")}
    monkeypatch.setattr(sisr_equal, "METHODS", both)
    (tmp_path / "sisr" / "Set5").mkdir(parents=True)
    rows = np.add.outer(np.arange(40), np.arange(36)) % 16 * 16
    Image.fromarray(rows.astype(np.uint8)).convert("RGB").save(tmp_path / "sisr" / "Set5" / "stripes.png")
    report = tmp_path / "page.md"
    found = sisr_equal.compare(tmp_path / "out", minutes=2.0, seed=3, data=tmp_path, report=report)
    assert [one.pop("bundle") for one in asked] == ["image_vdsr_superres", "image_fmen_superres"]
    assert asked[0] == asked[1]
    assert (asked[0]["minutes"], asked[0]["seed"], asked[0]["threads"]) == (2.0, 3, "1")
    assert [row["method"] for row in found] == ["bicubic", *both]
    assert found[1]["seen_megapixels"] == 10
    assert all(row["psnr_db"] > found[0]["psnr_db"] for row in found[1:])
    text = report.read_text()
    assert "| FMEN | 2.0 | 1000 | 4 of 50 | 10 | float32 |" in text
    assert "2 minutes of the clock on one thread" in text
    assert json.loads((tmp_path / "out" / "sisr_equal.json").read_text())["rows"] == found
