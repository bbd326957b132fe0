from __future__ import annotations

from pathlib import Path

SNAKEFILE = Path(__file__).resolve().parents[2] / "integrations" / "snakemake" / "Snakefile"


def scans_of(folder: Path) -> dict[str, str]:
    """The scans that a run would work on: what stands before the first rule is Python."""
    head, _, _ = SNAKEFILE.read_text(encoding="utf-8").partition("\nrule ")
    names: dict[str, object] = {"config": {"scans": str(folder), "results": "results"}}
    exec(compile(head, SNAKEFILE.name, "exec"), names)
    found = names["INPUTS"]
    assert isinstance(found, dict)
    return found


def test_files_and_series_are_scans_and_what_is_hidden_is_not(tmp_path: Path) -> None:
    for folder in ("series", ".cache"):
        (tmp_path / folder).mkdir()
    for name in ("a.nii", "b.nii.gz", ".c.nii.gz", "notes.txt"):
        (tmp_path / name).touch()
    assert scans_of(tmp_path) == {name: str(tmp_path / name) for name in ("a.nii", "b.nii.gz", "series")}
