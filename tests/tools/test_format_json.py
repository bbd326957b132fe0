from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("format_json", ROOT / "tools" / "format_json.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["format_json"] = module
    spec.loader.exec_module(module)
    return module


format_json = _load()

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
DOCUMENTS = st.recursive(
    SCALARS, lambda children: st.lists(children) | st.dictionaries(st.text(), children), max_leaves=25
)


@given(DOCUMENTS)
def test_content_and_key_order_are_kept_and_formatting_twice_changes_nothing(document: object) -> None:
    once = format_json.formatted(json.dumps(document))
    assert json.dumps(json.loads(once)) == json.dumps(document)
    assert format_json.formatted(once) == once
    assert once.endswith("\n")


@given(st.dictionaries(st.text(max_size=12), st.lists(st.integers(-99, 99), max_size=60), min_size=1))
def test_lines_stay_within_the_width(document: object) -> None:
    assert max(map(len, format_json.formatted(json.dumps(document)).splitlines())) <= format_json.WIDTH


def test_what_fits_stays_on_one_line_and_the_rest_is_expanded() -> None:
    text = format_json.formatted(json.dumps({"roi": [96, 96, 64], "long": ["word"] * 40, "empty": {}}))
    lines = text.splitlines()
    assert lines[1] == '    "roi": [96, 96, 64],'
    assert lines[2] == '    "long": ['
    assert lines[3] == '        "word",'
    assert lines[-2] == '    "empty": {}'


def test_the_comma_counts_as_a_column() -> None:
    fits = format_json.WIDTH - len('    "a": [],') - len('""')
    for length, lines in ((fits, 1), (fits + 1, 3)):
        text = format_json.formatted(json.dumps({"a": ["x" * length], "b": 1}))
        assert len(text.splitlines()) == 3 + lines


def test_numbers_and_characters_keep_their_spelling() -> None:
    text = format_json.formatted('{"lr": 1e-4, "one": 1.0, "big": 12345678901234567890, "unit": "µm"}')
    for spelling in ("1e-4", "1.0", "12345678901234567890", "µm"):
        assert spelling in text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('{"b": {"a": 1, "a": 1}}', "'a' stands twice"),
        ('{"a": NaN}', "NaN is not JSON"),
        ("{", "Expecting"),
    ],
)
def test_what_it_refuses(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        format_json.formatted(text)


def test_check_lists_files_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "a" / "good.json", tmp_path / "a" / "bad.json"
    good.parent.mkdir()
    good.write_text('{\n    "a": [1, 2]\n}\n')
    bad.write_text('{"a": [1,2]}')
    assert format_json.main(["--check", str(tmp_path)]) == 1
    assert bad.read_text() == '{"a": [1,2]}'
    error = capsys.readouterr().err
    assert "bad.json" in error
    assert "good.json" not in error

    assert format_json.main([str(tmp_path)]) == 0
    assert bad.read_text() == good.read_text()
    assert format_json.main(["--check", str(tmp_path)]) == 0


def test_a_file_that_is_refused_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "twice.json"
    path.write_text('{"a": 1, "a": 2}')
    assert format_json.main([str(path)]) == 1
    assert path.read_text() == '{"a": 1, "a": 2}'
    assert "twice.json" in capsys.readouterr().err


def test_no_files_is_not_an_error(tmp_path: Path) -> None:
    assert format_json.main(["--check", str(tmp_path)]) == 0
