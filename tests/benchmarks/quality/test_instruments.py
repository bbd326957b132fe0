from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from medsr.metrics.frames import frame_scores
from PIL import Image

from benchmarks import commands as run_commands
from benchmarks.quality import instruments


class Commands:
    """Stands in for the bundle's commands: writes what they would, and remembers what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], dict[str, Any]]] = []

    def __call__(
        self, bundle: str, configs: Sequence[str], settings: Mapping[str, Any], *, output: Path, **_: Any
    ) -> None:
        assert bundle == instruments.BUNDLE
        self.asked.append((list(configs), dict(settings)))
        output.mkdir(parents=True)
        if configs[0] == "train.json":
            (output / "train_record.json").write_text('{"iterations": 7, "minutes": 0.5, "history": []}')
            return
        (group,), scale = settings["groups"], settings.get("study_scale")
        inputs = ["sharp", *(["bicubic"] if scale else []), *settings.get("superres_weights", {})]
        found = {"sharp": [0, 1, 1, 1], "bicubic": [0, 0, 0, 1], "StereoFMEN": [0, 0, 1, 1]}
        rows = [
            {
                "case": f"{group}-1",
                "group": group,
                "network": "network",
                "input": source,
                "scale": scale or 1,
                **frame_scores(np.array([found[source]]), np.array([[0, 1, 1, 1]]), ["background", "tool"]),
            }
            for source in inputs
        ]
        (output / "frames.json").write_text(json.dumps({"rows": rows}))


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    commands = Commands()
    monkeypatch.setattr(run_commands, "run_config", commands)
    monkeypatch.setenv("MEDSR_DATA", str(tmp_path))
    (tmp_path / "superres" / "models").mkdir(parents=True)
    (tmp_path / "superres" / "models" / "model.pt").touch()
    monkeypatch.setattr(instruments.catalog, "bundle_root", lambda name: tmp_path / "superres")
    for name in ("cholec-1", "endovis17-1"):
        for part in ("images", "labels"):
            path = tmp_path / "out" / "all" / part / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4)).save(path)
    return commands


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["instruments", *map(str, words)])
    instruments.main()


def test_every_source_is_left_out_once_at_equal_minutes(commands, tmp_path, monkeypatch, capsys):
    out, report = tmp_path / "out", tmp_path / "page.md"
    run(monkeypatch, out, "--minutes", 2, "--scales", 4, "--report", report)
    trainings = [(configs, settings) for configs, settings in commands.asked if configs[0] == "train.json"]
    assert [(configs[1:], settings["leave_out"]) for configs, settings in trainings] == [
        (overlays, [group]) for group in ("cholec", "endovis17") for overlays in ([], ["flexible_unet.json"])
    ]
    assert {(s["minutes"], s["iterations"]) for _, s in trainings} == {(2, 10**6)}
    scorings = [(configs, settings) for configs, settings in commands.asked if configs[0] != "train.json"]
    assert len(scorings) == 2 * 2 * 3
    for number, (configs, settings) in enumerate(scorings):
        # Scored on what the weights have not seen, by the network that they are of; last on what they have.
        overlays = configs[1:-1]
        network = next(name for name, files in instruments.NETWORKS.items() if files == overlays)
        (group,) = settings["groups"]
        unseen = group if number % 3 < 2 else {"cholec": "endovis17", "endovis17": "cholec"}[group]
        assert settings["weights"] == out / unseen / network / "model.pt"
    text = report.read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert text.count("## x4") == 1
    assert "SPP-LinkNet, StereoFMEN: Dice +0.300 against bicubic, closed: 60%" in text
    assert "| cholec | SPP-LinkNet | 7 | 0.5 |" in text
    command = (
        "`python -m benchmarks.quality.instruments OUTPUT --groups cholec endovis17 --minutes 2 --scales 4`"
    )
    assert command in text
    own = text.partition("## On the frames of the training")[2].partition("## Trainings")[0]
    assert [line.split(" | ")[:2] for line in own.splitlines() if "| sharp |" in line] == [
        *[["| endovis17", "1"]] * 2,
        *[["| cholec", "1"]] * 2,
        *[["| all", "2"]] * 2,
    ]
    assert str(tmp_path) not in text
    found = json.loads((out / "instruments.json").read_text())
    for rows in (found["rows"], found["rows of the training"]):
        assert {row["network"] for row in rows} == set(instruments.NETWORKS)


def test_what_the_super_resolution_learnt_from_is_no_gap_that_it_closed(
    commands, tmp_path, monkeypatch, capsys
):
    run(monkeypatch, tmp_path / "out", "--minutes", 1.5, "--groups", "endovis17", "--scales", 4)
    text = capsys.readouterr().out
    assert "OUTPUT --groups endovis17 --minutes 1.5 --scales 4`" in text
    # Its rows are there, with a warning; the share is not.
    assert "| endovis17 | 1 | StereoFMEN | SPP-LinkNet |" in text
    assert "learnt from the frames of endovis17" in text
    assert "against bicubic" not in text


def test_what_is_done_is_not_done_again(commands, tmp_path, monkeypatch):
    run(monkeypatch, tmp_path / "out", "--scales", 2)
    first = len(commands.asked)
    # There are no weights for x2: interpolation alone is studied.
    assert not any("superres_weights" in settings for _, settings in commands.asked)
    run(monkeypatch, tmp_path / "out", "--scales", 2)
    assert len(commands.asked) == first
    run(monkeypatch, tmp_path / "out", "--scales", 2, 4)
    assert len(commands.asked) == first + 4


def test_other_minutes_are_never_mixed_with_what_is_there(commands, tmp_path, monkeypatch):
    run(monkeypatch, tmp_path / "out", "--minutes", 2)
    with pytest.raises(SystemExit, match="was made with other settings"):
        run(monkeypatch, tmp_path / "out", "--minutes", 3)
