"""Links in folders of inputs: one that leaves its folder may name a file that was not meant."""

from __future__ import annotations

import os
from pathlib import Path

from medsr.errors import DataError

__all__ = ["refuse_leaving_link"]


def refuse_leaving_link(path: Path, *, follow_links: bool | None, instead: str) -> None:
    """Raise if a path is a link to something outside its folder.

    In a folder from somebody else such links may name files of this machine; a DataLad data set holds nothing but
    them.

    Args:
        path: entry of a folder of inputs.
        follow_links: True allows it; None forbids it, and there is no such setting that the refusal could name.
        instead: what to do, for the message.

    Raises:
        DataError: if it is a link that leaves its folder.

    Example:
        >>> refuse_leaving_link(Path("scan.nii"), follow_links=None, instead="name the file itself instead")
    """
    if follow_links or not path.is_symlink():
        return
    folder = path.parent.resolve()
    # Path.resolve() raises for a loop of links on Python below 3.13.
    if folder not in Path(os.path.realpath(path)).parents:
        name = path.parent.name or folder.name
        raise DataError(
            f"{path.name}: a link that leaves the folder {name}; {instead}"
            + ("" if follow_links is None else ", or set follow_links to true")
        )
