"""What a case leaves behind, whole or not at all, and the report of the run."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import time
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents

from medsr.errors import MedsrError, OutputError
from medsr.geometry import spacing_of
from medsr.handlers.qc_figure import superres_figure
from medsr.handlers.run_conditions import RunConditions
from medsr.io.cases import input_digest, sidecar_digest
from medsr.io.writing import write_figure, write_json, write_nifti
from medsr.settings import as_flag

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CaseOutput", "RunReport", "segmented_volume_facts", "volume_facts", "write_volume"]

_log = logging.getLogger(__name__)

_NAMED = 3
"""Differences that a message names: one that lists all settings of another bundle tells less."""


def write_volume(path: Path, image: Any, item: Mapping[str, Any]) -> None:
    """Write a ``MetaTensor`` ``(C, X, Y, Z)`` as NIfTI; channels become the fourth axis, one channel none."""
    values = image.as_tensor().cpu()
    array = np.asarray(values.float() if values.is_floating_point() else values)
    array = array[0] if len(array) == 1 else np.moveaxis(array, 0, -1)
    codes = {name: max(1, int(image.meta.get(name, 1))) for name in ("sform_code", "qform_code")}
    # Of a time series, and not of the classes of a mask.
    along = {
        name: image.meta[name] for name in ("step", "step_unit") if name in image.meta and array.ndim == 4
    }
    affine = np.asarray(image.affine, dtype=np.float64)
    write_nifti(path, array, affine=affine, dtype=array.dtype, **codes, **along)


def volume_facts(item: Mapping[str, Any]) -> dict[str, Any]:
    """Grids of input and result of a processed volume, for the report."""
    meta, pred = item["image"].meta, item["pred"]
    affine = np.asarray(meta["original_affine"], dtype=np.float64)
    return {
        "input_size": [int(n) for n in meta["spatial_shape"]],
        "input_spacing_mm": [round(float(s), 5) for s in spacing_of(affine)],
        "output_size": [int(n) for n in pred.shape[1:]],
        "output_spacing_mm": [round(float(s), 5) for s in spacing_of(np.asarray(pred.affine))],
    }


def segmented_volume_facts(item: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`volume_facts` says of a segmented volume, and the islands that were removed from its masks.

    Args:
        item: the postprocessed item; ``pred`` and ``pred_thick`` are masks that went through
            :class:`~medsr.transforms.islands.RemoveIslandsd`, ``probability`` has a channel per foreground class.
    """
    nothing = {"islands": 0, "ml": 0.0}
    removed = {
        grid: {
            str(index): item[key].meta["islands_removed"].get(index, nothing)
            for index in range(1, 1 + len(item["probability"]))
        }
        for grid, key in (("thin_grid", "pred"), ("input_grid", "pred_thick"))
    }
    return {**volume_facts(item), "islands_removed": removed}


def processed_cases(engine: Engine) -> list[dict[str, Any]]:
    """The decollated output of an evaluator with what its input items hold besides, such as the case name."""
    return [{**origin, **item} for origin, item in zip(engine.state.batch, engine.state.output, strict=True)]


class CaseOutput:
    """Writes the results and the quality-control figure of a case; if one fails, none of the case remains.

    Runs inside the guarded iteration of a :class:`~medsr.engines.case_evaluator.CaseEvaluator`, after the
    postprocessing.

    Args:
        output_dir: folder of the results.
        suffixes: result key to file suffix, see ``layout``; a key that an item lacks is left out.
        figure: also draw ``<case>_qc.png``.
        overwrite: replace results of an earlier run; those that this one does not make are removed, once all that it
            makes of the case are there.
        layout: where the result of a case and a suffix goes, below the folder.
        write: writes a result to a path, whole or not at all; it is given the postprocessed item as well.
        alone: refuse folders with results of other cases: for what is read as a whole afterwards, such as a training
            folder, where a case that is left out now would stay.
        draw: makes the figure from a postprocessed item and the facts of the inferer; see
            :mod:`medsr.handlers.qc_figure`.

    Example:
        >>> sorted(CaseOutput("out").suffixes.values())
        ['superres', 'uncertainty']
    """

    def __init__(
        self,
        output_dir: str | Path,
        suffixes: Mapping[str, str] | None = None,
        figure: bool = True,
        *,
        overwrite: bool = False,
        alone: bool = False,
        layout: str = "{case}_{suffix}.nii.gz",
        write: Callable[[Path, Any, Mapping[str, Any]], Any] = write_volume,
        draw: Callable[[Mapping[str, Any], Mapping[str, Any]], Figure] = superres_figure,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.figure, self.overwrite = as_flag("figure", figure), as_flag("overwrite", overwrite)
        self.alone = as_flag("alone", alone)
        self.layout, self.write_result, self.draw = layout, write, draw
        self.suffixes = dict(suffixes or {"pred": "superres", "uncertainty": "uncertainty"})
        self.written: dict[str, list[str]] = {}

    def attach(self, engine: Engine) -> None:
        """Register behind the postprocessing."""
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self)

    def present(self, case: str) -> list[str]:
        """Names of the results and figures of a case that are there already."""
        names = [*self._names(case).values(), *self._figures(case)]
        return [name for name in names if (self.output_dir / name).exists()]

    def __call__(self, engine: Engine) -> None:
        """Write the case that was just processed."""
        for item in processed_cases(engine):
            self.write(item, self._facts(engine))

    def write(self, item: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Write one postprocessed item with the keys ``image``, ``case`` and those of ``suffixes``."""
        case = str(item["case"])
        results = {
            self.output_dir / name: item[key] for key, name in self._names(case).items() if key in item
        }
        figures = [self.output_dir / name for name in self._figures(case)]
        before = {path: _stamp(path) for path in (*results, *figures)}
        try:
            for path, result in results.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                self.write_result(path, result, item)
            for path in figures:
                write_figure(path, self.draw(item, facts))
            for path in self._outdated(case) - set(before):
                path.unlink(missing_ok=True)
        except BaseException:
            # Results of an earlier run stay if none of them has been replaced yet.
            if any(_stamp(path) != stamp for path, stamp in before.items()):
                for path in before:
                    with contextlib.suppress(OSError):
                        path.unlink()
            raise
        self.written[case] = [path.relative_to(self.output_dir).as_posix() for path in before]

    def refuse_others(self, items: Sequence[Mapping[str, str]]) -> None:
        """Refuse results of other cases, if they are to be ``alone``, whatever ``overwrite`` says.

        Raises:
            OutputError: naming one of them.
        """
        if not self.alone:
            return
        wanted = {self.output_dir / name for item in items for name in self._names(item["case"]).values()}
        for folder in sorted({path.parent for path in wanted}):
            for path in sorted(folder.glob(f"*{self.layout.partition('{case}')[2]}")):
                if path not in wanted and not path.name.startswith("."):
                    raise OutputError(
                        f"{path.relative_to(self.output_dir).as_posix()}: is there from an earlier run, and its "
                        "case is not one of this run; remove it or choose another output folder"
                    )

    def refuse_inputs(self, items: Sequence[Mapping[str, str]]) -> None:
        """Refuse to replace what is about to be read, whatever ``overwrite`` says.

        Raises:
            OutputError: naming the file.
        """
        given = {
            Path(value).resolve()
            for item in items
            for key, value in item.items()
            if key not in ("case", "error") and isinstance(value, (str, Path))
        }
        for case in (item["case"] for item in items):
            for name in (*self._names(case).values(), *self._figures(case)):
                if (self.output_dir / name).resolve() in given:
                    raise OutputError(
                        f"{name}: the result of {case} would replace this input; choose another output folder"
                    )

    def _names(self, case: str) -> dict[str, str]:
        return {key: self.layout.format(case=case, suffix=suffix) for key, suffix in self.suffixes.items()}

    def _figures(self, case: str) -> list[str]:
        return [_figure_name(case)] if self.figure else []

    def _outdated(self, case: str) -> set[Path]:
        """What an earlier run of the case may have left, if it is to be replaced."""
        names = [*self._names(case).values(), _figure_name(case)] if self.overwrite else []
        return {self.output_dir / name for name in names}

    @staticmethod
    def _facts(engine: Engine) -> Mapping[str, Any]:
        return getattr(getattr(engine, "inferer", None), "facts", {})


class RunReport:
    """Leaves ``report.json``: versions, hashes, device, and per case geometry, time, warnings or the reason of failure.

    It is rewritten after each case, so that an interrupted run has one too. File names of the inputs appear, their
    folders and contents do not; ``input_digest`` tells an input from another one of its name. Cases of earlier runs
    into the same folder stay in it, as long as their files are there and they are not run again; ``earlier_run`` tells
    when that was, and in what it differed from this run. Runs that write into one folder at the same time keep what
    they find of each other; where two write at the same moment, a case may be lost from the report.

    Args:
        output_dir: folder of the results.
        settings: the settings of the run that shape the result; of a file that one names the SHA-256 is recorded.
        config_files: configs whose SHA-256 is recorded; on MONAI's command line so are those that it names.
        weights: weight file whose SHA-256 is recorded, or several by the name under which that is done.
        output: the :class:`CaseOutput` whose file names are listed.
        describe: what to say about the sizes of a postprocessed item.

    Example:
        >>> RunReport("out").cases
        {}
    """

    def __init__(
        self,
        output_dir: str | Path,
        settings: Mapping[str, Any] | None = None,
        config_files: Sequence[str | Path] = (),
        weights: str | Path | Mapping[str, str | Path] | None = None,
        output: CaseOutput | None = None,
        *,
        describe: Callable[[Mapping[str, Any]], dict[str, Any]] = volume_facts,
    ) -> None:
        self.output_dir, self.output, self.describe = Path(output_dir), output, describe
        self.conditions = RunConditions(settings, config_files, weights)
        self.cases: dict[str, dict[str, Any]] = {}
        self._earlier: dict[str, dict[str, Any]] = {}
        self._digests: dict[str, dict[str, str]] = {}
        self._since = time.monotonic()

    def attach(self, engine: Engine) -> None:
        """Register behind the saving of a case."""
        engine.add_event_handler(Events.STARTED, self._begin)
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self._record)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write the report now."""
        failures = getattr(engine, "failures", {})
        finished = (
            _earlier_cases(self.output_dir / "report.json", self.conditions.as_plain()) if failures else {}
        )
        for case, reason in failures.items():
            self.cases[case] = {"status": "failed", "reason": reason}
            if case in finished:
                # The results of an earlier run are there still, and this is what is known of them.
                self.cases[case]["kept"] = finished[case]
        self._since = time.monotonic()
        self.write()

    def pending(self, items: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
        """Those of the items that are still to do: what an interrupted run has finished is left as it is.

        A case is finished if the report of that run says so, its files are there, and the input is the same. Of other
        files of its name nobody knows what they were made of: the case gets the key ``error`` and fails, unless
        ``overwrite`` is set.

        Raises:
            OutputError: if a finished case was made with other settings, weights or configs, and where a result would
                replace an input or the report of another program.
        """
        self._digests = {
            item["case"]: {"input_digest": input_digest(item), "sidecar_digest": sidecar_digest(item)}
            for item in items
            if "error" not in item
        }
        if self.output is not None:
            self.output.refuse_inputs(items)
            self.output.refuse_others(items)
        if self.output is None or self.output.overwrite:
            return list(items)
        _refuse_foreign(self.output_dir / "report.json")
        earlier = _earlier_cases(self.output_dir / "report.json", self.conditions.as_plain())
        left: list[Mapping[str, str]] = []
        for item in items:
            if "error" in item:
                left.append(item)
                continue
            case, there = item["case"], self.output.present(item["case"])
            # What a report of an earlier release does not say is taken to be the same.
            if case in earlier and all(
                earlier[case].get(key) in (None, digest) for key, digest in self._digests[case].items()
            ):
                self.refuse_mixture(case, earlier[case]["earlier_run"])
            elif there:
                why = (
                    "made of another input of this name"
                    if case in earlier
                    else "but in no report as finished"
                )
                reason = f"{there[0]}: is there already, {why}; choose another output folder or set overwrite to true"
                left.append({**item, "error": reason})
            else:
                left.append(item)
        return left

    def refuse_mixture(self, case: str, earlier: Mapping[str, Any]) -> None:
        """Refuse to let results of other settings or weights pass for results of this run.

        Args:
            case: whose results are there.
            earlier: ``settings`` and ``sha256`` of the run that made them; what it lacks was the same.

        Raises:
            OutputError: naming what changed.
        """
        now = self.conditions.as_plain()
        changed = [
            f"{key} {json.dumps(before.get(key))}, not {json.dumps(now[kind].get(key))}"
            if kind == "settings"
            else f"another {key}"
            for kind in ("settings", "sha256")
            if isinstance(before := earlier.get(kind), dict)
            for key in sorted({*before, *now[kind]})
            if before.get(key) != now[kind].get(key)
            # Reports of earlier releases have no hash of a file that a setting names.
            if key in before or key not in self.conditions.named
        ]
        if changed:
            named = "; ".join(changed[:_NAMED])
            if len(changed) > _NAMED:
                named += f" and {len(changed) - _NAMED} other differences"
            raise OutputError(
                f"{case}: is there already, made with {named}; choose another output folder or set overwrite to true"
            )

    def write(self) -> Path:
        """Write ``report.json`` and return its path."""
        conditions = self.conditions.as_plain()
        path = self.output_dir / "report.json"
        # Read anew each time: another run may be writing its cases into the same folder.
        self._earlier |= _earlier_cases(path, conditions, without=self.cases)
        cases = {**{k: entry for k, entry in self._earlier.items() if k not in self.cases}, **self.cases}
        return write_json(
            path,
            {
                "written": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                **conditions,
                "succeeded": sum(case["status"] == "done" for case in cases.values()),
                "failed": sum(case["status"] != "done" for case in cases.values()),
                "cases": cases,
            },
        )

    def finish(self) -> None:
        """End the process with a non-zero status if a case failed, after one line for each."""
        failed = {case: entry["reason"] for case, entry in self.cases.items() if entry["status"] != "done"}
        if failed:
            _log.error("%d of %d cases failed, see report.json", len(failed), len(self.cases))
            raise SystemExit(MedsrError.exit_code)

    def _begin(self, engine: Engine) -> None:
        self._since = time.monotonic()
        self.conditions.device = str(getattr(engine.state, "device", "cpu"))

    def _record(self, engine: Engine) -> None:
        for item in processed_cases(engine):
            case, image = str(item["case"]), item["image"]
            facts = dict(getattr(getattr(engine, "inferer", None), "facts", {}))
            notes = [line for line in str(image.meta.get("notes", "")).splitlines() if line]
            self.cases[case] = {
                "status": "done",
                "input": Path(str(image.meta.get("filename_or_obj", case))).name,
                **self._digests.get(case, {}),
                **self.describe(item),
                "seconds": round(time.monotonic() - self._since, 1),
                "files": self.output.written.get(case, []) if self.output else [],
                "warnings": [*notes, *facts.pop("warnings", [])],
                **facts,
            }


def _figure_name(case: str) -> str:
    return f"{case}_qc.png"


def _stamp(path: Path) -> tuple[int, int] | None:
    """What tells a file from the one that replaces it; None where there is none."""
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_ino, found.st_mtime_ns
    return None


def _earlier_cases(
    path: Path, conditions: Mapping[str, Any], *, without: Container[str] = ()
) -> dict[str, dict[str, Any]]:
    """The cases of an earlier report whose files are all there, with what differed when they were made."""
    kept: dict[str, dict[str, Any]] = {}
    # A report that is damaged, or of another program, says nothing.
    with contextlib.suppress(OSError, ValueError, LookupError, AttributeError, TypeError):
        report = json.loads(path.read_text(encoding="utf-8"))
        for case, entry in report["cases"].items():
            if case in without:
                continue
            entry = entry.get("kept", entry)
            if not entry.get("files") or not all((path.parent / name).is_file() for name in entry["files"]):
                continue
            run = {key: report.get(key) for key in ("written", *conditions)} | entry.get("earlier_run", {})
            changed = {
                key: value for key, value in run.items() if key not in conditions or value != conditions[key]
            }
            kept[str(case)] = {**entry, "earlier_run": changed}
    return kept


def _refuse_foreign(report: Path) -> None:
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(report.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "cases" not in content:
            raise OutputError(
                f"{report.name}: is there already, and of another program; choose another output folder or set "
                "overwrite to true"
            )
