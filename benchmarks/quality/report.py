"""Write ``docs/results.md`` from the rows that ``benchmarks.quality.superres`` left: numbers are never typed.

    python -m benchmarks.quality.report [--keep] "title=runs/known.json" "title=runs/mismatch.json" ...

With ``--keep`` the parts of the page that are not named stay as they are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from medsr.engines.comparison import PROTOCOL, table

from benchmarks.quality.superres import LOOKED_AT

HEAD = """# Results

Written by `python -m benchmarks.quality.report` from the rows of `python -m benchmarks.quality.superres`, which
holds the data list. No subject here was seen in training. Few subjects: they show that the method works on unseen
brains of several sites and contrasts, and nothing clinical.

Not all of them are untouched: {looked_at} were looked at while the architecture was chosen, though no weights
were trained on them. The mean gain of each part is therefore given with and without them, with the standard deviation
over the subjects.

Protocol `{protocol}`.

`network` is the shipped weights; `adapted` the same after some minutes on the scan itself, run in both directions along
the slices, as by `adapt.json`; `smore-like` a plane network trained from nothing on the scan itself (baseline). The
results of `network` and `adapted` are made consistent with the measured slices; `+ consistency` is a baseline after the
same projection. PSNR in dB; each row is one subject.

The parts were made by these, `FOUR`, `TWO` and `SIX` being the subjects that their tables name:

```bash
superres() {{ python -m benchmarks.quality.superres "$@"; }}
superres --ratios 4 --gaps 0
superres --subjects FOUR
superres --subjects TWO --ratios 4 --gaps 0 --assumed-profile gaussian      # and box
OMP_NUM_THREADS=1 superres --subjects SIX --ratios 4 --gaps 0 --plane-minutes 4 --adapt-minutes 4
OMP_NUM_THREADS=1 superres --ratios 4 --gaps 0 --adapt-minutes 5
```
"""


def main() -> None:
    """Render all files given as ``title=path``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results.md"))
    arguments = parser.parse_args()
    parts = parts_of(arguments.output.read_text()) if arguments.keep and arguments.output.exists() else {}
    for part in arguments.parts:
        title, _, path = part.partition("=")
        rows = json.loads(Path(path).read_text())["rows"]
        parts[title] = "\n\n".join([table(rows), gains(rows), summary(rows)])
    head = HEAD.format(protocol=PROTOCOL, looked_at=", ".join(LOOKED_AT))
    arguments.output.write_text(
        "\n".join([head, *(f"## {title}\n\n{body}\n" for title, body in parts.items())])
    )


def parts_of(page: str) -> dict[str, str]:
    r"""Titles of a page and what stands below them, without its head.

    Example:
        >>> parts_of("# Page\n\n## One\n\n| 1 |\n\n## Two\n\n| 2 |\n")
        {'One': '| 1 |', 'Two': '| 2 |'}
    """
    found = (part.partition("\n") for part in f"\n{page}".split("\n## ")[1:])
    return {title: body.strip() for title, _, body in found}


def gains(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean gain over cubic and its standard deviation over the subjects: of all, and of those not looked at before.

    A subject counts once, with the mean over its ratios and gaps.
    """
    found = {(row["case"], row["ratio"], row["gap"], row["method"]): row["psnr_db"] for row in rows}
    by_subject: dict[str, dict[str, list[float]]] = {}
    for (case, ratio, gap, method), value in found.items():
        cubic = found.get((case, ratio, gap, "cubic"))
        if method != "cubic" and cubic is not None:
            by_subject.setdefault(method, {}).setdefault(case, []).append(value - cubic)
    lines = [
        "| mean gain over cubic, dB | " + " | ".join(by_subject) + " |",
        "|---|" + "---|" * len(by_subject),
    ]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    fresh = [case for case in cases if case not in LOOKED_AT]
    groups = {f"all subjects ({len(cases)})": cases}
    if fresh != cases:
        groups[f"without those looked at before ({len(fresh)})"] = fresh
    for name, chosen in groups.items():
        means = [[np.mean(known[case]) for case in chosen if case in known] for known in by_subject.values()]
        lines.append(f"| {name} | " + " | ".join(map(_mean_and_deviation, means)) + " |")
    return "\n".join(lines)


def _mean_and_deviation(values: Sequence[float]) -> str:
    if not values:
        return "-"
    deviation = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):+.2f}{deviation}"


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Means over all rows of the other figures, methods as columns; least and greatest of the rows in brackets."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    names = {
        "ssim": "SSIM (3D)",
        "edge_psnr_db": "PSNR in the edge band, dB",
        "data_consistency_db": "data consistency, dB",
        "spearman": "Spearman of uncertainty and error",
        "ause": "AUSE (0 = perfect ranking)",
        "coverage_2u": "errors below twice the uncertainty",
        "seconds": "seconds",
    }
    lines = ["| mean (least to greatest) of | " + " | ".join(methods) + " |", "|---|" + "---|" * len(methods)]
    for key, name in names.items():
        found = [
            [row[key] for row in rows if row["method"] == m and row.get(key) is not None] for m in methods
        ]
        if any(found):
            cells = [_mean_and_range(values, 1 if key == "seconds" else 3) for values in found]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean_and_range(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    main()
