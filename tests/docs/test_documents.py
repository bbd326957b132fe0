"""Commands, links and numbers in the prose: what a reader pastes must exist."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from medsr import errors, overrides

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        ROOT / "README.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("integrations/*/README.md"),
        *ROOT.glob("bundles/*/docs/README.md"),
    ]
)
# Options of the runner itself, and those of medsr that name no setting.
RUNNER = {"config_file", "nproc_per_node"}


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[tuple[Path, list[str]]]:
    """Bundle folder in which a command is given, and its words."""
    folder = page.parents[1]
    for block in blocks(page, "bash"):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["cd"]:
                folder = ROOT / "bundles" / Path(words[1]).name
            elif words:
                yield folder, words


def options(words: list[str], name: str) -> list[str]:
    """What follows ``--name``, up to the next option."""
    found: list[str] = []
    for index, word in enumerate(words):
        if word == f"--{name}":
            rest = words[index + 1 :]
            end = next((k for k, one in enumerate(rest) if one.startswith("-")), len(rest))
            found += rest[:end]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    missing = []
    for target in targets:
        name, _, heading = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists():
            missing.append(target)
        elif heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            missing += [] if heading in anchors else [target]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_name_bundles_configs_and_settings_that_exist(page: Path) -> None:
    bundles = {path.name: path for path in (ROOT / "bundles").iterdir() if path.is_dir()}
    for folder, words in commands(page):
        if words[:2] == ["medsr", "run"] and words[2] in bundles:
            root, names = bundles[words[2]], options(words, "config") or ["inference.json"]
            given = [setting.partition("=")[0] for setting in options(words, "set")]
        elif words[:2] == ["medsr", "run"]:
            # A bundle that the reader is to write.
            assert "mynet" in words[2], f"no bundle {words[2]}"
            continue
        elif "monai.bundle" in words:
            (value,) = options(words, "config_file")
            files = ast.literal_eval(value) if value.startswith("[") else [value]
            root = ROOT if files[0].startswith("bundles/") else folder
            if "mynet" in root.name:
                continue
            names = files
            given = [word[2:] for word in words if word.startswith("--") and word[2:] not in RUNNER]
        else:
            continue
        configs = [
            next(path for path in (root / "configs" / name, root / name) if path.is_file()) for name in names
        ]
        given = [name.partition("=")[0] for name in given]
        assert overrides.unknown_settings(given, configs) == [], shlex.join(words)


def test_the_table_of_exit_statuses_is_that_of_the_errors() -> None:
    text = (ROOT / "docs" / "reference" / "scripts.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|.*\| ([`\w, ]+) \|$", text, re.MULTILINE)
    stated = {name: int(status) for status, names in rows for name in re.findall(r"\w+", names)}
    kinds = [kind for name in errors.__all__ if isinstance(kind := getattr(errors, name), type)]
    assert stated == {kind.__name__: kind.exit_code for kind in kinds}


@pytest.mark.slow
def test_the_example_of_a_gap_gives_the_numbers_of_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nibabel as nib
    from medsr.geometry import refinement_ratio, rescaled_affine, rescaled_size

    page = ROOT / "docs" / "how-to" / "run-on-my-scans.md"
    (code,) = blocks(page, "python")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page.name, "exec"), {})
    scan = nib.load(tmp_path / "scans" / "head.nii.gz")
    size, affine = scan.shape[2], scan.affine
    expected = [(size, affine[2, 2], affine[2, 3], None)]
    for target in (None, 1.0):
        ratio = refinement_ratio(affine, target)
        new_size = rescaled_size(size, ratio)
        fine = rescaled_affine(affine, 2, size=size, new_size=new_size, ratio=ratio)
        expected.append((new_size, fine[2, 2], fine[2, 3], ratio))
    table = page.read_text(encoding="utf-8").partition("## Slices of 5 mm")[2]
    rows = re.findall(r"^\| [^|]+ \| (\d+) \| ([\d.]+) \| (-[\d.]+) \| ([\d.]*)[^|]*\|$", table, re.MULTILINE)
    for row, (slices, spacing, first, ratio) in zip(rows, expected, strict=True):
        assert int(row[0]) == slices
        np.testing.assert_allclose((float(row[1]), float(row[2])), (spacing, first), atol=1e-3)
        assert (float(row[3]) if row[3] else None) == ratio
