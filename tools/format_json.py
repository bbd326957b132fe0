"""Formats bundle JSON: 110 columns, whatever fits stays on one line, keys keep their order.

One number per line, as the usual formatters write it, makes a config almost twice as long and hides its
shape. Numbers keep their spelling (``1e-4`` stays ``1e-4``). A key that stands twice is an error: JSON
readers would silently use the second.

    python tools/format_json.py [--check] FILE_OR_FOLDER ...
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WIDTH = 110
INDENT = 4


class Number(str):
    """A number as it is spelt in the file."""

    __slots__ = ()


def formatted(text: str) -> str:
    """Return the JSON text in the house style.

    Args:
        text: any JSON document.

    Raises:
        ValueError: if it is not JSON, holds NaN or infinity, or names a key twice.

    Example:
        >>> formatted('{"roi":[96,96],"lr":1e-4}').splitlines()[1:3]
        ['    "roi": [96, 96],', '    "lr": 1e-4']
    """
    content = json.loads(
        text,
        object_pairs_hook=_without_duplicates,
        parse_float=Number,
        parse_int=Number,
        parse_constant=_refuse_constant,
    )
    return _expanded(content, 0) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Format files in place, or with ``--check`` list those that would change and return 1."""
    parser = argparse.ArgumentParser(description="Format bundle JSON: 110 columns, short lists on one line.")
    parser.add_argument("paths", nargs="+", type=Path, help="files, or folders to search for *.json")
    parser.add_argument("--check", action="store_true", help="change nothing, list what would change")
    arguments = parser.parse_args(argv)
    failed = False
    for path in _files(arguments.paths):
        try:
            old = path.read_text(encoding="utf-8")
            new = formatted(old)
        except (OSError, ValueError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            failed = True
            continue
        if new == old:
            continue
        if arguments.check:
            print(f"{path}: not in the house style; run: make format", file=sys.stderr)
            failed = True
        else:
            path.write_text(new, encoding="utf-8")
    return int(failed)


def _files(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(path.rglob("*.json"))
        else:
            yield path


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"key {key!r} stands twice in one object")
        content[key] = value
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _compact(value: Any) -> str:
    """The value on one line."""
    if isinstance(value, Number):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_compact(key)}: {_compact(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_compact, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _expanded(value: Any, depth: int) -> str:
    """The value with one item per line, each item on one line where it fits."""
    if not isinstance(value, (dict, list)) or not value:
        return _compact(value)
    pairs = value.items() if isinstance(value, dict) else ((None, item) for item in value)
    margin = " " * (INDENT * (depth + 1))
    lines = []
    for key, item in pairs:
        head = margin if key is None else f"{margin}{_compact(key)}: "
        line = head + _compact(item)
        # The comma that follows counts.
        fits = len(line) + 1 <= WIDTH
        lines.append(line if fits else head + _expanded(item, depth + 1))
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n" + ",\n".join(lines) + f"\n{' ' * (INDENT * depth)}{closing}"


if __name__ == "__main__":
    sys.exit(main())
