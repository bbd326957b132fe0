from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.quality import report
from benchmarks.quality.superres import LOOKED_AT, SUBJECTS


def rows_of(gains: dict[str, float], *, ratios: tuple[int, ...] = (4,)) -> list[dict]:
    return [
        {
            "case": case,
            "ratio": ratio,
            "gap": 0.0,
            "method": method,
            "psnr_db": 20.0 + ratio + gain,
            "ssim": 0.5,
        }
        for case, of_case in gains.items()
        for ratio in ratios
        for method, gain in (("cubic", 0.0), ("network", of_case + (ratio - 4)))
    ]


def test_the_subjects_that_were_looked_at_are_some_of_those_reported():
    assert set(LOOKED_AT) < set(SUBJECTS)


def test_gains_are_given_with_and_without_the_subjects_that_were_looked_at():
    found = report.gains(rows_of({"a": 1.0, "b": 2.0, "head-t1": 6.0})).splitlines()
    assert found == [
        "| mean gain over cubic, dB | network |",
        "|---|---|",
        "| all subjects (3) | +3.00 ± 2.65 |",
        "| without those looked at before (2) | +1.50 ± 0.71 |",
    ]


def test_a_subject_counts_once_whatever_it_was_measured_at():
    rows = rows_of({"a": 1.0}, ratios=(3, 4, 5)) + rows_of({"b": 3.0})
    assert "| all subjects (2) | +2.00 ± 1.41 |" in report.gains(rows)


def test_without_a_subject_that_was_looked_at_there_is_one_line():
    assert len(report.gains(rows_of({"a": 1.0, "b": 2.0})).splitlines()) == 3


def test_one_subject_has_no_deviation_and_none_no_mean():
    assert report.gains(rows_of({"head-t1": 2.0})).splitlines()[2:] == [
        "| all subjects (1) | +2.00 |",
        "| without those looked at before (0) | - |",
    ]


def test_other_figures_come_with_the_least_and_the_greatest_subject():
    rows = rows_of({"a": 1.0, "b": 1.0, "c": 1.0})
    for row, spearman in zip(rows[1::2], (0.25, 0.5, 0.6), strict=True):
        row["spearman"] = spearman
    assert report.summary(rows).splitlines() == [
        "| mean (least to greatest) of | cubic | network |",
        "|---|---|---|",
        "| SSIM (3D) | 0.500 (0.500 to 0.500) | 0.500 (0.500 to 0.500) |",
        "| Spearman of uncertainty and error |  | 0.450 (0.250 to 0.600) |",
    ]
    assert "| 0.250 |" in report.summary(rows[:2])


def test_the_page_says_who_was_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows_of({"a": 1.0, "head-t1": 2.0})}))
    monkeypatch.setattr(
        sys, "argv", ["report", f"Known={tmp_path / 'rows.json'}", "-o", str(tmp_path / "page.md")]
    )
    report.main()
    text = (tmp_path / "page.md").read_text()
    assert all(name in text.partition("## Known")[0] for name in LOOKED_AT)
    assert "| without those looked at before (1) | +1.00 |" in text
    assert str(tmp_path) not in text


def test_parts_that_are_not_named_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"

    def write(*more: str, **gains: float) -> str:
        parts = []
        for title, gain in gains.items():
            (tmp_path / f"{title}.json").write_text(json.dumps({"rows": rows_of({"a": gain})}))
            parts.append(f"{title}={tmp_path / f'{title}.json'}")
        monkeypatch.setattr(sys, "argv", ["report", *more, *parts, "-o", str(page)])
        report.main()
        return page.read_text()

    whole = write(one=1.0, two=2.0, three=3.0)
    write(one=1.0, two=5.0, three=3.0)
    assert write("--keep", two=2.0) == whole
    assert write("--keep", four=4.0).startswith(whole)
    assert "## one" not in write(four=4.0)


def test_the_page_shows_and_explains_the_projected_baselines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = rows_of({"a": 1.0})
    rows += [{**row, "method": f"{row['method']} + consistency"} for row in rows if row["method"] == "cubic"]
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(
        sys, "argv", ["report", f"Known={tmp_path / 'rows.json'}", "-o", str(tmp_path / "page.md")]
    )
    report.main()
    head, _, tables = (tmp_path / "page.md").read_text().partition("## Known")
    assert "`+ consistency` is a baseline" in head
    # One table of PSNR, one of gains, one of the other figures.
    assert tables.count("| cubic + consistency |") >= 2
    assert "| network | cubic + consistency |" in tables
