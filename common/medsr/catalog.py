"""Finds and describes bundles and their weights.

Only the standard library is used, so that ``medsr list``, the documentation and the tests can read the
catalogue without waiting for torch.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medsr.errors import SettingError, WeightsError
from medsr.overrides import overrides_in, read_config

__all__ = [
    "BundleInfo",
    "bundle_root",
    "bundles_folder",
    "list_bundles",
    "listed_digests",
    "read_settings",
    "verify_weights",
    "weights_digest",
]

FOLDER_VARIABLE = "MEDSR_BUNDLES"


@dataclass(frozen=True)
class BundleInfo:
    """What the catalogue knows of one bundle without loading its network.

    Args:
        name: folder name, which is also the name on the command line.
        root: the bundle's folder.
        title: display name.
        version: version of the bundle, from its metadata.
        task: what it does, in one line.
        description: what it does, in some sentences.
        scale: how many times finer the output grid is, per axis or for all; None if it keeps the grid or the
            input decides.
        metadata: everything in ``configs/metadata.json``.
    """

    name: str
    root: Path
    title: str
    version: str
    task: str
    description: str
    scale: float | tuple[float, ...] | None
    metadata: Mapping[str, Any]


def bundles_folder() -> Path:
    """Folder of the bundles: ``$MEDSR_BUNDLES``, else the one beside the source tree, else ``./bundles``.

    Raises:
        SettingError: if none of them exists.

    Example:
        >>> bundles_folder().name
        'bundles'
    """
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        folder = Path(chosen).expanduser()
        if not folder.is_dir():
            raise SettingError(f"{FOLDER_VARIABLE} names no folder: {chosen}; correct it or unset it")
        return folder.resolve()
    for folder in (Path(__file__).resolve().parents[2] / "bundles", Path("bundles").resolve()):
        if folder.is_dir():
            return folder
    raise SettingError(f"no bundles folder found; set {FOLDER_VARIABLE} to the folder that holds the bundles")


def bundle_root(name: str) -> Path:
    """Folder of the bundle called ``name``.

    A config asks this for its own root. If the process was started with a config file of a copy of that
    bundle, renamed or not, the copy wins: it must use the weights that lie beside it and not those of the original.

    Args:
        name: folder name of the bundle, for example ``mri_rehrseg_superres``.

    Raises:
        SettingError: if there is no such bundle; the message names the nearest one.
    """
    for file in overrides_in(sys.argv)[0]:
        configs = file.absolute().parent
        if configs.name == "configs" and (configs.parent.name == name or _is_of_copy(file, name)):
            return configs.parent.resolve()
    folder = bundles_folder()
    root = folder / name
    # A path such as "../x" must not leave the folder, whoever wrote it.
    if name in _names_in(folder):
        return root
    raise SettingError(f"no bundle called {name!r} in {folder}{_hint(name, _names_in(folder))}")


def list_bundles() -> list[BundleInfo]:
    """All bundles of :func:`bundles_folder`, by name.

    Raises:
        SettingError: if a bundle's metadata cannot be read.
    """
    folder = bundles_folder()
    return [_describe(folder / name) for name in _names_in(folder)]


def read_settings(root: str | Path, config: str = "inference.json") -> dict[str, Any]:
    """Content of one of a bundle's config files, not resolved: what a user can override.

    Args:
        root: the bundle's folder.
        config: file name inside ``configs/``.

    Raises:
        SettingError: if the file is missing, is not JSON or names a key twice.
    """
    return read_config(Path(root) / "configs" / config)


def weights_digest(root: str | Path, file: str = "models/model.pt") -> str:
    """SHA-256 of a bundle's weight file, in hexadecimal.

    Args:
        root: the bundle's folder.
        file: weight file inside it.

    Raises:
        WeightsError: if the file is missing or cannot be read.
    """
    root = Path(root)
    digest = hashlib.sha256()
    try:
        with (root / file).open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except FileNotFoundError:
        raise WeightsError(
            f"{root.name}: no weights at {file}; train the bundle or restore the file"
        ) from None
    except OSError as error:
        raise WeightsError(f"{root.name}: cannot read {file} ({error.strerror}); repair it") from None
    return digest.hexdigest()


def listed_digests(folder: str | Path) -> dict[str, str]:
    """Digest by file name of the ``SHA256SUMS`` in a folder.

    Raises:
        OSError: if there is none, or it cannot be read.

    Example:
        >>> sorted(listed_digests(bundle_root("mri_rehrseg_superres") / "models"))
        ['model.pt']
    """
    lines = (Path(folder) / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    pairs = (line.split(maxsplit=1) for line in lines if line.strip() and not line.startswith("#"))
    return {pair[1].strip().removeprefix("*"): pair[0].lower() for pair in pairs if len(pair) == 2}


def verify_weights(root: str | Path, file: str = "models/model.pt") -> Path:
    """Return the path of a bundle's weights if they are the ones listed in ``SHA256SUMS``.

    A truncated download or a file of another training must not give a plausible image. The list lies beside the
    file, or in ``models/`` for the files below it.

    Args:
        root: the bundle's folder.
        file: weight file inside it, below ``models/``.

    Raises:
        WeightsError: if the file or its entry is missing, or if they differ.
    """
    root = Path(root)
    found = weights_digest(root, file)
    folder = (root / file).parent
    if not (folder / "SHA256SUMS").exists() and Path(file).parts[:1] == ("models",):
        folder = root / "models"
    name = (root / file).relative_to(folder).as_posix()
    try:
        expected = listed_digests(folder).get(name)
    except OSError:
        raise WeightsError(
            f"{root.name}: SHA256SUMS is missing beside the weights; make it with: sha256sum model.pt > SHA256SUMS"
        ) from None
    if expected is None:
        raise WeightsError(f"{root.name}: SHA256SUMS has no line for {name}; add it: {found}  {name}")
    if expected != found:
        raise WeightsError(
            f"{root.name}: {file} is not the listed file (SHA-256 {found[:12]}, expected {expected[:12]}); "
            "restore it, or update SHA256SUMS if you trained it"
        )
    return root / file


def _is_of_copy(config: Path, name: str) -> bool:
    """Whether a config of a bundle in a folder of another name calls its root by this name."""
    if config.suffix.lower() != ".json" or not (config.parent / "metadata.json").is_file():
        return False
    return f"bundle_root('{name}')" in str(read_config(config).get("bundle_root"))


def _names_in(folder: Path) -> list[str]:
    return sorted(path.parents[1].name for path in folder.glob("*/configs/metadata.json"))


def _describe(root: Path) -> BundleInfo:
    metadata = read_settings(root, "metadata.json")
    scale = metadata.get("scale")
    if scale is None and (root / "configs" / "inference.json").is_file():
        scale = read_settings(root).get("scale")
    return BundleInfo(
        name=root.name,
        root=root,
        title=str(metadata.get("name", root.name)),
        version=str(metadata.get("version", "")),
        task=str(metadata.get("task", "")),
        description=str(metadata.get("description", "")),
        scale=_as_scale(scale),
        metadata=metadata,
    )


def _as_scale(value: object) -> float | tuple[float, ...] | None:
    """A number or a list of numbers as written in JSON; an expression ('$...') is decided at run time."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    if isinstance(value, list) and value and all(isinstance(item, (int, float)) for item in value):
        return tuple(value)
    return None


def _hint(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; there are {', '.join(known)}" if known else "; the folder holds no bundle"
