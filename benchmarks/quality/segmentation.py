"""Masks on thin slices from masks drawn on thick ones: every subject left out once, baselines and ablations beside.

    python -m benchmarks.quality.segmentation STUDY OUT [--data FOLDER] [--ablations]

For each subject the whole chain is run without it, by the bundles' own commands: super-resolution learns the masks of
the others and makes their pseudo data; a network for the thick slices alone is trained, as published; and from it
every variant, the network for thick slices too, goes on for the same number of iterations. All of them then segment
the subject that none has seen, from the same simulated thick slices. A step that has been done is not done again, so
that a run that was stopped goes on. A fold takes hours: the rows of a report stand beside it as JSON, and another run
with the same settings and other ``--cases`` adds to them.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from medsr import catalog
from medsr.engines.mask_comparison import PROTOCOL, mask_table
from medsr.io.writing import write_json

from benchmarks.commands import run_config, run_once
from benchmarks.data import add_data
from benchmarks.quality.thick_folder import STUDIES, write_study, written_classes

_log = logging.getLogger(__name__)

HEAD = """# Results of the segmentation

Written by `{command}`. Every row is a subject that was left out of the super-resolution of the masks, of the
pseudo data and of the training of every network. {seen} Few subjects: they show what the method does, and nothing
clinical.

Protocol: {protocol}. min_island_fraction is {fraction:g}.

Budgets per network, equal for all: {budgets}; the learning rate of the variants is {rate:g}. `nearest` repeats
the mask of a thick slice, `signed distance` interpolates its shape, `thin head` is the network's own mask on thin
slices (that of `{plain}` was never trained: it interpolates the logits). `{plain}` is the network for thick slices
alone, `{upper}` the upper bound; `perfect thick mask` is what the best segmentation of thick slices could give.
`thick_dice` of the thin head is that of its probabilities averaged over a slice.
"""

SUPERRES, SEGMENTATION = "mri_rehrseg_superres", "mri_rehrseg_segmentation"
LABELS = ("train.json", "train_planes.json", "train_labels.json")

START, PLAIN = "start", "plain"
UPPER_BOUND = "trained on true thin slices"
VARIANTS: dict[str, dict[str, Any]] = {
    "ours": {},
    PLAIN: {},
    UPPER_BOUND: {"uncertainty_weight": 0, "cosine_weight": 0, "pairwise_weight": 0},
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "without pseudo data": {"phase": 0},
    "without uncertainty": {"uncertainty_weight": 0},
    "without distillation": {"cosine_weight": 0, "pairwise_weight": 0},
    "cosine only": {"pairwise_weight": 0},
    "pair-wise only": {"cosine_weight": 0},
}


def main() -> None:
    """Run, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("output", type=Path)
    add_data(parser)
    parser.add_argument("--cases", nargs="*", help="cases to leave out, one after the other; default all")
    parser.add_argument("--ratio", type=float, default=4.0)
    parser.add_argument("--label-iterations", type=int, default=600)
    parser.add_argument("--start-iterations", type=int, default=1000)
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=0.0005,
        help="of the variants; at that of the start, 0.002, they leave what they share and differ by chance",
    )
    parser.add_argument(
        "--min-island-fraction",
        type=float,
        default=0.1,
        help="of every mask that is compared, 0 removes no islands",
    )
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument(
        "--only", nargs="*", choices=[*VARIANTS, *ABLATIONS], help="these variants, 'ours' first"
    )
    parser.add_argument(
        "--report", type=Path, help="also write the table as Markdown, the rows of other cases in it kept"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="subjects at once, one thread each if more than 1"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    unknown = [case for case in arguments.cases or () if case not in STUDIES[arguments.study]]
    if unknown:
        parser.error(
            f"no case {unknown[0]} in {arguments.study}; there are {', '.join(STUDIES[arguments.study])}"
        )
    output = arguments.output.resolve()
    write_study(arguments.study, output / "thick", arguments.data, ratio=arguments.ratio)
    known = {**VARIANTS, **ABLATIONS}
    chosen = arguments.only or (known if arguments.ablations else VARIANTS)
    variants = {name: known[name] for name in chosen}
    budgets = {
        "labels": arguments.label_iterations,
        START: arguments.start_iterations,
        "variants": arguments.iterations,
    }
    folds = [
        Fold(
            output,
            case,
            budgets,
            learning_rate=arguments.learning_rate,
            ratio=arguments.ratio,
            min_island_fraction=arguments.min_island_fraction,
            classes=written_classes(arguments.study),
        )
        for case in arguments.cases or STUDIES[arguments.study]
    ]
    threads = {"OMP_NUM_THREADS": "1"} if arguments.jobs > 1 else {}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = pool.map(lambda fold: fold.run(variants, {**os.environ, **threads}), folds)
        rows = [row for one in found for row in one]
    setting = {
        "protocol": PROTOCOL,
        "min_island_fraction": arguments.min_island_fraction,
        "learning_rate": arguments.learning_rate,
    }
    write_json(output / "masks.json", {**setting, "rows": rows})
    print(mask_table(rows))
    if arguments.report:
        setting |= {"study": arguments.study, "ratio": arguments.ratio, **budgets, "networks": list(variants)}
        rows = with_earlier(arguments.report.with_suffix(".json"), setting, rows)
        head = HEAD.format(
            seen=about_seen(seen_before(arguments.study)),
            command=f"python -m benchmarks.quality.segmentation {arguments.study} ...",
            protocol=PROTOCOL,
            fraction=arguments.min_island_fraction,
            rate=arguments.learning_rate,
            budgets=", ".join(f"{count} iterations ({name})" for name, count in budgets.items()),
            plain=PLAIN,
            upper=UPPER_BOUND,
        )
        arguments.report.write_text(f"{head}\n{mask_table(rows)}\n")


def seen_before(study: str) -> list[str]:
    """Cases whose image the weights were trained on that the chain starts from, those of the super-resolution bundle.

    Example:
        >>> seen_before("tumour"), seen_before("ventricle")
        ([], ['vxm'])
    """
    config = catalog.bundle_root(SUPERRES) / "configs" / "train_shipped.json"
    files = json.loads(config.read_text(encoding="utf-8"))["train_files"]
    return [case for case, source in STUDIES[study].items() if source.image in files]


def about_seen(cases: Sequence[str]) -> str:
    """What a page says about them.

    Example:
        >>> about_seen([])
        'Nor had the super-resolution that the chain starts from seen it.'
    """
    if not cases:
        return "Nor had the super-resolution that the chain starts from seen it."
    return (
        f"The super-resolution that the chain starts from had learnt from the image of {' and '.join(cases)}, "
        "though not from its mask: look at the others."
    )


def with_earlier(
    path: Path, setting: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Put rows into a file beside those of other cases that were made the same way, and return all.

    Raises:
        SystemExit: if the file was made with another setting.
    """
    found: dict[str, Any] = (
        json.loads(path.read_text(encoding="utf-8")) if path.exists() else {**setting, "rows": []}
    )
    kept = found.pop("rows")
    if found != setting:
        raise SystemExit(f"{path}: was made with other settings; remove it or choose another report")
    new = {row["case"] for row in rows}
    merged = sorted([*rows, *(row for row in kept if row["case"] not in new)], key=lambda row: row["case"])
    write_json(path, {**setting, "rows": merged})
    return merged


class Fold:
    """One subject left out: its folder, and the steps that lead to its rows."""

    def __init__(
        self,
        output: Path,
        case: str,
        budgets: Mapping[str, int],
        *,
        learning_rate: float,
        ratio: float,
        min_island_fraction: float,
        classes: Mapping[str, Sequence[int]],
    ) -> None:
        self.thick, self.case, self.folder = output / "thick", case, output / case
        self.classes = dict(classes)
        self.budgets, self.ratio, self.min_island_fraction = dict(budgets), ratio, min_island_fraction
        self.learning_rate = learning_rate
        self.environment: dict[str, str] = {}

    def run(
        self, variants: Mapping[str, Mapping[str, Any]], environment: Mapping[str, str]
    ) -> list[dict[str, Any]]:
        """Train what is missing, compare, and return the rows of the case."""
        self.environment = dict(environment)
        left_out = {"leave_out": [self.case]}
        classes, count = {"classes": self.classes}, {"label_classes": len(self.classes)}
        labels = {"dataset_dir": self.thick, "iterations": self.budgets["labels"], **classes, **left_out}
        self._step("labels", SUPERRES, LABELS, labels)
        teacher = self.folder / "labels" / "model.pt"
        self._step(
            "pseudo",
            SEGMENTATION,
            ["make_pseudo.json"],
            {"dataset_dir": self.thick, "weights": teacher, **classes, **left_out},
        )
        pseudo = {"dataset_dir": self.folder / "pseudo", "ratio": self.ratio, **count}
        plain = ["train.json", "train_plain.json"]
        self._step(START, SEGMENTATION, plain, {**pseudo, "iterations": self.budgets[START]})
        common = {
            "iterations": self.budgets["variants"],
            "initial_weights": self.folder / START / "model.pt",
            "learning_rate": self.learning_rate,
            "seed": 1,
        }
        for name, settings in variants.items():
            source = {**pseudo, "teacher_weights": teacher}
            if name == PLAIN:
                source = pseudo
            elif name == UPPER_BOUND:
                source = {
                    "dataset_dir": self.thick / "true",
                    "ratio": self.ratio,
                    **classes,
                    **count,
                    **left_out,
                }
            configs = plain if name == PLAIN else plain[:1]
            self._step(name, SEGMENTATION, configs, {**source, **common, **settings})
        first, *others = variants
        run_config(
            SEGMENTATION,
            ["inference.json", "evaluate.json"],
            {
                "dataset_dir": self.thick / "true",
                "leave_out": [case for case in self._cases() if case != self.case],
                "weights": self.folder / first / "model.pt",
                "compare": {name: str(self.folder / name / "model.pt") for name in others},
                "ratio": self.ratio,
                "min_island_fraction": self.min_island_fraction,
                **classes,
                **count,
            },
            output=self.folder / "comparison",
            environment=self.environment,
        )
        rows = json.loads((self.folder / "comparison" / "masks.json").read_text())["rows"]
        return [{**row, "network": first if row["network"] == "network" else row["network"]} for row in rows]

    def _cases(self) -> list[str]:
        return sorted(path.name.removesuffix(".nii.gz") for path in (self.thick / "labels").iterdir())

    def _step(self, name: str, bundle: str, configs: Sequence[str], settings: Mapping[str, Any]) -> None:
        """Run configs of a bundle into a folder of their own, unless that was done before."""
        _log.info("%s: %s", self.case, name)
        run_once(bundle, configs, settings, output=self.folder / name, environment=self.environment)


if __name__ == "__main__":
    main()
