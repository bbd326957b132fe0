"""Finds and describes bundles, and refuses what MONAI would let pass: misspelt overrides, unknown weights.

Only the standard library is used, so that ``medsr list``, the documentation and the tests can read the
catalogue without waiting for torch.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medsr.errors import SettingError, WeightsError
from medsr.settings import as_number, as_numbers, as_whole

__all__ = [
    "BundleInfo",
    "bundle_root",
    "bundles_folder",
    "check_overrides",
    "list_bundles",
    "listed_digests",
    "overrides_in",
    "read_settings",
    "refuse_lone_overlay",
    "refuse_unclear",
    "refuse_unknown",
    "unknown_settings",
    "verify_weights",
    "weights_digest",
]

FOLDER_VARIABLE = "MEDSR_BUNDLES"

# In the order of monai.bundle.run's own parameters: it takes them by position as well.
_RUNNER_POSITIONS = ("run_id", "init_id", "final_id", "meta_file", "config_file", "logging_file", "tracking")

# What MONAI's command line misunderstands, how it does, and what to type: a word that is not empty counts as true, so
# that --overwrite false would overwrite, and None leaves the config's value.
_MISREAD = {
    "false": ("would be read as a word", "False"),
    "null": ("would be read as a word", "'$None'"),
    "None": ("would change nothing", "'$None'"),
}
# What it makes of the words for true and false; "true" stays a word, which counts as true.
_SWITCHED = {"True": True, "true": True, "False": False}
_PATH_SETTINGS = ("_dir", "weights")

# How both command lines say null, which MONAI would ignore as it is.
_NOTHING = "$None"

# Words that a setting may have in place of its number.
_FOR_A_NUMBER = ("auto", "estimate")

# What goes to PyTorch and MONAI as it is: the smallest whole number, and other numbers.
_SMALLEST = {
    "batch_size": 1,
    "cached": 0,
    "crop_size": 1,
    "iterations": 1,
    "scale": 1,
    "seed": 0,
    "study_scale": 1,
    "warm_up": 0,
    "workers": 0,
}
_ABOVE_ZERO = ("average_momentum", "learning_rate", "zoom")
_NUMBERS = ("_weight", "minutes")

_WEIGHTS = "names with weight files, such as {'name': 'model.pt'}"
_NAMES = "names with values, such as {'name': 'value'}"

# How the description of an overlay begins, and what it names before its first colon.
_OVERLAY = "Overlay on "
_CONFIG_NAME = re.compile(r"\w+\.json")

_RUNNER_OPTIONS = frozenset({*_RUNNER_POSITIONS, "args_file", "workflow_name", "workflow_type"})


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
    return _read_json(Path(root) / "configs" / config)


def unknown_settings(given: Iterable[str], config_files: Sequence[str | Path]) -> list[tuple[str, str]]:
    """Override ids that the merged config does not know, each with the nearest one that it does, or ''.

    MONAI takes a misspelt override for a new item and runs with the default. A *new argument* of an existing
    component passes, because the component itself refuses what it does not know, unless it looks like a
    misspelling of an argument that stands in the config.

    Args:
        given: ids as typed: ``output_dir``, ``train::trainer::max_epochs`` or ``train#trainer#max_epochs``,
            with or without a leading ``+``.
        config_files: JSON config files in the order in which MONAI merges them.

    Raises:
        SettingError: if a config file cannot be read.
    """
    return _unknown_in(_merged(config_files), given)


def refuse_unknown(given: Iterable[str], config_files: Sequence[str | Path]) -> None:
    """Raise if an override names no setting of the merged config, or one that nothing in it reads any more.

    The first is what :func:`unknown_settings` sees; the others an overlay lists as ``_unused_``.

    Args:
        given: ids as typed.
        config_files: JSON config files in the order in which MONAI merges them.

    Raises:
        SettingError: in one line, with the nearest setting for each misspelt one.
    """
    given = list(given)
    merged = _merged(config_files)
    unknown = _unknown_in(merged, given)
    if unknown:
        names = " + ".join(Path(file).name for file in config_files)
        each = (f"{name} (did you mean {near}?)" if near else name for name, near in unknown)
        raise SettingError(f"no such setting in {names}: {', '.join(each)}")
    unused = set(merged.get("_unused_", ()))
    idle = next((name for name in given if _path_of(name)[0] in unused), None)
    if idle:
        raise SettingError(f"{idle} is not used by this combination of configs; leave it out")


def refuse_unclear(given: Mapping[str, object], config_files: Sequence[str | Path]) -> None:
    """Raise if a setting is to become something of another kind than it is in the config.

    Any word and any number but 0 counts as true: ``--set overwrite=no`` would overwrite. A word for a number, or a
    number for a path, fails somewhere in PyTorch, which knows no setting; so does a number out of range that goes
    straight to PyTorch or MONAI. Expressions pass, and so do, as a rule, null, lists and numbers for a number or a
    list: our components say themselves what they take. A list whose elements the config itself takes one by one keeps
    their number.

    Args:
        given: values by id.
        config_files: JSON config files in the order in which MONAI merges them.

    Raises:
        SettingError: naming the first such setting.
    """
    merged = _merged(config_files)
    text = json.dumps(merged)
    for name, value in given.items():
        default = _item(merged, _path_of(name))
        is_nothing = value == _NOTHING
        if _is_expression(value) and not is_nothing:
            continue
        wanted = _never_nothing(name, default) if is_nothing else _other_kind(name, default, value)
        if not wanted and isinstance(default, list) and f"@{name}[" in text:
            wanted = _other_length(default, value)
        if wanted:
            raise SettingError(f"{name} must be {wanted}, got {value!r}")
        _refuse_out_of_range(name, default, None if is_nothing else value)


def refuse_lone_overlay(config_files: Sequence[str | Path]) -> None:
    """Raise if the first config is an overlay, which holds only what differs from the config that it lies on.

    Behind its overlay a config would win, and undo it without a word.

    Args:
        config_files: JSON config files in the order in which MONAI merges them.

    Raises:
        SettingError: naming the configs that it may lie on, and how both are given.
    """
    for file in config_files[:1]:
        about = str(_read_json(Path(file)).get("_desc_", ""))
        bases = _CONFIG_NAME.findall(about.partition(":")[0]) if about.startswith(_OVERLAY) else []
        if bases:
            name = Path(file).name
            raise SettingError(
                f"{name} is an overlay on {' or '.join(bases)}: name that before it, --config {bases[0]} {name} with "
                f"medsr run, --config_file \"['configs/{bases[0]}','configs/{name}']\" with MONAI"
            )


def overrides_in(argv: Sequence[str]) -> tuple[list[Path], dict[str, str]]:
    """Config files and overrides of a ``python -m monai.bundle run`` command line.

    Any other command line gives ``([], {})``. The runner's own options (``run_id`` ...) are left out.

    Args:
        argv: as in ``sys.argv``, or the whole command line as a list.

    Example:
        >>> overrides_in(["-m", "monai.bundle", "run", "--config_file", "a.json", "--output_dir=x"])[1]
        {'output_dir': 'x'}
    """
    words = _runner_words(argv)
    if words is None:
        return [], {}
    options = _options(words)
    defaults = _arguments_file(options)
    files = options.get("config_file", defaults.pop("config_file", None))
    overrides = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in {**defaults, **options}.items()
        if key not in _RUNNER_OPTIONS
    }
    return [Path(file) for file in _as_list(files)], overrides


def check_overrides(argv: Sequence[str] | None = None) -> None:
    """Refuse a misspelt override on the command line of a bundle run; do nothing for any other process.

    So are values that do not mean there what they say: ``false``, ``null``, ``None``, paths that look like numbers or
    hold a ``#``, and words for settings that are true or false, or numbers. So is an overlay by itself.
    Bundles call this as the first step of ``run``. YAML configs are not checked: the standard library cannot
    read them.

    Args:
        argv: command line; default ``sys.argv``.

    Raises:
        SettingError: if an override names a setting that no config file has, or has such a value.

    Example:
        >>> check_overrides(["pytest", "--output_dri", "x"])
    """
    argv = sys.argv if argv is None else argv
    files, overrides = overrides_in(argv)
    if not files or any(file.suffix.lower() != ".json" for file in files):
        return
    refuse_lone_overlay(files)
    refuse_unknown(overrides, files)
    typed = _options(_runner_words(argv) or [])
    for key, value in typed.items():
        if value in _MISREAD:
            what, instead = _MISREAD[value]
            raise SettingError(f"--{key} {value} {what}; write {instead}")
        if key.endswith(_PATH_SETTINGS) and not _is_expression(value):
            _refuse_no_path(key, value)
    refuse_unclear({key: _as_typed(value) for key, value in typed.items()}, files)


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
    return f"bundle_root('{name}')" in str(_read_json(config).get("bundle_root"))


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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except FileNotFoundError:
        raise SettingError(f"{path.name}: there is no such file in {path.parent}") from None
    except (OSError, ValueError) as error:
        raise SettingError(f"{path.name} in {path.parent} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise SettingError(f"{path.name} in {path.parent} must hold one JSON object")
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return content


def _path_of(name: str) -> list[str]:
    return name.removeprefix("+").replace("#", "::").split("::")


def _merged(config_files: Sequence[str | Path]) -> dict[str, Any]:
    """The config that MONAI would make of these files, with the metadata under ``_meta_``."""
    merged: dict[str, Any] = {"_meta_": {}}
    for number, file in enumerate(config_files):
        path = Path(file)
        if number == 0 and (path.parent / "metadata.json").is_file():
            merged["_meta_"] = _read_json(path.parent / "metadata.json")
        for key, value in _read_json(path).items():
            *parents, last = _path_of(key)
            holder = _item(merged, parents)
            if isinstance(holder, list) and last.isdecimal() and int(last) < len(holder):
                holder[int(last)] = value
            elif isinstance(holder, dict):
                old = holder.get(last)
                if key.startswith("+") and isinstance(old, dict) and isinstance(value, dict):
                    old.update(value)
                elif key.startswith("+") and isinstance(old, list) and isinstance(value, list):
                    old.extend(value)
                else:
                    holder[last] = value
    return merged


def _unknown_in(merged: Mapping[str, Any], given: Iterable[str]) -> list[tuple[str, str]]:
    return [(name, nearest) for name in given if (nearest := _nearest_to(name, merged)) is not None]


def _item(config: object, path: Sequence[str]) -> object:
    """The item at the path, or None: the config may hold null, which for this purpose is the same."""
    for key in path:
        if isinstance(config, dict):
            config = config.get(key)
        elif isinstance(config, list) and key.isdecimal() and int(key) < len(config):
            config = config[int(key)]
        else:
            return None
    return config


def _nearest_to(name: str, config: Mapping[str, Any]) -> str | None:
    """None if the id is known, else the nearest known id, '' if there is none."""
    here: object = config
    path = _path_of(name)
    for depth, key in enumerate(path):
        if isinstance(here, dict) and key in here:
            here = here[key]
        elif isinstance(here, list) and key.isdecimal() and int(key) < len(here):
            here = here[int(key)]
        else:
            known = list(here) if isinstance(here, dict) else []
            last = depth == len(path) - 1
            is_component = last and "_target_" in known
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.8 if is_component else 0.6)
            if is_component and not near:
                return None
            return "::".join([*path[:depth], near[0]]) if near else ""
    return None


def _other_kind(name: str, default: object, value: object) -> str:
    """What a setting with this default must be instead, '' if the value may be right."""
    word = isinstance(value, (str, bool))
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "true or false"
    if isinstance(default, (int, float)):
        return "a number" if word and value not in _FOR_A_NUMBER else ""
    if isinstance(default, list):
        # One number may stand for a list of them.
        may_be_number = bool(default) and isinstance(default[0], (int, float)) and not word
        right = isinstance(value, (list, dict)) or (may_be_number and isinstance(value, (int, float)))
        return "" if right else f"a list, such as {json.dumps(default)}"
    if isinstance(default, dict):
        if not isinstance(value, dict):
            return _NAMES
        is_weights = name == "compare" or name.endswith("weights")
        return _WEIGHTS if is_weights and not all(isinstance(path, str) for path in value.values()) else ""
    if name.endswith(_PATH_SETTINGS):
        if name == "dataset_dir" and isinstance(value, list):
            return "" if all(isinstance(path, str) for path in value) else "a list of paths"
        return "" if isinstance(value, str) else "a path"
    return ""


def _other_length(default: Sequence[object], value: object) -> str:
    """What a list whose elements are taken one by one must be instead, '' if the value has as many."""
    right = isinstance(value, list) and len(value) == len(default)
    return "" if right else f"a list of {len(default)}, such as {json.dumps(default)}"


def _never_nothing(name: str, default: object) -> str:
    """What a setting must be instead of null, '' if null may be right."""
    if name in ("dataset_dir", "output_dir"):
        return "a path"
    # Components may be left out.
    return _NAMES if isinstance(default, dict) and "_target_" not in default else ""


def _refuse_out_of_range(name: str, default: object, value: object) -> None:
    may_be_nothing = default is None or name.endswith("minutes")
    if (value is None and may_be_nothing) or isinstance(default, (bool, str, dict)):
        return
    if name in _SMALLEST:
        for one in value if isinstance(default, list) and isinstance(value, list) else [value]:
            whole = as_whole(name, one, _SMALLEST[name])
            if isinstance(one, float):
                raise SettingError(f"{name} must be written without point or exponent: {whole}, not {one}")
    elif name in _ABOVE_ZERO and isinstance(default, list):
        as_numbers(name, value, above=0)
    elif name in _ABOVE_ZERO:
        as_number(name, value, above=0)
    elif name.endswith(_NUMBERS):
        as_number(name, value)


def _as_typed(text: str) -> object:
    """The value that python-fire makes of a word."""
    if text in _SWITCHED:
        return _SWITCHED[text]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        # Words in brackets need no quotes there; what they become is left to it.
        return [text] if text.startswith(("[", "(")) else text


def _is_expression(value: object) -> bool:
    """Whether MONAI evaluates or follows a value instead of taking it as it is."""
    return isinstance(value, str) and value.startswith(("$", "@", "%"))


def _refuse_no_path(key: str, value: str) -> None:
    # python-fire cuts a plain word at '#', and MONAI takes the sign for its own separator.
    if "#" in value:
        raise SettingError(f"--{key} {value}: MONAI cannot handle '#' in a path; rename the folder or file")
    try:
        number = isinstance(ast.literal_eval(value), (int, float, complex))
    except (ValueError, SyntaxError):
        return
    if number:
        raise SettingError(f"--{key} {value} would not be read as a path; write ./{value}")


def _hint(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; there are {', '.join(known)}" if known else "; the folder holds no bundle"


def _runner_words(argv: Sequence[str]) -> list[str] | None:
    """What follows ``monai.bundle run``, or None if this is another program's command line."""
    for program, command, position in zip(argv, argv[1:], range(2, len(argv) + 1), strict=False):
        as_path = Path(program).parts[-3:] == ("monai", "bundle", "__main__.py")
        if (program == "monai.bundle" or as_path) and command in ("run", "run_workflow"):
            return list(argv[position:])
    return None


def _options(words: Sequence[str]) -> dict[str, str]:
    """Options by name, by the rules of python-fire, which reads MONAI's command line."""
    options: dict[str, str] = {}
    by_position = iter(_RUNNER_POSITIONS)
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if word in ("--", "-"):
            break
        if not _is_flag(word):
            options[next(by_position, "run_id")] = word
            continue
        key, equals, value = word.lstrip("-").partition("=")
        key = key.replace("-", "_")
        if not equals and index < len(words) and not _is_flag(words[index]):
            value = words[index]
            index += 1
        elif not equals:
            value = "True"
            if key not in _RUNNER_OPTIONS and key.startswith("no"):
                key, value = key[2:], "False"
        options[key] = value
    return options


def _is_flag(word: str) -> bool:
    return word.startswith("--") or re.match("-[a-zA-Z]", word) is not None


def _arguments_file(options: Mapping[str, str]) -> dict[str, Any]:
    path = Path(options.get("args_file", ""))
    return _read_json(path) if path.suffix.lower() == ".json" else {}


def _as_list(files: object) -> list[str]:
    """Config files as MONAI takes them: one path, or a list written as ``"['a.json','b.json']"``."""
    if isinstance(files, str) and files.lstrip().startswith(("[", "(")):
        try:
            files = ast.literal_eval(files)
        except (ValueError, SyntaxError):
            return [str(files)]
    if isinstance(files, (list, tuple)):
        return [str(file) for file in files]
    return [] if files is None else [str(files)]
