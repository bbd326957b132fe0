"""The frame of a comparison: case by case, and what is done is kept, also by a run that is stopped."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import numpy.typing as npt

from medsr.engines.case_evaluator import one_line
from medsr.errors import DataError, MedsrError, SettingError
from medsr.geometry import RATIO_LIMIT, through_plane_ratio
from medsr.handlers.run_conditions import RunConditions
from medsr.io.writing import earlier_path, write_json
from medsr.settings import as_number
from medsr.transforms.thick_slices import ThickSliceParameters

__all__ = ["CaseComparison", "thick_parameters", "total_of"]

_log = logging.getLogger(__name__)

_WRITE_SECONDS = 5.0
"""Between two writings of the results: so much a killed run may lose."""


class CaseComparison:
    """Compares methods case by case; a bad case is reported and left out, and the others go on.

    Subclasses say what is compared (:meth:`_compare`), how it is printed (:meth:`_table`) and what belongs beside the
    rows (``header``).

    Args:
        cases: items with the key ``case``; one with the key ``error`` is known to be bad already.
        output: file of the results, JSON; one of an earlier comparison is kept as ``<name>_earlier.json``.

    Example:
        >>> CaseComparison([]).run()
        []
    """

    header: Mapping[str, Any] = {}
    what: ClassVar[str] = "cases"

    def __init__(self, cases: Sequence[Mapping[str, str]], output: str | Path | None = None) -> None:
        self.cases, self.output = list(cases), output
        self.rows: list[dict[str, Any]] = []
        self.left_out: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        self._made_by: dict[str, Any] = {}

    def run(self, conditions: RunConditions | None = None) -> list[dict[str, Any]]:
        """Compare, log and write the table; return its rows.

        Args:
            conditions: what the rows are made by, to stand beside them as ``run``.
        """
        self.rows, self.left_out, self.notes = [], {}, {}
        self._made_by = {}
        if conditions is not None:
            conditions.device = str(getattr(self, "device", conditions.device))
            self._made_by = {"run": conditions.as_plain()}
        if self.output:
            _keep_earlier(Path(self.output))
        written = time.monotonic()
        try:
            for case in self.cases:
                self._add(case)
                # All rows anew after each of thousands of frames would take longer than the frames.
                if time.monotonic() - written > _WRITE_SECONDS:
                    self._write()
                    written = time.monotonic()
        finally:
            self._write()
        if self.rows:
            _log.info("\n%s", self._table())
        return self.rows

    def finish(self) -> None:
        """End the process with a non-zero status if a case was left out."""
        if self.left_out:
            _log.error("%d of %d %s left out", len(self.left_out), len(self.cases), self.what)
            raise SystemExit(MedsrError.exit_code)

    def note(self, case: str, text: str) -> None:
        """Say beside the rows of a case, and in the log, what to know about them."""
        self.notes[case] = text
        _log.warning("%s: %s", case, text)

    def note_thick_truth(self, case: str, affine: npt.ArrayLike) -> None:
        """Note that a volume, slices last, has thick slices itself: it is no truth for thinner ones."""
        ratio = through_plane_ratio(affine, axis=2)
        if ratio >= RATIO_LIMIT:
            self.note(
                case,
                f"its own slices are {ratio:g} times as far apart as its pixels: the truth is no finer than that",
            )

    def _add(self, case: Mapping[str, str]) -> None:
        try:
            if "error" in case:
                raise DataError(case["error"])
            self.rows += self._compare(case)
        except Exception as error:
            self.left_out[case["case"]] = one_line(error)
            _log.error("%s: left out: %s", case["case"], self.left_out[case["case"]])

    def _write(self) -> None:
        if self.output and (self.rows or self.left_out):
            found = {"rows": self.rows, "left_out": self.left_out, "notes": self.notes}
            write_json(self.output, {**self.header, **self._made_by, **found})

    def _compare(self, case: Mapping[str, str]) -> list[dict[str, Any]]:
        """Rows of one case."""
        raise NotImplementedError

    def _table(self) -> str:
        """All rows, for people."""
        raise NotImplementedError


def _keep_earlier(path: Path) -> None:
    """Rename the file of an earlier comparison, which may be of other weights and took as long to make."""
    if not path.exists():
        return
    kept = next(one for number in count(1) if not (one := earlier_path(path, number)).exists())
    path.rename(kept)
    _log.warning("%s of an earlier comparison is kept as %s", path.name, kept.name)


def total_of(groups: Sequence[str], group: str | None) -> str:
    """What a table calls a group, and what it calls all of them together, which is None.

    Example:
        >>> total_of(["a"], "a"), total_of(["a"], None), total_of(["all"], None)
        ('a', 'all', 'all groups')
    """
    return group or ("all groups" if "all" in groups else "all")


def thick_parameters(
    ratio: float,
    gap: float,
    profile: str | tuple[float, ...],
    *,
    name: str = "ratio",
    gap_name: str = "gap",
) -> ThickSliceParameters:
    """The acquisition of thick slices that a comparison simulates.

    Args:
        ratio: slice spacing, in voxels.
        gap: gap between slices, in voxels; thickness = ratio - gap.
        profile: slice profile.
        name: the setting that holds the ratio, for the message.
        gap_name: the setting that holds the gap.

    Raises:
        SettingError: if there are no such slices.

    Example:
        >>> thick_parameters(4, 1, "slr").thickness
        0.75
        >>> thick_parameters(4, 5, "slr")
        Traceback (most recent call last):
        medsr.errors.SettingError: ratio 4 with gap 5: the relative slice thickness must be > 0, got -0.25
    """
    ratio, gap = as_number(name, ratio, above=0), as_number(gap_name, gap)
    try:
        return ThickSliceParameters(ratio, (ratio - gap) / ratio, profile)
    except SettingError as error:
        raise SettingError(f"{name} {ratio:g} with {gap_name} {gap:g}: {error}") from None
