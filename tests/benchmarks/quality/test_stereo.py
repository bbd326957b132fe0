from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import stereo

PROTOCOL = "psnr-v1:rgb:border0:full:u8:both-views"


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, Any]]]:
    """What the bundle's command is asked for; it writes a row for each method."""
    calls: list[tuple[list[str], dict[str, Any]]] = []

    def run(
        bundle: str, configs: Sequence[str], settings: Mapping[str, Any], *, output: Path, **_: Any
    ) -> None:
        assert bundle == stereo.BUNDLE
        calls.append((list(configs), dict(settings)))
        output.mkdir(parents=True)
        methods = ["bicubic", "network", *([] if "one_view" in settings else ["network, one view"])]
        rows = [
            {
                **{"case": "scared-1", "group": "scared", "method": method, "protocol": PROTOCOL},
                **{"psnr_db": 30.0 + len(calls), "ssim": 0.9, "disparity_mae_px": 1.0},
            }
            for method in methods
        ]
        (output / "pairs.json").write_text(json.dumps({"rows": rows}))

    monkeypatch.setattr(stereo, "run_config", run)
    monkeypatch.setenv("MEDSR_DATA", str(tmp_path))
    monkeypatch.setattr(stereo, "write_pairs", lambda *_: tmp_path / "pairs")
    return calls


def test_each_network_has_its_name_and_interpolation_is_there_once(
    asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", ["stereo", str(tmp_path / "out"), "--report", str(page)])
    stereo.main()
    x4, x2 = page.read_text().split("## x2")
    rows = [
        [cell.strip() for cell in line.split("|")[3:5]] for line in x4.splitlines() if "| scared |" in line
    ]
    assert rows == [
        ["bicubic", "31.00"],
        ["network", "31.00"],
        ["network, one view", "31.00"],
        ["network, ensemble", "32.00"],
        ["SEGSRNet", "33.00"],
        ["SEGSRNet, one view", "33.00"],
        ["FMEN, each view alone", "34.00"],
    ]
    # Weights of FMEN are there for x4 alone.
    assert "FMEN" not in x2
    assert [configs for configs, _ in asked] == [
        ["inference.json", "evaluate.json"],
        ["inference.json", "evaluate.json"],
        ["inference.json", "segsrnet.json", "evaluate.json"],
        ["inference.json", "evaluate.json"],
        ["inference.json", "x2.json", "evaluate.json"],
        ["inference.json", "x2.json", "evaluate.json"],
        ["inference.json", "x2.json", "segsrnet.json", "evaluate.json"],
    ]
    assert [settings.get("ensemble", False) for _, settings in asked] == [n in (1, 5) for n in range(7)]
    weights = Path(asked[3][1]["weights"])
    assert weights.is_file()
    assert weights.parents[1].name == "image_fmen_superres"
