from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.quality import superres


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    monkeypatch.setattr(superres, "ThroughPlaneComparison", lambda *_, **__: pytest.fail("it was run"))
    monkeypatch.setattr(sys, "argv", ["superres", *words])
    with pytest.raises(SystemExit) as stop:
        superres.main()
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_data_folder_that_was_given_is_not_replaced(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("MEDSR_DATA", raising=False)
    line = refusal(monkeypatch, capsys, "--data", str(tmp_path))
    assert "pat0003/T1c_subtrMeanDivStd.nii.gz: there is no such file" in line
    monkeypatch.setenv("MEDSR_DATA", str(tmp_path))
    assert "there is no such file" in refusal(monkeypatch, capsys)


def test_a_mean_over_fewer_subjects_than_asked_for_is_refused(monkeypatch, capsys, tmp_path: Path):
    there = tmp_path / superres.SUBJECTS["head-t1"]
    there.parent.mkdir(parents=True)
    there.touch()
    words = ("--data", str(tmp_path), "--subjects", "head-t1", "oasis-t1-a")
    assert "subjA_T1.nii.gz: there is no such file" in refusal(monkeypatch, capsys, *words)


def test_an_unknown_subject_is_refused(monkeypatch, capsys):
    assert "invalid choice: 'nope'" in refusal(monkeypatch, capsys, "--subjects", "nope")
