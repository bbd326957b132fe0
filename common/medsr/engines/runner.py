"""What makes a process that runs a config behave as a program: settings, signals, errors in one line, exit status."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch

from medsr.errors import MedsrError, SettingError, first_of_ours
from medsr.overrides import check_overrides, overrides_in

__all__ = ["check_settings", "one_line_errors"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def one_line_errors(function: _Function) -> _Function:
    """Turn the errors of this project into one line on stderr and an exit status.

    MONAI wraps an exception of a config expression into another with a long traceback; ``SystemExit`` passes.
    """

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except MedsrError as error:
            sys.stderr.write(f"medsr: error: {' '.join(str(error).split())}\n")
            raise SystemExit(error.exit_code) from None

    return guarded  # type: ignore[return-value]


@one_line_errors
def check_settings(device: str | torch.device | None = None) -> None:
    """Refuse a misspelt setting, which MONAI would accept in silence, and a device that is not here.

    The first step of every ``run``: from here on a program that was started from the command line reports any
    error of this project in one line, and SIGTERM, as a job scheduler sends it, and SIGHUP, as a closed terminal does,
    clean up like Ctrl-C.

    Args:
        device: where the run is to compute; tried before anything is read.
    """
    _behave_as_program()
    check_overrides()
    if device is not None:
        _refuse_absent(device)


def _refuse_absent(device: str | torch.device) -> None:
    try:
        torch.device(device)
    except (RuntimeError, TypeError):
        raise SettingError(f"device must be cpu, cuda or cuda:<number>, got {device!r}") from None
    try:
        torch.zeros(1, device=device).cpu()
    except Exception as error:  # each kind of device raises its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SettingError(f"device {device} cannot be used here ({reason}); set device to cpu") from None


def _behave_as_program() -> None:
    by_monai = bool(overrides_in(sys.argv)[0])
    if by_monai:
        sys.excepthook = _in_one_line
    if (
        by_monai or Path(sys.argv[0]).stem == "medsr"
    ) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)
        # A lost terminal; under nohup it is ignored, and stays so.
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            signal.signal(signal.SIGHUP, _stop)
        sys.unraisablehook = _stop_all_the_same


def _in_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """MONAI wraps the error of a component into others, one per level of the config."""
    if isinstance(error, KeyboardInterrupt):
        sys.stderr.write("medsr: interrupted\n")
        raise SystemExit(128 + signal.SIGINT)
    found = first_of_ours(error)
    if found is None:
        sys.__excepthook__(kind, error, trace)
        return
    sys.stderr.write(f"medsr: error: {' '.join(str(found).split())}\n")
    raise SystemExit(found.exit_code)


def _stop(number: int, frame: FrameType | None) -> None:
    # As an exception, so that unfinished files are removed on the way out.
    raise SystemExit(128 + number)


def _stop_all_the_same(unraisable: Any) -> None:
    """Raise a stop again that Python dropped, because it came in a callback of a weak reference or a ``__del__``."""
    lost = unraisable.exc_value
    if not isinstance(lost, (KeyboardInterrupt, SystemExit)) or not hasattr(signal, "setitimer"):
        sys.__unraisablehook__(unraisable)
        return

    def again(number: int, frame: FrameType | None) -> None:
        raise lost

    signal.signal(signal.SIGALRM, again)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
