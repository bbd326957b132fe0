"""Bundles of nothing but configs, for the modules that read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TRAIN = {
    "bundle_root": "x",
    "output_dir": "$@bundle_root + '/eval'",
    "nothing": None,
    "overwrite": False,
    "network_def": {"_target_": "UNet", "channels": [8, 16]},
    "train": {"trainer": {"_target_": "Trainer", "max_epochs": 10}, "handlers": [{"_target_": "Stats"}]},
}


def _write_bundle(folder: Path, name: str, **metadata: Any) -> Path:
    root = folder / name
    (root / "configs").mkdir(parents=True)
    (root / "models").mkdir()
    facts = {
        "name": name.title(),
        "version": "0.1.0",
        "task": "sharpens",
        "description": "It sharpens.",
        **metadata,
    }
    (root / "configs" / "metadata.json").write_text(json.dumps(facts))
    (root / "configs" / "train.json").write_text(json.dumps(TRAIN))
    (root / "configs" / "inference.json").write_text(json.dumps({"scale": [1, 1, 4], "output_dir": "out"}))
    return root


@pytest.fixture
def make_bundle() -> Callable[..., Path]:
    """Write a bundle of that name into a folder, with further facts for its metadata."""
    return _write_bundle


@pytest.fixture
def bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two bundles, which is where bundles are looked for."""
    folder = tmp_path / "bundles"
    _write_bundle(folder, "mri_superres")
    _write_bundle(folder, "image_superres", scale=4)
    (folder / "not_a_bundle").mkdir()
    monkeypatch.setenv("MEDSR_BUNDLES", str(folder))
    return folder
