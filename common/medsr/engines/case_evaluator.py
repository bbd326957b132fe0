"""Case by case: a bad input is reported and left out, the other cases go on."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ignite.engine import Engine
from monai.data import Dataset
from monai.engines import SupervisedEvaluator

from medsr.errors import causes, first_of_ours

__all__ = ["CaseDataset", "CaseEvaluator", "named", "one_line"]

_log = logging.getLogger(__name__)


def one_line(error: BaseException) -> str:
    """What was wrong, in one line: the outermost error of this project, else the innermost of all.

    Example:
        >>> one_line(ValueError("too short"))
        'ValueError: too short'
        >>> one_line(FileNotFoundError(2, "No such file or directory", "/home/somebody/a.nii"))
        'a.nii: No such file or directory'
    """
    if ours := first_of_ours(error):
        return " ".join(str(ours).split())
    *_, last = causes(error)
    if isinstance(last, OSError) and last.strerror:
        # Its own text holds the whole path.
        where = (
            f"{Path(os.fsdecode(last.filename)).name}: " if isinstance(last.filename, (str, bytes)) else ""
        )
        return f"{where}{last.strerror}"
    text = (str(last).strip().splitlines() or ["no message"])[0]
    return f"{type(last).__name__}: {text}"


def named(case: str, reason: str) -> str:
    """The reason why a case failed, with its name in front unless it starts with that or with the name of its file.

    Example:
        >>> named("a", "a.png: empty file"), named("a", "there is no decoder")
        ('a.png: empty file', 'a: there is no decoder')
    """
    begins_so = re.match(rf"{re.escape(case)}(\.\w+)*:", reason)
    return reason if begins_so else f"{case}: {reason}"


class CaseDataset(Dataset):
    """A dataset whose unreadable items become ``{"case": name, "error": reason}`` instead of ending the run.

    Args:
        data: items with the keys ``image`` and ``case``; one with the key ``error`` is known to be bad already.
        transform: the preprocessing.

    Example:
        >>> CaseDataset([{"image": "missing.nii.gz", "case": "a"}], transform=int)[0]["case"]
        'a'
    """

    def __init__(
        self, data: Sequence[Mapping[str, Any]], transform: Callable[..., Any] | None = None
    ) -> None:
        super().__init__(list(data), transform)

    def _transform(self, index: int) -> Any:
        item = dict(self.data[index])
        if "error" in item:
            return {"case": item["case"], "error": item["error"]}
        try:
            return super()._transform(index)
        except Exception as error:
            return {"case": item["case"], "error": one_line(error)}


class CaseEvaluator(SupervisedEvaluator):
    """MONAI's evaluator that survives a bad case and remembers why it was bad.

    ``failures`` maps case names to one-line reasons. Everything that belongs to a case, saving included, must be
    registered on ``IterationEvents.MODEL_COMPLETED``: it runs inside the guarded iteration.

    Args:
        **settings: of ``monai.engines.SupervisedEvaluator``.
    """

    def __init__(self, **settings: Any) -> None:
        self.failures: dict[str, str] = {}
        super().__init__(**settings)

    def run(self, global_epoch: int = 1) -> None:
        """Run through the cases; without one, as when an earlier run has finished all, there is nothing to do."""
        if len(self.data_loader):
            super().run(global_epoch)

    def _iteration(self, engine: Engine, batchdata: Mapping[str, Any]) -> Any:  # type: ignore[override]
        case = str(_first(batchdata.get("case", "case")))
        if "error" in batchdata:
            return self._failed(engine, case, str(_first(batchdata["error"])))
        try:
            return super()._iteration(engine, batchdata)
        except Exception as error:
            return self._failed(engine, case, one_line(error))

    def _failed(self, engine: Engine, case: str, reason: str) -> dict[str, Any]:
        self.failures[case] = reason
        _log.error("%s", named(case, reason))
        engine.state.output = {}
        return {}


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) else value
