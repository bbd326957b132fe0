from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks.data import add_data


def parse(*words: str) -> Path:
    parser = argparse.ArgumentParser(prog="bench")
    add_data(parser)
    return parser.parse_args(words).data


def test_the_folder_is_that_of_the_option_else_of_the_environment(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("MEDSR_DATA", str(tmp_path))
    assert parse() == tmp_path
    assert parse("--data", str(tmp_path / "other")) == tmp_path / "other"


def test_a_folder_that_is_not_there_is_named_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MEDSR_DATA", str(tmp_path / "none"))
    with pytest.raises(SystemExit):
        parse()
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith("none: there is no such folder; set MEDSR_DATA to that of the images")
