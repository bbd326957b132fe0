"""Handlers of a training run: a guard before the step, weights that survive a stop, and a record of the run."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from torch import Tensor, nn

import medsr
from medsr import catalog
from medsr.errors import MedsrError, OutputError, SettingError
from medsr.io.writing import atomic_path, earlier_path, write_json
from medsr.settings import as_number

__all__ = ["BudgetSchedule", "GradientGuard", "RunRecord", "WeightSaver", "save_weights"]

_log = logging.getLogger(__name__)


class GradientGuard:
    """Clips the gradient and skips the step where it is not finite; stops after too many skips in a row.

    Buffers, as the running statistics of a batch norm, change before there is a gradient; those that a skipped batch
    has made infinite or NaN get back the values that they had.

    ``ignite.handlers.TerminateOnNan`` was considered: it looks after the step, when the weights are lost already.

    Args:
        network: whose gradients are guarded.
        max_norm: largest gradient norm; larger ones are scaled down to it.
        patience: number of bad batches in a row after which training stops with an error.

    Raises:
        MedsrError: from the training loop, after ``patience`` bad batches in a row.

    Example:
        >>> GradientGuard(nn.Linear(1, 1)).skipped
        0
    """

    def __init__(self, network: nn.Module, max_norm: float = 1.0, patience: int = 10) -> None:
        self.network, self.max_norm, self.patience = network, float(max_norm), int(patience)
        self.skipped = 0
        self._in_a_row = 0
        self._buffers: list[Tensor] = []

    def attach(self, engine: Engine) -> None:
        """Register on a MONAI trainer."""
        engine.add_event_handler(Events.ITERATION_STARTED, self.remember)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def remember(self) -> None:
        """Keep the buffers as they are before an iteration."""
        self._buffers = [buffer.clone() for buffer in self.network.buffers()]

    def __call__(self, engine: Engine) -> None:
        """Clip, or drop the gradient of this iteration."""
        scaler = getattr(engine, "scaler", None)
        is_scaled = scaler is not None and scaler.is_enabled()
        # Half precision trains on gradients that are scaled until the step.
        scale = float(scaler.get_scale()) if is_scaled else 1.0
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.max_norm * scale)
        if math.isfinite(float(norm)):
            self._in_a_row = 0
            return
        self.skipped += 1
        self._in_a_row += 1
        for buffer, before in zip(self.network.buffers(), self._buffers, strict=False):
            if not torch.isfinite(buffer).all():
                buffer.copy_(before)
        # A scaler skips the step itself, and has to see why.
        if not is_scaled:
            for parameter in self.network.parameters():
                parameter.grad = None
        if self._in_a_row >= self.patience:
            raise MedsrError(
                f"training stopped: {self.patience} batches in a row gave no finite gradient; "
                "check the training images or lower the learning rate"
            )


class BudgetSchedule:
    """One-cycle learning rate over a budget of iterations or minutes, whichever is used up first; then stops.

    The rate is driven by the share of the budget that is spent, so that a slow machine anneals as completely as a
    fast one. ``torch.optim.lr_scheduler.OneCycleLR`` with ``ignite.handlers.TimeLimit`` was considered: stopped by
    the clock, it leaves the weights at a high rate.

    Args:
        optimizer: whose rate is set.
        learning_rate: highest rate.
        iterations: budget of iterations.
        minutes: budget of wall time; None for no limit.
        warm_up: share of the budget over which the rate rises.

    Example:
        >>> schedule = BudgetSchedule(torch.optim.SGD([torch.zeros(1)], lr=1.0), 1.0, iterations=100)
        >>> round(schedule.rate_at(0.05), 3), round(schedule.rate_at(1.0), 3)
        (1.0, 0.001)
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        learning_rate: float,
        iterations: int,
        *,
        minutes: float | None = None,
        warm_up: float = 0.05,
    ) -> None:
        self.optimizer, self.learning_rate, self.iterations = optimizer, float(learning_rate), int(iterations)
        self.minutes = None if minutes is None else as_number("minutes", minutes, above=0)
        self.warm_up = float(warm_up)
        self._clock = _Clock()

    def attach(self, engine: Engine) -> None:
        """Register on a trainer."""
        engine.add_event_handler(Events.STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_STARTED, self)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._stop)

    def state_dict(self) -> dict[str, float]:
        """What is spent of the minutes; the iterations are counted by the trainer."""
        return {"seconds": self._clock.seconds}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Count what was spent before an interruption."""
        self._clock.before = state["seconds"]

    def rate_at(self, progress: float) -> float:
        """Learning rate at a share of the budget."""
        if progress < self.warm_up:
            return self.learning_rate * (0.05 + 0.95 * progress / self.warm_up)
        angle = math.pi * min(1.0, (progress - self.warm_up) / (1 - self.warm_up))
        return self.learning_rate * (0.001 + 0.999 * (1 + math.cos(angle)) / 2)

    def __call__(self, engine: Engine) -> None:
        """Set the rate of the coming iteration."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate_at(self._progress(engine.state.iteration - 1))

    def _begin(self, engine: Engine) -> None:
        if self.minutes and torch.distributed.is_available() and torch.distributed.is_initialized():
            raise SettingError(
                "processes with clocks of their own would wait for each other: give iterations, not minutes"
            )
        self._clock.start()

    def _progress(self, iteration: int) -> float:
        spent = self._clock.seconds / (60 * self.minutes) if self.minutes else 0.0
        return max(iteration / self.iterations, spent)

    def _stop(self, engine: Engine) -> None:
        if self._progress(engine.state.iteration) >= 1:
            engine.terminate()


class WeightSaver:
    """Writes plain weights now and then, at the end, and when training is stopped: whole or not at all.

    ``monai.handlers.CheckpointSaver`` was considered: it writes in place, and a full disk destroys the last good
    file. A moving average makes better weights than the last iteration; pass the ``ema_model`` of a
    :class:`~medsr.handlers.weight_average.WeightAverage`. Weights of an earlier training under the same name are kept
    as ``<name>_earlier``, unless this training goes on with that one.

    Args:
        network: whose weights are saved.
        path: file to write; ``SHA256SUMS`` is written beside it.
        every: iterations between two savings.
        dtype: ``float32`` or ``float16``, storage type of floating-point tensors.
        form: makes of the network the one whose weights are saved, for example
            :meth:`medsr.networks.fmen.FMEN.fuse`.

    Example:
        >>> WeightSaver(nn.Linear(1, 1), "model.pt").every
        500
    """

    def __init__(
        self,
        network: nn.Module,
        path: str | Path,
        every: int = 500,
        *,
        dtype: str = "float32",
        form: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        self.network, self.path, self.every, self.form = network, Path(path), int(every), form
        self.dtype = {"float32": torch.float32, "float16": torch.float16}[dtype]

    def attach(self, engine: Engine) -> None:
        """Register on a trainer."""
        _Earlier(self.path).attach(engine)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.every), self)
        engine.add_event_handler(Events.COMPLETED, self)
        engine.add_event_handler(Events.TERMINATE, self)
        _attach_to_exceptions(engine, self)

    def __call__(self, engine: Engine | None = None) -> None:
        """Save now."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        network = self.network if self.form is None else self.form(self.network)
        save_weights(network.state_dict(), self.path, dtype=self.dtype)


class RunRecord:
    """Leaves ``train_record.json``: what was trained how long on what, and the history of the loss terms.

    The record of an earlier training is kept as :class:`WeightSaver` keeps its weights. Values that are not finite, as
    of a batch that :class:`GradientGuard` skips, are left out of the means.

    Args:
        path: file to write.
        settings: whatever describes the run: command-line settings, data, licences.
        loss: if it has ``last_terms``, each is averaged and logged under its name.
        every: iterations between two entries of the history.

    Example:
        >>> RunRecord("record.json", settings={}).history
        []
    """

    def __init__(
        self,
        path: str | Path,
        settings: Mapping[str, Any],
        loss: nn.Module | None = None,
        every: int = 100,
    ) -> None:
        self.path, self.settings, self.loss, self.every = Path(path), dict(settings), loss, int(every)
        self.history: list[dict[str, float]] = []
        self._values: dict[str, list[float]] = {}
        self._clock = _Clock()
        self._commit = "unknown"
        self._precision = "float32"
        self._is_under_way = False

    def attach(self, engine: Engine) -> None:
        """Register on a trainer."""
        _Earlier(self.path).attach(engine)
        engine.add_event_handler(Events.STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_STARTED, self._begin_iteration)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.every), self)
        engine.add_event_handler(Events.COMPLETED, self)
        engine.add_event_handler(Events.TERMINATE, self)
        _attach_to_exceptions(engine, self._write_if_possible)

    def state_dict(self) -> dict[str, Any]:
        """What is recorded so far."""
        return {
            "history": self.history,
            "values": self._values,
            "seconds": self._clock.seconds,
            "precision": self._precision,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what was recorded before an interruption."""
        self.history, self._values = list(state["history"]), dict(state["values"])
        self._clock.before = state["seconds"]
        # States of earlier releases do not tell.
        self._precision = str(state.get("precision", self._precision))

    def __call__(self, engine: Engine) -> None:
        """Write the record now."""
        minutes = self._clock.seconds / 60
        # Of one that was stopped half-way the weights hold nothing.
        iterations = engine.state.iteration - self._is_under_way
        if self._values:
            entry = {name: round(sum(values) / len(values), 6) for name, values in self._values.items()}
            self.history.append({"iteration": iterations, "minutes": round(minutes, 2), **entry})
            _log.info("iteration %d: %s", iterations, entry)
            self._values = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            self.path,
            {
                "command": " ".join([_program(), *sys.argv[1:]]),
                "commit": self._commit,
                "settings": {key: _plain(value) for key, value in self.settings.items()},
                "iterations": iterations,
                "minutes": round(minutes, 1),
                "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, cuda {torch.cuda.is_available()}",
                "precision": self._precision,
                "versions": {"medsr": medsr.__version__, "torch": torch.__version__},
                "history": self.history,
            },
        )

    def _write_if_possible(self, engine: Engine) -> None:
        try:
            self(engine)
        except OutputError as error:
            # The weights have yet to be saved, and what stopped the training is the reason to be told.
            _log.warning("%s", error)

    def _begin(self, engine: Engine) -> None:
        self._is_under_way = False
        self._clock.start()
        # Now: the tree may have moved on when the record is written.
        self._commit = _commit()

    def _begin_iteration(self, engine: Engine) -> None:
        self._is_under_way = True

    def _collect(self, engine: Engine) -> None:
        self._is_under_way = False
        self._precision = _precision(engine)
        # MONAI's trainers take the output of a batch apart.
        output = engine.state.output[0] if isinstance(engine.state.output, list) else engine.state.output
        terms = getattr(self.loss, "last_terms", None) or {"loss": float(output["loss"])}
        for name, value in terms.items():
            # A term that joins late, as an adversary after the warm-up, has its own count.
            if math.isfinite(value):
                self._values.setdefault(name, []).append(float(value))


def _attach_to_exceptions(engine: Engine, save: Callable[[Engine], None]) -> None:
    """Save when a training is stopped or fails: weights and record alike, so that they belong together."""

    def on_exception(engine: Engine, error: BaseException) -> None:
        # What fails at once has learnt nothing, and must not replace the weights of an earlier run.
        if engine.state.iteration > 1:
            save(engine)

    engine.add_event_handler(Events.EXCEPTION_RAISED, on_exception)
    # Raising the error again ends its handling: that comes last, when all have had their turn.
    if engine.has_event_handler(_raise_again, Events.EXCEPTION_RAISED):
        engine.remove_event_handler(_raise_again, Events.EXCEPTION_RAISED)
    engine.add_event_handler(Events.EXCEPTION_RAISED, _raise_again)


def _precision(engine: Engine) -> str:
    """Of the network's convolutions, see :class:`~medsr.inferers.mixed_precision.MixedPrecisionInferer`."""
    inferer = getattr(engine, "inferer", None)
    return str(getattr(inferer, "used_precision", "float32"))


class _Earlier:
    """Gives a file of an earlier training a second name, before this training can replace it.

    At the first iteration, and not when the first file is written: a training that is killed in between and resumed
    would no longer know whose file it finds. A resumed training begins later, and the file is its own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED(once=1), self._keep)

    def _keep(self, engine: Engine) -> None:
        path = self.path
        if not path.exists():
            return
        others = path.parent.glob(f"{path.stem}_earlier*{path.suffix}")
        if any(path.samefile(other) for other in others):
            # What began after that one failed at once.
            return
        kept = earlier_path(path, _number_of_earlier(engine, path.parent))
        with _as_output_error(kept):
            try:
                os.link(path, kept)
            except OSError:
                # Not every file system has links.
                shutil.copy2(path, kept)
        with contextlib.suppress(OSError, KeyError):
            # A record has no line there, and not every folder has such a list.
            _list_digest(kept, catalog.listed_digests(path.parent)[path.name])
        _log.warning("%s of an earlier training is kept as %s", path.name, kept.name)


def _number_of_earlier(engine: Engine, folder: Path) -> int:
    """One number for all files of a folder that a training keeps: what belongs together is called alike."""
    numbers: dict[Path, int] = engine.__dict__.setdefault("numbers_of_earlier", {})
    if folder not in numbers:
        names = {path.stem for path in folder.glob("*_earlier*")}
        found = [stem.rpartition("_earlier")[2].removeprefix("_") or "1" for stem in names]
        numbers[folder] = 1 + max((int(one) for one in found if one.isdigit()), default=0)
    return numbers[folder]


def _list_digest(path: Path, digest: str) -> None:
    """Put a file's line into the ``SHA256SUMS`` beside it, those of other files as they are."""
    sums = path.parent / "SHA256SUMS"
    lines = sums.read_text().splitlines() if sums.exists() else []
    lines = [line for line in lines if line.split()[-1:] != [path.name]]
    with atomic_path(sums) as unfinished:
        Path(unfinished).write_text("\n".join([*lines, f"{digest}  {path.name}"]) + "\n")


def save_weights(
    state: Mapping[str, torch.Tensor], path: str | Path, *, dtype: torch.dtype = torch.float32
) -> str:
    """Write a plain state dict whole or not at all, list its SHA-256 in ``SHA256SUMS``, and return the digest.

    Raises:
        OutputError: if a weight is NaN, or the file cannot be written or does not read back equal.
    """
    path = Path(path)
    plain = {
        key: value.detach().cpu().to(dtype).contiguous()
        if value.is_floating_point()
        else value.detach().cpu()
        for key, value in state.items()
    }
    # It would not read back equal, and the disk is not to blame.
    if any(bool(value.isnan().any()) for value in plain.values()):
        raise OutputError(f"{path.name}: the weights are not finite; lower the learning rate")
    with _as_output_error(path), atomic_path(path) as unfinished:
        # Given a path, PyTorch writes the temporary name into the archive: equal weights, unequal digests.
        with unfinished.open("wb") as file:
            torch.save(plain, file)
        again = torch.load(unfinished, map_location="cpu", weights_only=True)
        if any(not torch.equal(again[key], plain[key]) for key in plain):
            raise OutputError(f"{path.name}: the weights do not read back equal; check the disk")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    _list_digest(path, digest)
    return digest


def _program() -> str:
    """How this process was started, without the path."""
    return "medsr" if Path(sys.argv[0]).stem == "medsr" else "python -m monai.bundle"


class _Clock:
    """Seconds of a training, those before an interruption included."""

    def __init__(self) -> None:
        self.before = self._start = 0.0

    def start(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self._start


def _raise_again(engine: Engine, error: BaseException) -> None:
    raise error


@contextmanager
def _as_output_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise OutputError(f"{path.name}: cannot be written ({str(error).splitlines()[0]})") from error


def _commit() -> str:
    """Commit of the source tree, if it is one."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(medsr.__file__).parent,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip() or "unknown"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
