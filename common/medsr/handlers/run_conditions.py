"""What the results of a run were made by, for whoever wants the same again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch

import medsr
from medsr.overrides import asked, nested_overrides

__all__ = ["RunConditions"]

_QUOTED_PATH = re.compile(r"""(['"])[^'"]*[/\\]([^'"/\\]*)\1""")
"""In an expression."""


class RunConditions:
    """Bundle, versions, device, SHA-256 of weights and configs, and the settings of a run.

    File names appear, folders do not: a path may name a patient.

    Args:
        settings: the settings of the run that shape the result; of a file that one names the SHA-256 is recorded. What
            was asked for inside components, such as ``inferer::tile``, is added.
        config_files: configs whose SHA-256 is recorded, beside those that were asked for; ``metadata.json`` beside them
            tells the bundle.
        weights: weight file whose SHA-256 is recorded, or several by the name under which that is done.

    Attributes:
        device: where the run computes; who runs it knows.
        settings: as they are recorded.
        bundle: its name and version, None where no config belongs to one.
        hashes: SHA-256 by file name, or by the name that was given for a weight file.
        named: names of the files that settings name.

    Example:
        >>> sorted(RunConditions({"scale": 4}).as_plain())
        ['bundle', 'device', 'settings', 'sha256', 'threads', 'versions']
    """

    def __init__(
        self,
        settings: Mapping[str, Any] | None = None,
        config_files: Sequence[str | Path] = (),
        weights: str | Path | Mapping[str, str | Path] | None = None,
    ) -> None:
        self.device = "cpu"
        given = {**(settings or {}), **nested_overrides()}
        self.settings = {key: _without_folder(value) for key, value in given.items()}
        by_name = (
            weights if isinstance(weights, Mapping) else {Path(one).name: one for one in [weights] if one}
        )
        named = [Path(value) for value in given.values() if isinstance(value, str) and _is_file(value)]
        self.named = {file.name for file in named}
        files = {**{Path(p).name: p for p in (*config_files, *asked()[0], *named)}, **by_name}
        self.hashes = {name: _sha256(path) for name, path in files.items()}
        self.bundle = _bundle([Path(path).parent for path in config_files])

    def as_plain(self) -> dict[str, Any]:
        """All of it as JSON gives it back: tuples become lists, for example."""
        conditions = {
            "bundle": self.bundle,
            "versions": {
                "medsr": medsr.__version__,
                "monai": monai.__version__,
                "numpy": np.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "device": self.device,
            "threads": torch.get_num_threads(),
            "sha256": self.hashes,
            "settings": self.settings,
        }
        plain: dict[str, Any] = json.loads(json.dumps(conditions, default=str))
        return plain


def _bundle(folders: Sequence[Path]) -> dict[str, str] | None:
    """The bundle that configs in these folders belong to."""
    for folder in folders:
        with contextlib.suppress(AttributeError, OSError, ValueError):
            found = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
            return {"name": folder.resolve().parent.name, "version": str(found.get("version"))}
    return None


def _is_file(text: str) -> bool:
    # A name without an ending is that of a choice, though a file may be called so.
    return not text.startswith(("$", "@", "%")) and bool(Path(text).suffix) and os.path.isfile(text)  # noqa: PTH113 - Path's raises for long texts


def _without_folder(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_folder(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_folder(one) for one in value]
    if isinstance(value, str) and value.startswith("$"):
        return _QUOTED_PATH.sub(r"\1\2\1", value)
    return Path(value).name if isinstance(value, str) else value


def _sha256(path: str | Path) -> str | None:
    with contextlib.suppress(OSError):
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return None
