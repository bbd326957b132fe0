"""The command ``medsr``: what bundles there are, what they can do, and a short way to run one.

``medsr run`` is a thin front of ``python -m monai.bundle run``: the same configs, hence the same results. It
adds short names, a check of every setting before anything is loaded, and errors in one line.
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import os
import re
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from medsr import __version__, catalog, errors
from medsr.errors import DataError, MedsrError, OutputError, SettingError
from medsr.overrides import (
    asking,
    refuse_unclear,
    refuse_unfit_configs,
    refuse_unknown,
    unknown_settings,
)

__all__ = ["main"]

INTERRUPTED = 130

# MONAI and its plug-ins say these on every start, whatever the user does.
_START_UP_WARNINGS = ("parsing config_file", "NvImgCodecPydicomReader", "Orientationd", r".*torch\.jit")
_START_UP_LOGGERS = {
    "monai.bundle.scripts": logging.WARNING,
    "monai.bundle.workflows": logging.ERROR,
    "monai.data.nvimgcodec_pydicom_plugin": logging.ERROR,
}
_QUIET_LOGGERS = {"": logging.ERROR, "ignite": logging.CRITICAL}

# Where the function is that reads such a checkpoint. By name, because networks import torch, which takes seconds.
_CONVERTERS = {
    "flavr": ("medsr.networks.slice_sr", "convert_flavr"),
    "fmen": ("medsr.networks.fmen", "convert_fmen"),
}

# Where the function is that makes a labelled folder of such a data set.
_DATA_SETS = {"endovis17": ("medsr.io.endovis17", "prepare_endovis17")}

# What texts of configs are joined of: a text, a setting, the folder of a bundle.
_PIECE = re.compile(r"'([^']*)'|(?:str\()?@(\w+)\)?|str\(catalog\.bundle_root\('(\w+)'\)\)")
_GPU = "a GPU if there is one, else cpu"

# MONAI's own command line wants these, and as text they would all count as true.
_PYTHON_WORDS = {"True": True, "False": False, "None": None}

# What a DataLoader's worker process sends of an error is the text of its traceback.
_OURS = re.compile(r"^medsr\.errors\.(\w+): (.+)$", re.MULTILINE)
_ORIGINAL = re.compile(r"Traceback \(most recent call last\):\n(?:[ \t].*\n)*([\w.]+)(?:: (.*))?")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: words after the program's name; default ``sys.argv[1:]``.

    Example:
        >>> main(["info", "no_such_bundle"])
        4
    """
    if hasattr(sys.stdout, "reconfigure"):
        # A file name that the terminal cannot show is no reason to call a run failed.
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = _parser().parse_args(argv)
    try:
        arguments.action(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        # As in "medsr list | head": nobody reads any more, and the interpreter must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as stop:
        return _status(stop.code)
    except KeyboardInterrupt:
        print("medsr: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if arguments.verbose:
            traceback.print_exc()
        status, message = _report(error, verbose=arguments.verbose)
        print(f"medsr: error: {message}", file=sys.stderr)
        return status
    return 0


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--verbose", action="store_true", help="show third-party messages and tracebacks")

    parser = argparse.ArgumentParser(
        prog="medsr", description="Sharpen medical images and segment them with MONAI bundles."
    )
    parser.add_argument("--version", action="version", version=f"medsr {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser("list", parents=[common], help="bundles and what they do")
    listing.set_defaults(action=_list)

    info = commands.add_parser("info", parents=[common], help="facts and settings of one bundle")
    info.add_argument("bundle", metavar="BUNDLE")
    info.set_defaults(action=_info)

    run = commands.add_parser("run", parents=[common], help="run a bundle on files or folders")
    run.add_argument("bundle", metavar="BUNDLE", help="name from 'medsr list', or the folder of a bundle")
    run.add_argument("inputs", metavar="INPUT", nargs="+", type=_path, help="images, folders or DICOM series")
    run.add_argument(
        "-o", "--output", metavar="OUT", type=_path, required=True, help="folder for the results"
    )
    run.add_argument(
        "--config",
        metavar="FILE",
        nargs="+",
        default=["inference.json"],
        help="config files, later ones over earlier ones (default: inference.json)",
    )
    run.add_argument(
        "--set",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        dest="settings",
        help="settings to change; values are JSON, or else text",
    )
    run.add_argument("--quiet", action="store_true", help="no progress, only errors")
    run.set_defaults(action=_run)

    convert = commands.add_parser(
        "convert", parents=[common], help="adapt weights or data sets published elsewhere"
    )
    convert.add_argument("kind", choices=sorted((*_CONVERTERS, *_DATA_SETS)), help="what they are")
    convert.add_argument(
        "source", metavar="SOURCE", type=Path, help="weight file, or folder of the data set; it is only read"
    )
    convert.add_argument(
        "-o", "--output", metavar="OUT", type=Path, required=True, help="weight file or folder to write"
    )
    convert.set_defaults(action=_convert)

    export = commands.add_parser(
        "export", parents=[common], help="write the network of a single-image bundle as ONNX"
    )
    export.add_argument("bundle", metavar="BUNDLE", help="name from 'medsr list', or the folder of a bundle")
    export.add_argument("-o", "--output", metavar="FILE.onnx", type=Path, required=True, help="file to write")
    export.add_argument("--weights", metavar="FILE", type=Path, help="other weights than the bundle's")
    export.add_argument(
        "--config",
        metavar="FILE",
        nargs="+",
        default=[],
        help="config files over inference.json, such as x8.json",
    )
    export.set_defaults(action=_export)
    return parser


def _list(arguments: argparse.Namespace) -> None:
    bundles = catalog.list_bundles()
    if not bundles:
        raise SettingError(f"no bundles in {catalog.bundles_folder()}; set {catalog.FOLDER_VARIABLE}")
    rows = [(info.name, info.version, _scale(info.scale), info.task) for info in bundles]
    name, version, scale = (max(len(row[column]) for row in rows) for column in range(3))
    for row in rows:
        print(f"{row[0]:<{name}}  {row[1]:<{version}}  {row[2]:<{scale}}  {row[3]}".rstrip())


def _info(arguments: argparse.Namespace) -> None:
    root = _root(arguments.bundle)
    metadata = catalog.read_settings(root, "metadata.json")
    print(f"{root.name} {metadata.get('version', '')}: {metadata.get('name', '')}")
    print(f"\n{metadata.get('task', '')}")
    for paragraph in str(metadata.get("description", "")).splitlines():
        print(textwrap.fill(paragraph, 100))
    formats = metadata.get("network_data_format", {})
    for side in ("inputs", "outputs"):
        for name, port in formats.get(side, {}).items():
            print(f"\n{side[:-1]} {name}: {_port(port)}", end="")
    print("\n\nsettings (change with --set KEY=VALUE):")
    for key, value in _plain_settings(catalog.read_settings(root), root):
        print(f"  {key} = {value}")
    configs = sorted(path.name for path in (root / "configs").glob("*.json") if path.name != "metadata.json")
    print(f"configs: {', '.join(configs)}\nfolder: {root}")


def _run(arguments: argparse.Namespace) -> None:
    root = _root(arguments.bundle)
    configs = [_config(root, name) for name in arguments.config]
    refuse_unfit_configs(configs)
    overrides = _overrides(arguments, root, configs)
    refuse_unknown(overrides, configs)
    refuse_unclear(overrides, configs)
    if arguments.quiet:
        # The bundle's logging.conf would turn the messages on again.
        overrides["logging_file"] = False
    files = [str(config) for config in configs]
    with _hushed(quiet=arguments.quiet, verbose=arguments.verbose), asking(configs, overrides):
        from monai.bundle import run

        run(config_file=files[0] if len(files) == 1 else files, **overrides)
    if not arguments.quiet:
        moved = overrides["output_dir"] != _safe(arguments.output)
        print(f"medsr: results are in {overrides['output_dir'] if moved else arguments.output}")


def _convert(arguments: argparse.Namespace) -> None:
    convert = _convert_data_set if arguments.kind in _DATA_SETS else _convert_weights
    convert(arguments)
    print(f"medsr: wrote {arguments.output}")


def _convert_data_set(arguments: argparse.Namespace) -> None:
    with _hushed(quiet=False, verbose=arguments.verbose):
        module, function = _DATA_SETS[arguments.kind]
        getattr(import_module(module), function)(arguments.source, arguments.output)


def _convert_weights(arguments: argparse.Namespace) -> None:
    if not arguments.source.is_file():
        found = "is a folder; give the file" if arguments.source.is_dir() else "there is no such file"
        raise DataError(f"{arguments.source}: {found}")
    with _hushed(quiet=True, verbose=arguments.verbose):
        import torch

        module, function = _CONVERTERS[arguments.kind]
        state = getattr(import_module(module), function)(arguments.source)
    if arguments.output.exists() and arguments.output.samefile(arguments.source):
        raise OutputError(f"{arguments.output}: is the source itself; choose another name for the output")
    from medsr.io.writing import atomic_path, probe_folder

    probe_folder(arguments.output.parent)
    with atomic_path(arguments.output) as unfinished, unfinished.open("wb") as file:
        torch.save(state, file)


def _export(arguments: argparse.Namespace) -> None:
    root = _root(arguments.bundle)
    overlays = [_config(root, name) for name in arguments.config if name != "inference.json"]
    with _hushed(quiet=True, verbose=arguments.verbose):
        from medsr.export import bundle_network, export_onnx
        from medsr.io.writing import probe_folder

        network, digest = bundle_network(root, overlays, weights=arguments.weights)
        probe_folder(arguments.output.parent)
        export_onnx(network, arguments.output, origin={"bundle": root.name, "weights_sha256": digest})
    print(f"medsr: wrote {arguments.output}")


def _root(bundle: str) -> Path:
    """The bundle's folder, by name or by path; a path needs a separator, so that it cannot shadow a name."""
    if os.sep in bundle or (os.altsep and os.altsep in bundle):
        root = Path(bundle).resolve()
        if not (root / "configs" / "metadata.json").is_file():
            raise SettingError(f"{bundle}: not a bundle, there is no configs/metadata.json in it")
        return root
    return catalog.bundle_root(bundle)


def _config(root: Path, name: str) -> Path:
    inside = root / "configs" / name
    if inside.is_file() and name != "metadata.json":
        return inside
    if Path(name).is_file():
        return Path(name).resolve()
    there = sorted(path.name for path in inside.parent.glob("*.json") if path.name != "metadata.json")
    raise SettingError(f"{root.name} has no config {name}; there are {', '.join(there)}")


def _overrides(arguments: argparse.Namespace, root: Path, configs: Sequence[Path]) -> dict[str, Any]:
    inputs = [_input(path) for path in arguments.inputs]
    overrides: dict[str, Any] = {
        "dataset_dir": inputs[0] if len(inputs) == 1 else inputs,
        "output_dir": _safe(arguments.output),
    }
    if not unknown_settings(["bundle_root"], configs):
        # Explicit, because the config would look for its root by name, and this may be another copy.
        overrides["bundle_root"] = _safe(root)
    for setting in arguments.settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise SettingError(f"--set takes KEY=VALUE, got {setting!r}")
        found = _meant(value)
        # MONAI drops None and would keep what is in the config.
        overrides[key] = "$None" if found is None else found
    return overrides


def _meant(text: str) -> object:
    """What the text of a setting stands for: JSON, Python's way to write a list or a mapping, or itself."""
    with suppress(ValueError):
        return json.loads(text)
    if text.startswith(("[", "{")):
        with suppress(ValueError, SyntaxError):
            return ast.literal_eval(text)
    return _PYTHON_WORDS.get(text, text)


def _path(text: str) -> Path:
    # As an unset variable of a shell would leave it; Path takes it for the current folder.
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


def _input(path: Path) -> str:
    try:
        path.stat()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file or folder") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    return _safe(path)


def _safe(path: Path) -> str:
    # Links are not followed: a case is named, and has its sidecar, where the user calls it.
    text = str(path.absolute())
    # MONAI reads '#' in any string as its separator and would look for another folder.
    if "#" in text:
        raise DataError(f"{path}: MONAI cannot handle '#' in a path; rename the folder or file")
    return text


@contextmanager
def _hushed(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Keep third-party messages that say nothing about this run off the terminal."""
    if verbose:
        yield
        return
    factory = logging.getLogRecordFactory()
    levels = {**_START_UP_LOGGERS, **(_QUIET_LOGGERS if quiet else {})}
    with warnings.catch_warnings():
        for message in ("",) if quiet else _START_UP_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        if quiet:
            os.environ.setdefault("TQDM_DISABLE", "1")

        # MONAI sets the levels of its loggers when it is imported, so that comes first.
        import monai.bundle  # noqa: F401

        before = {name: logging.getLogger(name).level for name in levels}
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        logging.setLogRecordFactory(partial(_without_traceback, factory))
        try:
            yield
        finally:
            logging.setLogRecordFactory(factory)
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)


def _without_traceback(
    factory: Callable[..., logging.LogRecord], *values: Any, **more: Any
) -> logging.LogRecord:
    """A log record in one line: engines log the traceback of the error that is reported at the end."""
    record = factory(*values, **more)
    record.exc_info = None
    try:
        text = record.getMessage()
    except Exception:  # arguments that do not fit; logging tells so itself, and goes on
        return record
    if "Traceback (most recent call last)" in text:
        record.msg, record.args = text.splitlines()[0], ()
    return record


def _status(code: object) -> int:
    """Exit status of a SystemExit, by Python's own rules."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code
    print(f"medsr: error: {code}", file=sys.stderr)
    return 1


def _report(error: BaseException, *, verbose: bool) -> tuple[int, str]:
    """Exit status and one line for an error; MONAI wraps ours, and a worker process sends only its text."""
    for one in errors.causes(error):
        text = str(one)
        if in_worker := _OURS.search(text):
            return getattr(errors, in_worker[1], MedsrError).exit_code, in_worker[2]
        if isinstance(one, MedsrError):
            return one.exit_code, " ".join(text.split())
    while error.__cause__ is not None:
        error = error.__cause__
    kind, text = type(error).__name__, str(error)
    if in_worker := _ORIGINAL.search(text):
        kind, text = in_worker[1].rpartition(".")[2], in_worker[2] or ""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no message")
    return 1, f"{kind}: {line}{'' if verbose else ' (--verbose shows where)'}"


def _scale(scale: float | tuple[float, ...] | None) -> str:
    if scale is None:
        return "-"
    return "x".join(f"{one:g}" for one in scale) if isinstance(scale, tuple) else f"x{scale:g}"


def _port(port: object) -> str:
    if not isinstance(port, Mapping):
        return str(port)
    shape = " x ".join(str(size) for size in port.get("spatial_shape", []))
    channels = port.get("num_channels", "?")
    return f"{port.get('type', '')} ({port.get('format', '')}), {channels} channel(s), {shape}"


def _plain_settings(settings: Mapping[str, Any], root: Path) -> Iterator[tuple[str, str]]:
    """What a user would change, and its default in words: top-level numbers, words and short lists, not components."""
    for key, value in settings.items():
        if key.startswith("_") or key in ("imports", "run", "bundle_root"):
            continue
        if isinstance(value, dict) and (
            "_target_" in value or any(isinstance(one, dict) for one in value.values())
        ):
            continue
        if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
            continue
        if isinstance(value, str) and value.startswith(("$", "@")):
            value = _computed(value, settings, root)
            if value is None:
                # A component, or what only the run knows.
                continue
        elif isinstance(value, (list, dict)) and any(mark in json.dumps(value) for mark in ('"$', '"@')):
            continue
        yield key, _GPU if value == _GPU else json.dumps(value, ensure_ascii=False)


def _computed(expression: str, settings: Mapping[str, Any], root: Path) -> str | None:
    """The text that an expression of a config stands for: texts and settings that are joined, or a device."""
    if "cuda.is_available()" in expression:
        return _GPU
    text = ""
    for piece in expression.removeprefix("$").split(" + "):
        found = _PIECE.fullmatch(piece.strip())
        value: Any = None
        if found:
            literal, setting, bundle = found.groups()
            value = literal
            if setting:
                value = root if setting == "bundle_root" else settings.get(setting)
            elif bundle:
                with suppress(MedsrError):
                    value = catalog.bundle_root(bundle)
        if isinstance(value, str) and value.startswith(("$", "@")):
            value = _computed(value, settings, root)
        if not isinstance(value, (str, int, float, Path)):
            return None
        text += str(value)
    return text
