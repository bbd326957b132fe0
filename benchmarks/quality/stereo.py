"""Stereo super-resolution beside interpolation, other networks and itself without the other view.

    python -m benchmarks.quality.stereo [OUTPUT] [--scales 4 2] [--report docs/results-stereo.md] [--data FOLDER]

The bundle's own command does the work, on scenes that no training has seen.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from medsr import catalog
from medsr.engines.image_comparison import DEGRADATION, image_table

from benchmarks.commands import run_config
from benchmarks.data import add_data
from benchmarks.quality.stereo_folder import TEST, write_pairs

BUNDLE, SINGLE = "endoscopy_segsrnet_superres", "image_fmen_superres"
OVERLAYS: dict[int, list[str]] = {4: [], 2: ["x2.json"]}

NETWORK = "network"
"""What the bundle calls the network under test in its table."""


HEAD = """# Results on stereo pairs

Written by `python -m benchmarks.quality.stereo`. {count} pairs, and one of them from an endoscope: they show what the
network does, and no more. No scene here was seen in training, and the endoscope (SCARED) is another than that of the
training pairs. Degradation: {degradation}.

`network` is the shipped weights; `network, ensemble` the same with `--ensemble True`, which takes four times the time;
`SEGSRNet` the network as it was described, at half the width (`segsrnet.json`);
`FMEN, each view alone` the weights of `image_fmen_superres`, which `network` started from. `one view` is the same
network, given each view as both.

The first pair of columns decides: the mean of both views, red, green and blue, uncropped. The second leaves out 64
columns of the left view. The disparity error says whether the views still fit together.
"""


class Contestant(NamedTuple):
    """A network beside the shipped one: its overlays, its settings, and the scales that it has weights for."""

    overlays: tuple[str, ...] = ()
    settings: Mapping[str, Any] = {}
    scales: tuple[int, ...] = tuple(OVERLAYS)


def contestants() -> dict[str, Contestant]:
    """Networks by the name that they have in the table, the shipped one first."""
    single = {
        "cross_view": False,
        "weights": catalog.bundle_root(SINGLE) / "models/model.pt",
        "one_view": "[]",
    }
    return {
        NETWORK: Contestant(),
        f"{NETWORK}, ensemble": Contestant(settings={"ensemble": True, "one_view": "[]"}),
        "SEGSRNet": Contestant(("segsrnet.json",)),
        "FMEN, each view alone": Contestant(settings=single, scales=(4,)),
    }


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/stereo"))
    parser.add_argument("--scales", type=int, nargs="*", default=list(OVERLAYS), choices=list(OVERLAYS))
    add_data(parser)
    parser.add_argument("--report", type=Path, help="also write the tables as Markdown")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    pairs = write_pairs("test", output, arguments.data)
    text = [HEAD.format(degradation=DEGRADATION, count=len(TEST))]
    for scale in arguments.scales:
        rows = [
            row
            for name, one in contestants().items()
            if scale in one.scales
            for row in scored(name, one, scale=scale, pairs=pairs, output=output / f"x{scale}")
        ]
        text += [f"## x{scale}\n", image_table(rows, {"disparity_mae_px": "disparity error, px"}), ""]
    print("\n".join(text))
    if arguments.report:
        arguments.report.write_text("\n".join(text))


def scored(name: str, one: Contestant, *, scale: int, pairs: Path, output: Path) -> list[dict[str, Any]]:
    """Rows of one contestant at one scale; interpolation is in those of the shipped network."""
    target = output / name.replace(",", "").replace(" ", "_")
    run_config(
        BUNDLE,
        ["inference.json", *OVERLAYS[scale], *one.overlays, "evaluate.json"],
        {"dataset_dir": pairs, **one.settings},
        output=target,
    )
    rows = json.loads((target / "pairs.json").read_text(encoding="utf-8"))["rows"]
    if name == NETWORK:
        return rows
    ours = [row for row in rows if row["method"].startswith(NETWORK)]
    return [{**row, "method": row["method"].replace(NETWORK, name, 1)} for row in ours]


if __name__ == "__main__":
    main()
