from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "integrations" / "slurm" / "scans.sh"

# Leaves a result as medsr would, and says what it was asked.
STAND_IN = """#!/usr/bin/env bash
echo "$OMP_NUM_THREADS $*" >> "$CALLS"
[[ "$3" == *broken* ]] && exit 2
mkdir -p "$5"
"""

pytestmark = pytest.mark.skipif(os.name != "posix", reason="a script for bash")


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "my scans"
    for name in ("a.NII", "b.nii.gz", "c.nii.gz", "notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    (folder / "series").mkdir()
    program = tmp_path / "bin" / "medsr"
    program.parent.mkdir()
    program.write_text(STAND_IN)
    program.chmod(0o755)
    return folder


def run(scans: Path, *more: str, **slurm: int) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """One task, and the scans that it gave to medsr."""
    top, calls = scans.parent, scans.parent / "calls"
    calls.write_text("")
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("SLURM_")},
        "PATH": f"{top / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "CALLS": str(calls),
        **{f"SLURM_{key}": str(value) for key, value in slurm.items()},
    }
    command = ["bash", str(SCRIPT), "mri_rehrseg_superres", str(scans), str(top / "out"), *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done, calls.read_text().splitlines()


def named(calls: list[str]) -> list[str]:
    return [call.partition(" -o ")[0].rpartition("/")[2] for call in calls]


@pytest.mark.parametrize(("first", "step"), [(0, 1), (1, 1), (0, 5)])
def test_the_tasks_share_all_scans_and_no_scan_twice(scans: Path, first: int, step: int) -> None:
    found = []
    for index in range(3):
        array = {"ARRAY_TASK_MIN": first, "ARRAY_TASK_STEP": step, "ARRAY_TASK_COUNT": 3}
        done, calls = run(scans, ARRAY_TASK_ID=first + index * step, **array)
        assert done.returncode == 0, done.stderr
        assert calls
        found += named(calls)
    assert sorted(found) == ["a.NII", "b.nii.gz", "c.nii.gz", "series"]


def test_settings_and_cores_are_passed_on(scans: Path) -> None:
    _, calls = run(scans, "--set", "slice_thickness_mm=5", CPUS_PER_TASK=3)
    expected = "--quiet --set slice_thickness_mm=5 --set overwrite=true"
    assert all(call.startswith("3 run mri_rehrseg_superres ") and call.endswith(expected) for call in calls)


def test_a_second_run_replaces_only_what_is_not_finished(scans: Path) -> None:
    (scans / "b.nii.gz").rename(scans / "broken.nii.gz")
    done, calls = run(scans)
    assert (done.returncode, len(calls)) == (1, 4)
    assert "broken.nii.gz: failed" in done.stderr
    (scans.parent / "out" / "a.NII" / "finished").unlink()
    # medsr itself skips what it has finished, and refuses it where settings or the scan are others.
    _, calls = run(scans)
    assert len(calls) == 4
    assert named([call for call in calls if "overwrite" in call]) == ["a.NII", "broken.nii.gz"]


@pytest.mark.parametrize("task", [1, 3, 7])
def test_a_list_of_tasks_that_leaves_scans_out_is_told(scans: Path, task: int) -> None:
    # What Slurm says of --array=1,3,7.
    array = {"ARRAY_TASK_ID": task, "ARRAY_TASK_MIN": 1, "ARRAY_TASK_MAX": 7, "ARRAY_TASK_COUNT": 3}
    done, _ = run(scans, **array)
    assert done.returncode == (4 if task == 7 else 0)
    assert ("must be a range" in done.stderr) == (task == 7)


def test_what_is_no_folder_of_scans_is_refused(scans: Path) -> None:
    empty = scans.parent / "empty"
    empty.mkdir()
    for folder in (empty, scans.parent / "none"):
        done, calls = run(folder)
        assert (done.returncode, calls) == (2, [])
        assert folder.name in done.stderr
        assert len(done.stderr.splitlines()) == 1
