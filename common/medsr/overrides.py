"""Reads what a run was asked, as MONAI would, and refuses what MONAI would let pass: misspelt and unclear overrides.

Beside the standard library only python-fire is used, which reads MONAI's command line: a wrong one fails at once.
"""

from __future__ import annotations

import ast
import difflib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from medsr.errors import SettingError
from medsr.settings import as_number, as_numbers, as_whole

__all__ = [
    "asked",
    "asking",
    "check_overrides",
    "nested_overrides",
    "overrides_in",
    "read_config",
    "refuse_unclear",
    "refuse_unfit_configs",
    "refuse_unknown",
    "refuse_unmergeable",
    "unknown_settings",
]

# Endings of ids of what is only about speed, place or display.
_SHAPES_NOTHING = (
    "::cache_num",
    "::device",
    "::num_workers",
    "::path",
    "::pin_memory",
    "::progress",
    "_dir",
    "_root",
)

_ASKED: ContextVar[tuple[list[Path], dict[str, Any]] | None] = ContextVar("asked", default=None)

# In the order of monai.bundle.run's own parameters: it takes them by position as well.
_RUNNER_POSITIONS = ("run_id", "init_id", "final_id", "meta_file", "config_file", "logging_file", "tracking")

# What MONAI's command line misunderstands, how it does, and what to type: a word that is not empty counts as true, so
# that --overwrite false would overwrite, and None leaves the config's value.
_MISREAD = {
    "false": ("would be read as a word", "False"),
    "null": ("would be read as a word", "'$None'"),
    "None": ("would change nothing", "'$None'"),
}
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


def refuse_unfit_configs(config_files: Sequence[str | Path]) -> None:
    """Raise if configs do not fit together: the first is an overlay, or one excludes another.

    An overlay holds only what differs from the config that it lies on; behind it, that config would win, and undo it
    without a word. What it cannot be merged with it lists as ``_not_with_``.

    Args:
        config_files: JSON config files in the order in which MONAI merges them.

    Raises:
        SettingError: naming the configs that an overlay may lie on, and how both are given; or both that do not fit.
    """
    for file in config_files[:1]:
        about = str(read_config(Path(file)).get("_desc_", ""))
        bases = _CONFIG_NAME.findall(about.partition(":")[0]) if about.startswith(_OVERLAY) else []
        if bases:
            name = Path(file).name
            raise SettingError(
                f"{name} is an overlay on {' or '.join(bases)}: name that before it, --config {bases[0]} {name} with "
                f"medsr run, --config_file \"['configs/{bases[0]}','configs/{name}']\" with MONAI"
            )
    names = [Path(file).name for file in config_files]
    for file, name in zip(config_files, names, strict=True):
        unfit = [other for other in read_config(Path(file)).get("_not_with_", ()) if other in names]
        if unfit:
            raise SettingError(f"{name} cannot be combined with {unfit[0]}; leave one of them out")


def refuse_unmergeable(config_files: Sequence[str | Path]) -> None:
    """Raise if a config changes something inside a component that nothing below it has, which MONAI cannot merge.

    Args:
        config_files: JSON config files in the order in which MONAI merges them.

    Raises:
        SettingError: naming config and id, and how to write it.
    """
    for count, file in enumerate(config_files):
        below = _merged(config_files[:count])
        for key in read_config(Path(file)):
            *parents, last = _path_of(key)
            if parents and not isinstance(_item(below, parents), (dict, list)):
                names = " + ".join(Path(one).name for one in config_files[:count])
                raise SettingError(
                    f"{Path(file).name}: {key} is nothing in {names}; write it as "
                    f'"+{parents[0]}" with {{"{last}": ...}}'
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


@contextmanager
def asking(config_files: Sequence[str | Path], overrides: Mapping[str, Any]) -> Iterator[None]:
    """Let a run in this process know what a front door was asked, which MONAI's own command line tells by itself.

    Args:
        config_files: in the order in which MONAI merges them.
        overrides: values by id.

    Example:
        >>> with asking(["inference.json"], {"inferer::tile": 64}):
        ...     nested_overrides()
        {'inferer::tile': 64}
    """
    before = _ASKED.set(([Path(file) for file in config_files], dict(overrides)))
    try:
        yield
    finally:
        _ASKED.reset(before)


def asked() -> tuple[list[Path], dict[str, Any]]:
    """Config files and overrides of the run in this process, by whichever door; none in any other process.

    Example:
        >>> asked()
        ([], {})
    """
    known = _ASKED.get()
    if known is not None:
        return known
    files, overrides = overrides_in(sys.argv)
    return files, {key: _as_typed(value) for key, value in overrides.items()}


def nested_overrides() -> dict[str, Any]:
    """What was asked for inside components and shapes a result, by id: no setting of a config holds it.

    Example:
        >>> nested_overrides()
        {}
    """
    paths = {"::".join(_path_of(key)): value for key, value in asked()[1].items()}
    shaping = {key: value for key, value in paths.items() if not key.endswith(_SHAPES_NOTHING)}
    return {key: value for key, value in shaping.items() if "::" in key}


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
    refuse_unfit_configs(files)
    refuse_unknown(overrides, files)
    typed = _options(_runner_words(argv) or [])
    for key, value in typed.items():
        if value in _MISREAD:
            what, instead = _MISREAD[value]
            raise SettingError(f"--{key} {value} {what}; write {instead}")
        if key.endswith(_PATH_SETTINGS) and not _is_expression(value):
            _refuse_no_path(key, value)
    refuse_unclear({key: _as_typed(value) for key, value in typed.items()}, files)


def read_config(path: Path) -> dict[str, Any]:
    """Content of a JSON config, not resolved.

    Raises:
        SettingError: if the file is missing, is not JSON, holds no object or names a key twice.

    Example:
        >>> read_config(Path("none.json"))
        Traceback (most recent call last):
        medsr.errors.SettingError: none.json: there is no such file in .
    """
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
            merged["_meta_"] = read_config(path.parent / "metadata.json")
        for key, value in read_config(path).items():
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
        right = isinstance(value, (list, tuple, dict)) or (may_be_number and isinstance(value, (int, float)))
        return "" if right else f"a list, such as {json.dumps(default)}"
    if isinstance(default, dict):
        if not isinstance(value, dict):
            return _NAMES
        is_weights = name == "compare" or name.endswith("weights")
        return _WEIGHTS if is_weights and not all(isinstance(path, str) for path in value.values()) else ""
    if name.endswith(_PATH_SETTINGS):
        if name == "dataset_dir" and isinstance(value, list):
            return "" if all(isinstance(path, str) for path in value) else "a list of paths"
        if not isinstance(value, str):
            return "a path"
        # A shell leaves it in --output_dir=~/x, and a folder of that name would be made; inputs are looked for at home.
        at_home = value.startswith("~") and name != "dataset_dir"
        return "the whole path, which the shell has not put in place of '~'" if at_home else ""
    return ""


def _other_length(default: Sequence[object], value: object) -> str:
    """What a list whose elements are taken one by one must be instead, '' if the value has as many."""
    right = isinstance(value, (list, tuple)) and len(value) == len(default)
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
        for one in value if isinstance(default, list) and isinstance(value, (list, tuple)) else [value]:
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
    """The value that python-fire, which reads MONAI's command line, makes of a word."""
    from fire.parser import DefaultParseValue

    # This word stays one there, which counts as true.
    return True if text == "true" else DefaultParseValue(text)


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
    return read_config(path) if path.suffix.lower() == ".json" else {}


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
