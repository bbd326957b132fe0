"""The frame of a comparison: case by case, with a table that is complete for every case that is done."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from medsr.engines.case_evaluator import one_line
from medsr.errors import MedsrError
from medsr.io.writing import write_json

__all__ = ["CaseComparison"]

_log = logging.getLogger(__name__)


class CaseComparison:
    """Compares methods case by case; a bad case is reported and left out, and the others go on.

    Subclasses say what is compared (:meth:`_compare`), how it is printed (:meth:`_table`) and what belongs beside the
    rows (``header``).

    Args:
        cases: items with the key ``case``.
        output: file of the results, JSON.

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
        # What is missing of a case that is compared otherwise.
        self.notes: dict[str, str] = {}

    def run(self) -> list[dict[str, Any]]:
        """Compare, log and write the table; return its rows."""
        self.rows, self.left_out, self.notes = [], {}, {}
        for case in self.cases:
            try:
                self.rows += self._compare(case)
            except Exception as error:
                self.left_out[case["case"]] = one_line(error)
                _log.error("%s: left out: %s", case["case"], self.left_out[case["case"]])
            if self.output and self.rows:
                found = {**self.header, "rows": self.rows, "left_out": self.left_out, "notes": self.notes}
                write_json(self.output, found)
        if self.rows:
            _log.info("\n%s", self._table())
        return self.rows

    def finish(self) -> None:
        """End the process with a non-zero status if a case was left out."""
        if self.left_out:
            _log.error("%d of %d %s left out", len(self.left_out), len(self.cases), self.what)
            raise SystemExit(MedsrError.exit_code)

    def _compare(self, case: Mapping[str, str]) -> list[dict[str, Any]]:
        """Rows of one case."""
        raise NotImplementedError

    def _table(self) -> str:
        """All rows, for people."""
        raise NotImplementedError
