"""The gallery draws and prints what its pages show; so do the scripts of the tutorials."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
SCRIPTS = sorted(DOCS.glob("demo/plot_*.py"))
MOST_LINES, MOST_BYTES = 62, 200_000


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def output_of(script: Path, *arguments: str, folder: Path) -> list[str]:
    command = [sys.executable, str(script), *arguments]
    run = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=300)
    return run.stdout.splitlines()


def page_of(script: Path) -> Path:
    (page,) = (p for p in DOCS.glob("explanation/*.md") if f"(../demo/{script.name})" in p.read_text("utf-8"))
    return page


def test_the_index_lists_every_page_once() -> None:
    links = re.findall(
        r"^\| \[[^\]]+\]\(([^)]+)\) \| .+ \|$", (DOCS / "index.md").read_text("utf-8"), re.MULTILINE
    )
    pages = (page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
    assert sorted(links) == sorted(page for page in pages if page != "index.md")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_gallery_script_is_short_and_its_figure_stands_on_a_page(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    assert ast.get_docstring(ast.parse(text))
    (name,) = re.findall(r'^save\(figure, "(\w+\.png)"\)$', text, re.MULTILINE)
    assert f"(../figures/{name})" in page_of(script).read_text(encoding="utf-8")
    assert (DOCS / "figures" / name).stat().st_size < MOST_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_gallery_script_draws_its_figure_and_prints_what_its_page_says(
    script: Path, tmp_path: Path
) -> None:
    committed = {path: path.read_bytes() for path in DOCS.glob("figures/*")}
    *lines, written = output_of(script, str(tmp_path), folder=tmp_path)
    assert [str(path) for path in tmp_path.iterdir()] == [written]
    assert (DOCS / "figures" / Path(written).name) in committed
    assert {path: path.read_bytes() for path in DOCS.glob("figures/*")} == committed
    assert lines
    assert "\n".join(lines) + "\n" in blocks(page_of(script), "text")


@pytest.mark.slow
def test_the_first_tutorial_shows_the_geometry_that_its_reader_will_see(tmp_path: Path) -> None:
    import nibabel as nib
    import numpy as np
    from medsr.geometry import rescaled_affine

    page = DOCS / "tutorials" / "first-volume.md"
    make, check, judge = blocks(page, "python")
    made, _, checked, judged = blocks(page, "text")
    for name, code in (("make", make), ("check", check), ("judge", judge)):
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    assert output_of(tmp_path / "make.py", folder=tmp_path) == made.splitlines()

    # Slices repeated stand for the network, which takes most of a minute: they lie where its slices lie.
    thick = nib.load(tmp_path / "scans" / "head.nii.gz")
    fine = rescaled_affine(thick.affine, 2, size=thick.shape[2], new_size=4 * thick.shape[2], ratio=4.0)
    repeated = np.repeat(thick.get_fdata(dtype=np.float32), 4, axis=2)
    (tmp_path / "results").mkdir()
    for name, values in (("superres", repeated), ("uncertainty", 1 + repeated / 20)):
        nib.save(nib.Nifti1Image(values, fine), tmp_path / "results" / f"head_{name}.nii.gz")
    assert output_of(tmp_path / "check.py", folder=tmp_path)[:5] == checked.splitlines()[:5]
    assert len(output_of(tmp_path / "judge.py", folder=tmp_path)) == len(judged.splitlines())


@pytest.mark.slow
def test_the_second_tutorial_writes_the_study_that_its_commands_read(tmp_path: Path) -> None:
    page = DOCS / "tutorials" / "first-masks.md"
    make, judge = blocks(page, "python")
    (tmp_path / "make.py").write_text(make, encoding="utf-8")
    assert output_of(tmp_path / "make.py", folder=tmp_path) == blocks(page, "text")[0].splitlines()
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.nii.gz"))
    study = [f"study/{what}/p{k}.nii.gz" for what in ("images", "labels") for k in range(4)]
    assert found == ["scans/p4.nii.gz", *study, "truth/images/p4.nii.gz", "truth/labels/p4.nii.gz"]
    compile(judge, page.name, "exec")
