from __future__ import annotations

from pathlib import Path

import pytest
from medsr.errors import DataError
from medsr.io.links import refuse_leaving_link


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose own name is a link, with a file, and links to it and to a file outside."""
    real = tmp_path / "real"
    real.mkdir()
    (real / "scan.nii").write_bytes(b"own")
    (tmp_path / "foreign.nii").write_bytes(b"foreign")
    (real / "inside.nii").symlink_to("scan.nii")
    (real / "outside.nii").symlink_to("../foreign.nii")
    (real / "loop.nii").symlink_to("loop.nii")
    folder = tmp_path / "study"
    folder.symlink_to(real)
    return folder


@pytest.mark.parametrize("name", ["scan.nii", "inside.nii", "no-such.nii"])
def test_what_stays_in_the_folder_passes(folder: Path, name: str) -> None:
    refuse_leaving_link(folder / name, follow_links=None, instead="copy it")


def test_a_link_to_the_outside_is_refused_unless_it_is_wanted(folder: Path) -> None:
    with pytest.raises(DataError, match=r"^outside\.nii: a link that leaves the folder study; copy it$"):
        refuse_leaving_link(folder / "outside.nii", follow_links=None, instead="copy it")
    with pytest.raises(DataError, match=r"study; copy it, or set follow_links to true$"):
        refuse_leaving_link(folder / "outside.nii", follow_links=False, instead="copy it")
    refuse_leaving_link(folder / "outside.nii", follow_links=True, instead="copy it")


def test_a_loop_of_links_is_no_crash(folder: Path) -> None:
    # Where it is judged as leading nowhere, the reader says so.
    refuse_leaving_link(folder / "loop.nii", follow_links=None, instead="copy it")
