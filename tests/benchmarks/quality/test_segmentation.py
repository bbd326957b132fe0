from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import commands as run_commands
from benchmarks.quality import segmentation


class Commands:
    """Stands in for the bundles' commands: leaves a folder, in the comparison a table, and remembers the settings."""

    def __init__(self) -> None:
        self.asked: dict[str, dict[str, Any]] = {}

    def __call__(
        self, bundle: str, configs: Sequence[str], settings: Mapping[str, Any], *, output: Path, **_: Any
    ) -> None:
        self.asked[output.name] = dict(settings)
        output.mkdir(parents=True)
        names = ["perfect thick mask", "network", *settings.get("compare", {})]
        row = {"case": "glioma-3", "class": "c", "reading": "nearest", "dice": 0.5}
        (output / "masks.json").write_text(json.dumps({"rows": [{**row, "network": n} for n in names]}))


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    commands = Commands()
    monkeypatch.setattr(segmentation, "run_config", commands)
    monkeypatch.setattr(run_commands, "run_config", commands)
    monkeypatch.setattr(segmentation, "write_study", lambda *_, **__: None)
    monkeypatch.setenv("MEDSR_DATA", str(tmp_path))
    (tmp_path / "out" / "thick" / "labels").mkdir(parents=True)
    return commands


@pytest.mark.parametrize(("words", "fraction"), [([], 0.1), (["--min-island-fraction", "0"], 0)])
def test_one_island_setting_holds_for_the_whole_table(commands, tmp_path, monkeypatch, words, fraction):
    out, report = tmp_path / "out", tmp_path / "page.md"
    given = ["tumour", str(out), "--cases", "glioma-3", "--report", str(report), *words]
    monkeypatch.setattr(sys, "argv", ["segmentation", *given])
    segmentation.main()
    # The networks are trained without it and compared in one command.
    asked = {name for name, settings in commands.asked.items() if "min_island_fraction" in settings}
    assert asked == {"comparison"}
    assert commands.asked["comparison"]["min_island_fraction"] == fraction
    assert set(commands.asked["comparison"]["compare"]) == {"plain", "trained on true thin slices"}
    saved = json.loads((out / "masks.json").read_text())
    assert saved["min_island_fraction"] == fraction
    assert saved["protocol"] in report.read_text()
    assert f"min_island_fraction is {fraction:g}" in report.read_text()
    networks = [row["network"] for row in saved["rows"]]
    assert networks == ["perfect thick mask", "ours", "plain", "trained on true thin slices"]


def test_every_step_knows_the_classes_of_the_study(commands, tmp_path, monkeypatch):
    given = ["structures", str(tmp_path / "out"), "--cases", "vxm"]
    monkeypatch.setattr(sys, "argv", ["segmentation", *given])
    segmentation.main()
    assert commands.asked["ours"]["learning_rate"] == commands.asked["plain"]["learning_rate"] == 0.0005
    assert "learning_rate" not in commands.asked["start"]
    names = ["ventricle", "thalamus", "striatum", "hippocampus", "brain_stem"]
    for step in ("labels", "pseudo", "trained on true thin slices", "comparison"):
        assert list(commands.asked[step]["classes"]) == names
    trained = {"start", "ours", "plain", "trained on true thin slices", "comparison"}
    assert {
        name for name, settings in commands.asked.items() if settings.get("label_classes") == 5
    } == trained


def test_steps_are_done_once_and_never_mixed_with_those_of_other_settings(commands, tmp_path, monkeypatch):
    def run(*words: str) -> None:
        given = ["tumour", str(tmp_path / "out"), "--cases", "glioma-3", "--only", "ours", *words]
        monkeypatch.setattr(sys, "argv", ["segmentation", *given])
        segmentation.main()

    run()
    commands.asked.clear()
    shutil.rmtree(tmp_path / "out" / "glioma-3" / "comparison")
    run()
    assert set(commands.asked) == {"comparison"}
    shutil.rmtree(tmp_path / "out" / "glioma-3" / "ours")
    with pytest.raises(SystemExit, match=r"start: was made with other settings; remove it"):
        run("--start-iterations", "2000")


def test_a_report_keeps_the_cases_of_earlier_runs_with_the_same_settings(tmp_path):
    def rows(case: str, dice: float) -> list[dict[str, Any]]:
        return [{"case": case, "network": name, "dice": dice} for name in ("ours", "plain")]

    path, setting = tmp_path / "results.json", {"start": 1000, "networks": ["ours", "plain"]}
    segmentation.with_earlier(path, setting, rows("b", 0.5))
    segmentation.with_earlier(path, setting, rows("a", 0.6))
    found = segmentation.with_earlier(path, setting, rows("b", 0.7))
    assert found == json.loads(path.read_text())["rows"] == [*rows("a", 0.6), *rows("b", 0.7)]
    with pytest.raises(SystemExit, match=r"results\.json: was made with other settings"):
        segmentation.with_earlier(path, {**setting, "start": 2000}, rows("b", 0.9))
    assert json.loads(path.read_text())["rows"] == found


@pytest.mark.parametrize(
    ("study", "seen"),
    [("tumour", []), ("ms_lesion", ["ms-07"]), ("structures", ["vxm"]), ("cortex", ["vxm"])],
)
def test_pages_name_the_cases_that_the_chain_s_start_had_seen(commands, tmp_path, monkeypatch, study, seen):
    assert segmentation.seen_before(study) == seen
    report = tmp_path / "page.md"
    given = [study, str(tmp_path / "out"), "--report", str(report), "--only", "ours"]
    monkeypatch.setattr(sys, "argv", ["segmentation", *given])
    segmentation.main()
    assert segmentation.about_seen(seen) in report.read_text()
    assert all(case in segmentation.about_seen(seen) for case in seen)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--only", "nope"), "invalid choice: 'nope'"),
        (("--cases", "glioma-9"), "no case glioma-9 in tumour; there are"),
    ],
)
@pytest.mark.usefixtures("commands")
def test_names_that_do_not_exist_are_refused_before_anything_is_written(
    monkeypatch, capsys, tmp_path, words, reason
):
    monkeypatch.setattr(segmentation, "write_study", lambda *_, **__: pytest.fail("it was written"))
    monkeypatch.setattr(sys, "argv", ["segmentation", "tumour", str(tmp_path / "new"), *words])
    with pytest.raises(SystemExit) as stop:
        segmentation.main()
    assert stop.value.code == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
