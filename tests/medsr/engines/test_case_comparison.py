from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from medsr.engines import case_comparison
from medsr.engines.case_comparison import CaseComparison
from medsr.errors import DataError
from medsr.handlers.run_conditions import RunConditions


class Lengths(CaseComparison):
    header: ClassVar[Mapping[str, str]] = {"protocol": "length"}
    what = "words"

    def _compare(self, case: Mapping[str, str]) -> list[dict[str, Any]]:
        if case["case"] == "bad":
            raise DataError("bad: not a word; spell it")
        return [{"case": case["case"], "length": len(case["case"])}]

    def _table(self) -> str:
        return f"{len(self.rows)} rows"


@pytest.mark.parametrize("names", [("one", "bad", "three"), ("one", "three", "bad")])
def test_a_bad_case_is_left_out_and_the_others_are_written(tmp_path, caplog, names):
    comparison = Lengths([{"case": name} for name in names], tmp_path / "rows.json")
    with caplog.at_level(logging.INFO):
        rows = comparison.run()
    assert [row["length"] for row in rows] == [3, 5]
    assert json.loads((tmp_path / "rows.json").read_text()) == {
        "protocol": "length",
        "rows": rows,
        "left_out": {"bad": "bad: not a word; spell it"},
        "notes": {},
    }
    assert "2 rows" in caplog.text
    with pytest.raises(SystemExit) as stop:
        comparison.finish()
    assert stop.value.code != 0
    assert "1 of 3 words left out" in caplog.text


def test_a_case_that_is_known_to_be_bad_is_left_out():
    comparison = Lengths([{"case": "a.nii", "error": "a.nii and a.nii.gz have one name"}, {"case": "b"}])
    assert [row["case"] for row in comparison.run()] == ["b"]
    assert comparison.left_out == {"a.nii": "a.nii and a.nii.gz have one name"}


def test_rows_of_an_earlier_run_do_not_pass_for_those_of_one_without_any(tmp_path):
    Lengths([{"case": "good"}], tmp_path / "rows.json").run()
    comparison = Lengths([{"case": "bad"}], tmp_path / "rows.json")
    assert comparison.run() == []
    found = json.loads((tmp_path / "rows.json").read_text())
    assert (found["rows"], list(found["left_out"])) == ([], ["bad"])


def test_the_rows_of_earlier_runs_are_kept_beside(tmp_path, caplog):
    for name in ("one", "three", "seven"):
        Lengths([{"case": name}], tmp_path / "rows.json").run()
    found = [
        json.loads((tmp_path / f"rows{end}.json").read_text())["rows"][0]["case"]
        for end in ("_earlier", "_earlier_2", "")
    ]
    assert found == ["one", "three", "seven"]
    assert "rows.json of an earlier comparison is kept as rows_earlier_2.json" in caplog.text


@pytest.mark.parametrize("seconds", [0.0, 1e6])
def test_a_run_that_is_stopped_keeps_its_rows(tmp_path, monkeypatch, seconds):
    monkeypatch.setattr(case_comparison, "_WRITE_SECONDS", seconds)
    written = []

    class Stopped(Lengths):
        def _compare(self, case: Mapping[str, str]) -> list[dict[str, Any]]:
            if case["case"] == "stop":
                written.append((tmp_path / "rows.json").exists())
                raise KeyboardInterrupt
            return super()._compare(case)

    with pytest.raises(KeyboardInterrupt):
        Stopped([{"case": name} for name in ("one", "stop", "never")], tmp_path / "rows.json").run()
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == [{"case": "one", "length": 3}]
    assert written == [not seconds]


def test_what_the_rows_were_made_by_stands_beside_them(tmp_path):
    comparison = Lengths([{"case": "one"}], tmp_path / "rows.json")
    comparison.device = torch.device("cpu:0")
    comparison.run(RunConditions({"scale": 4}, weights={"network": __file__}))
    made_by = json.loads((tmp_path / "rows.json").read_text())["run"]
    assert (made_by["settings"], made_by["device"]) == ({"scale": 4}, "cpu:0")
    assert len(made_by["sha256"]["network"]) == 64


def test_a_second_run_starts_anew_and_a_clean_one_ends_well():
    comparison = Lengths([{"case": "one"}])
    assert comparison.run() == comparison.run()
    assert len(comparison.rows) == 1
    comparison.finish()
