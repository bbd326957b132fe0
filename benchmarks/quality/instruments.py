"""Instruments in endoscopic frames: each source left out once, beside a baseline, and what super-resolution is worth.

    python -m benchmarks.quality.instruments OUTPUT [--minutes 30] [--report docs/results-instruments.md]

The bundle's own commands do the work. SPP-LinkNet and MONAI's FlexibleUNet are trained for equal minutes, one after the
other, without the frames of one source, which they then segment: another animal or patient, another camera,
other instruments. They also segment those that they were trained on, which tells whether they learnt at all. Then the
frames that were left out are made small, restored by interpolation and by super-resolution, and segmented again. A
step that has been done is not done again, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medsr import catalog
from medsr.engines.frame_comparison import FRAME_PROTOCOL, SHARP, frame_table
from medsr.engines.image_comparison import DEGRADATION
from medsr.io.masks import find_labelled_frames, group_of
from medsr.io.writing import write_json
from medsr.metrics.frames import summary

from benchmarks.commands import run_once
from benchmarks.data import add_data
from benchmarks.quality.instrument_folder import SOURCES

_log = logging.getLogger(__name__)

BUNDLE, SUPERRES = "endoscopy_segsrnet_segmentation", "endoscopy_segsrnet_superres"
NETWORKS: dict[str, list[str]] = {"SPP-LinkNet": [], "FlexibleUNet": ["flexible_unet.json"]}
"""Overlays of every network."""

SHIPPED = {4: "models/model.pt", 2: "models/x2/model.pt"}
"""Weights of the super-resolution by scale; a scale without is studied by interpolation alone."""

CHOSEN_ON = ("cholec80", "davinci")
"""Sources on which the augmentation was chosen: they are trained on, and not reported."""

WITHOUT = ("scared",)
"""Sources that show no instrument: they are trained on, and there is no Dice of them."""

LEARNT_FROM = ("endovis17",)
"""Sources of which frames are in the training of the super-resolution: ``benchmarks/quality/stereo_folder.py``."""

ENOUGH = 10**6
"""Iterations that no budget of minutes reaches."""

HEAD = """# Results on instruments

Written by `{command}`. Binary: instrument or not. In each group of rows
the frames of one source are segmented by networks that were trained without it, for {minutes:g} minutes each: other
instruments, another animal or patient, in part another camera. Four scenes with 24 frames, and two frames of {without}
without instruments, are all there is: this shows what transfers, and nothing clinical. Augmentation and sizes were
chosen on two of the scenes, {chosen_on}, which are trained on, were outlined by hand for this project
(`benchmarks/quality/instrument_outlines.json`), and are not reported. CholecSeg8k and Cholec80 are one kind of
operation and camera, from other patients as far as the frames tell.
Both networks start from random weights, with one schedule, rate and loss; FlexibleUNet has the encoder EfficientNet-b0.

Protocol: {protocol}. IoU and Dice are means and standard deviations over the frames.
"""

STUDY = """Each frame was made small ({degradation}), restored, and segmented; `sharp` is the frame itself. `closed`
is the share of the loss in Dice from sharp to bicubic that super-resolution brings back; it says nothing where bicubic
loses less than the scatter of the frames. The networks see all of them at the `sizes` of the bundle, at most half of
the frame's: what x2 restores is mostly lost again. `StereoFMEN` is the default network of `{superres}`;
it learnt from the frames of {learnt_from}, among many others: its rows there are too good, and `closed` is left out.
"""

OWN = """## On the frames of the training

The same networks on the sharp frames that they were trained on: a check that they learnt, and nothing more.
"""


def main() -> None:
    """Train, segment, print and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    add_data(parser)
    parser.add_argument("--minutes", type=float, default=30.0, help="of each training")
    parser.add_argument("--groups", nargs="*", help="sources to leave out in turn; default all that report")
    parser.add_argument("--scales", type=int, nargs="*", default=list(SHIPPED), choices=list(SHIPPED))
    parser.add_argument("--report", type=Path, help="also write the page as Markdown")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    output = arguments.output.resolve()
    folder = output / "all"
    if not folder.exists():
        # Under another name first: what was interrupted is no folder of frames.
        begun = output / "all.part"
        for write in SOURCES:
            write(arguments.data, begun)
        begun.rename(folder)
    training = {
        "minutes": arguments.minutes,
        "iterations": ENOUGH,
        # MONAI's network is not known to bear bfloat16, and would have fewer iterations than ours in the same minutes.
        "amp": "float32",
    }
    sources = sorted({group_of(item["case"]) for item in find_labelled_frames(folder)})
    groups = arguments.groups or [one for one in sources if one not in (*CHOSEN_ON, *WITHOUT)]
    rows, own, runs = [], [], []
    for group in groups:
        for network in NETWORKS:
            runs.append({"left out": group, "network": network, **trained(output, group, network, training)})
            rows += segmented(output, group, network, [1, *arguments.scales])
            own += on_own_frames(output, group, network, sources)
    found = {"protocol": FRAME_PROTOCOL, "runs": runs, "rows": rows, "rows of the training": own}
    write_json(output / "instruments.json", found)
    command = (
        f"python -m benchmarks.quality.instruments OUTPUT --groups {' '.join(groups)} --minutes {arguments.minutes:g} "
        f"--scales {' '.join(map(str, arguments.scales))}"
    )
    text = page(rows, own, runs, command=command.strip(), minutes=arguments.minutes)
    print(text)
    if arguments.report:
        arguments.report.write_text(text, encoding="utf-8")


def trained(output: Path, group: str, network: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train without a group, unless that was done, and tell how far the budget went."""
    done = output / group / network
    _log.info("%s: training without %s", network, group)
    run_once(
        BUNDLE,
        ["train.json", *NETWORKS[network]],
        {"dataset_dir": output / "all", "leave_out": [group], **settings},
        output=done,
    )
    record = json.loads((done / "train_record.json").read_text(encoding="utf-8"))
    return {key: record[key] for key in ("iterations", "minutes")}


def segmented(output: Path, group: str, network: str, scales: Sequence[int]) -> list[dict[str, Any]]:
    """Segment the frames of the group that was left out, sharp and at each scale, and return the rows."""
    rows = []
    for scale in scales:
        study: dict[str, Any] = {}
        if scale > 1:
            study["study_scale"] = scale
            weights = catalog.bundle_root(SUPERRES) / SHIPPED[scale]
            if weights.exists():
                study["superres_weights"] = {"StereoFMEN": str(weights)}
        rows += _scored(output, group, network, step=f"x{scale}", settings={"groups": [group], **study})
    return rows


def on_own_frames(output: Path, group: str, network: str, sources: Sequence[str]) -> list[dict[str, Any]]:
    """Segment the sharp frames that a network was trained on, all but those of a group, and return the rows."""
    own = [source for source in sources if source not in (group, *WITHOUT)]
    return _scored(output, group, network, step="own", settings={"groups": own})


def _scored(
    output: Path, group: str, network: str, *, step: str, settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Rows of frames that a network which was trained without a group segments, unless that was done."""
    done = output / group / f"{network}_{step}"
    _log.info("%s without %s: frames of %s, %s", network, group, ", ".join(settings["groups"]), step)
    run_once(
        BUNDLE,
        ["inference.json", *NETWORKS[network], "evaluate.json"],
        {"dataset_dir": output / "all", "weights": output / group / network / "model.pt", **settings},
        output=done,
    )
    found = json.loads((done / "frames.json").read_text(encoding="utf-8"))["rows"]
    return [{**row, "network": network} for row in found]


def page(
    rows: Sequence[Mapping[str, Any]],
    own: Sequence[Mapping[str, Any]],
    runs: Sequence[Mapping[str, Any]],
    *,
    command: str,
    minutes: float,
) -> str:
    """The page in Markdown."""
    head = HEAD.format(
        command=command,
        minutes=minutes,
        protocol=FRAME_PROTOCOL,
        chosen_on=" and ".join(CHOSEN_ON),
        without=" and ".join(WITHOUT),
    )
    parts = [head, frame_table(at_scale(rows, 1)), ""]
    for scale in sorted({row["scale"] for row in rows} - {1}):
        found = at_scale(rows, scale)
        study = STUDY.format(degradation=DEGRADATION, learnt_from=", ".join(LEARNT_FROM), superres=SUPERRES)
        parts += [f"## x{scale}\n", study, frame_table(found), "", *closed(found)]
    parts += [OWN, frame_table(own), ""]
    titles = list(runs[0])
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    lines += ["| " + " | ".join(str(run[title]) for title in titles) + " |" for run in runs]
    return "\n".join([*parts, "## Trainings\n", *lines, ""])


def at_scale(rows: Sequence[Mapping[str, Any]], scale: int) -> list[Mapping[str, Any]]:
    """Rows of one part of the study."""
    return [row for row in rows if row["scale"] == scale]


def closed(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """For every network, by how much super-resolution closes the gap in Dice between bicubic and sharp.

    Frames that the super-resolution was trained on are left out.
    """
    lines = []
    rows = [row for row in rows if row["group"] not in LEARNT_FROM]
    for network in dict.fromkeys(row["network"] for row in rows):
        dice = {
            source: summary(row for row in rows if (row["network"], row["input"]) == (network, source))[
                "dice_present"
            ]
            for source in dict.fromkeys(row["input"] for row in rows)
        }
        gap = dice[SHARP] - dice["bicubic"]
        for source in dice:
            if source not in (SHARP, "bicubic"):
                gain = dice[source] - dice["bicubic"]
                share = f"{gain / gap:.0%}" if gap > 0 else "-"
                lines.append(f"- {network}, {source}: Dice {gain:+.3f} against bicubic, closed: {share}")
    return [*lines, ""] if lines else []


if __name__ == "__main__":
    main()
