"""Write ``docs/results.md`` from the rows that ``benchmarks.quality.superres`` left: numbers are never typed.

python -m benchmarks.quality.report "title=runs/known.json" "title=runs/mismatch.json" ...
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from medsr.engines.comparison import PROTOCOL, table

HEAD = """# Results

Written by `python -m benchmarks.quality.report` from the rows of `python -m benchmarks.quality.superres`, which
holds the data list. No subject here was seen in training. Few subjects: they show that the method works on unseen
brains of several sites and contrasts, and nothing clinical.

Protocol `{protocol}`.

`network` is the shipped weights, `adapted` the same after some minutes on the scan itself, `smore-like` a plane network
trained from nothing on the scan itself (baseline). PSNR in dB; each row is one subject.
"""


def main() -> None:
    """Render all files given as ``title=path``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results.md"))
    arguments = parser.parse_args()
    text = [HEAD.format(protocol=PROTOCOL)]
    for part in arguments.parts:
        title, _, path = part.partition("=")
        rows = json.loads(Path(path).read_text())["rows"]
        text += [f"## {title}\n", table(rows), "", summary(rows), ""]
    arguments.output.write_text("\n".join(text))


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Means over all rows of the other figures, methods as columns."""
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
    lines = ["| mean of | " + " | ".join(methods) + " |", "|---|" + "---|" * len(methods)]
    for key, name in names.items():
        found = [
            [row[key] for row in rows if row["method"] == m and row.get(key) is not None] for m in methods
        ]
        if any(found):
            cells = [f"{np.mean(values):.3f}" if values else "" for values in found]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
