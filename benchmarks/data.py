"""Where the measurements find their images."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add ``--data``, a folder that must be there: by default ``$MEDSR_DATA``, else ``../shared/data``."""
    parser.add_argument(
        "--data",
        type=_folder,
        # As text, so that it is checked as well.
        default=os.environ.get("MEDSR_DATA", "../shared/data"),
        help="folder with the images that the script names; default $MEDSR_DATA",
    )


def _folder(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(
            f"{path}: there is no such folder; set MEDSR_DATA to that of the images"
        )
    return path
