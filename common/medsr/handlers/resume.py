"""Going on with a training that was interrupted, as if nothing had happened."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import random
import reprlib
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.engine.deterministic import update_dataloader
from monai.transforms import Randomizable
from torch import Tensor, nn
from torch.utils.data import BatchSampler

from medsr.errors import SettingError, WeightsError
from medsr.handlers.recycling import RecycleDormantUnits
from medsr.handlers.training import BudgetSchedule, RunRecord
from medsr.handlers.weight_average import WeightAverage
from medsr.io.cases import input_digest
from medsr.io.writing import atomic_path
from medsr.overrides import nested_overrides
from medsr.settings import as_flag

__all__ = ["STATE_FILE", "TrainingState", "content_of", "differences", "may_change"]

STATE_FILE = "training_state.pt"
"""Name of the file in all configs."""

_log = logging.getLogger(__name__)

_CONTENT = {"settings", "trainer", "parts", "random"}
_MAY_CHANGE = {"cached", "device", "iterations", "minutes", "resume", "workers"}
"""Settings that change how fast a training runs, and how long."""

_ADVICE = "give the same settings and images, or leave out --resume to start anew"
_Drawer = np.random.RandomState | np.random.Generator


class TrainingState:
    """Writes the whole state of a training every few minutes, and goes on with it on request.

    Weights alone are a new start: the optimiser has forgotten its moments, the average is that of a few iterations,
    the learning rate rises again, and the images come in the order of the first start. The state holds network,
    optimiser, whatever else the trainer has with a ``state_dict`` (a discriminator, a loss that is trained, gradient
    scalers; nothing frozen), average, spent budget, record, and the random state of Python, NumPy, PyTorch, the
    random transforms and ``prepare_batch``. However a training ends, by Ctrl-C, a fault or a power cut, it goes on
    with the last state that was written; what came after is computed again.

    On the CPU, with equal numbers of threads and ``num_workers=0``, the resumed training gives the same weights as an
    uninterrupted one, bit by bit. With workers the images come in another order, and a budget of minutes ends at
    another iteration, as in any two runs; on a GPU sums differ in the last bits. The order of the images is that of
    one epoch, which is the whole training here. Several processes are not resumed.

    ``monai.handlers.CheckpointSaver`` with ``CheckpointLoader`` and ``ignite.handlers.Checkpoint`` were considered:
    they count iterations where time matters, write in place, keep no random state, and load what was made with other
    settings; ``ignite.engine.DeterministicEngine`` keeps it, but is no engine of MONAI.

    Attach it last, so that an iteration is complete when it is saved.

    Args:
        path: file to write; removed when the training has ended.
        settings: plain values that must be the same again; of a file its content must be.
        schedule: knows what is spent of the budget. With another budget the learning rate follows that one from here.
        average: of the weights.
        record: its history goes on.
        recycling: goes on with what it has seen.
        resume: go on with the state in ``path``; a word is taken as well, because MONAI's command line hands on
            ``true`` as it was typed.
        minutes: time between two savings.
        config: more of such settings, among whatever else a config was made into, see
            :func:`~medsr.engines.training.resolved_config`. Components with the values that stand inside them, folders,
            and what changes how fast a training runs and how long, but not how, are passed over.

    Raises:
        SettingError: before the first step, if there is no state, it was made with other settings or images, for
            another network or trainer, or there are several processes.
        WeightsError: when attached, if the file is damaged.
        OutputError: from the training loop, if the state cannot be written.

    Example:
        >>> network = nn.Linear(1, 1)
        >>> schedule = BudgetSchedule(torch.optim.SGD(network.parameters()), 0.1, iterations=10)
        >>> average, record = WeightAverage(network), RunRecord("record.json", {})
        >>> TrainingState("state.pt", {"seed": 0}, schedule, average=average, record=record).resume
        False
    """

    def __init__(
        self,
        path: str | Path,
        settings: Mapping[str, Any],
        schedule: BudgetSchedule,
        *,
        average: WeightAverage,
        record: RunRecord,
        recycling: RecycleDormantUnits | None = None,
        resume: bool | str = False,
        minutes: float = 2.0,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.resume, self.minutes = Path(path), as_flag("resume", resume), float(minutes)
        self.settings, self.schedule, self.average, self.record = settings, schedule, average, record
        self.recycling = recycling
        self.config: Mapping[str, Any] = {} if config is None else config
        self._found: dict[str, Any] = {}
        self._order = torch.get_rng_state()
        self._saved_at = 0.0

    def attach(self, engine: Engine) -> None:
        """Register on a MONAI trainer whose data come from a ``DataLoader``; read and check the state."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if self.resume:
                raise SettingError("several processes cannot be resumed: start from --initial_weights")
            return
        self.settings = self._all_settings(engine)
        if self.resume:
            self._found = self._read()
        elif self.path.exists():
            _log.warning(
                "%s of an interrupted training will be replaced: stop now to keep it", self.path.name
            )
        engine.add_event_handler(Events.STARTED, self._begin)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._remember_order)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self._remove)

    def __call__(self, engine: Engine) -> None:
        """Save if it is time, and no gradient is being collected over several batches."""
        due = time.monotonic() - self._saved_at >= 60 * self.minutes
        if due and engine.state.iteration % getattr(engine, "accumulation_steps", 1) == 0:
            self._save(engine)
            self._saved_at = time.monotonic()

    def _begin(self, engine: Engine) -> None:
        if self._found:
            self._restore(engine)
        self._saved_at = time.monotonic()

    def _remember_order(self, engine: Engine) -> None:
        # The sampler is about to draw the order of the epoch.
        if engine.state.iteration % engine.state.epoch_length == 0:
            self._order = torch.get_rng_state()

    def _remove(self, engine: Engine) -> None:
        self.path.unlink(missing_ok=True)

    def _all_settings(self, engine: Engine) -> dict[str, Any]:
        given = {**self.settings, **{key: value for key, value in self.config.items() if _is_plain(value)}}
        # What a config names below its top level, as "train::average", is a component.
        given = {key: value for key, value in given.items() if "::" not in key}
        settings = {
            **{key: self._content(value) for key, value in given.items() if not may_change(key)},
            **{
                key: self._content(value)
                for key, value in nested_overrides().items()
                if _shapes_training(key)
            },
            "learning_rate": self.schedule.learning_rate,
            "content of images": _content_of_images(engine.data_loader.dataset),
            "number of images": len(engine.data_loader.dataset),
        }
        # As they will be read again.
        plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
        return plain

    def _content(self, value: Any) -> Any:
        # The weights that this training started from may be those that it has replaced since.
        is_own = (
            isinstance(value, str) and value and Path(value).absolute().parent == self.path.absolute().parent
        )
        return Path(value).name if is_own else content_of(value)

    def _parts(self, engine: Engine) -> dict[str, Any]:
        """Everything that changes while training, by name."""
        parts: dict[str, Any] = {
            name: part
            for name, part in vars(engine).items()
            if hasattr(part, "state_dict") and hasattr(part, "load_state_dict") and not _is_frozen(part)
        }
        parts |= {"average": self.average.ema_model, "schedule": self.schedule, "record": self.record}
        if self.recycling is not None:
            parts["recycling"] = self.recycling
        return parts

    def _save(self, engine: Engine) -> None:
        state = {
            "settings": self.settings,
            "trainer": dict(engine.state_dict()),
            "parts": {name: part.state_dict() for name, part in self._parts(engine).items()},
            "random": {
                "order": self._order,
                "python": random.getstate(),
                "numpy": _plain(np.random.get_state(legacy=False)),  # noqa: NPY002 - what others draw from
                "torch": torch.get_rng_state(),
                "device": _device_state(engine),
                "drawers": {name: _plain(_state_of(one)) for name, one in _drawers(engine).items()},
            },
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        # What cannot be read without trust must not show when it is needed.
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.path) as unfinished:
            unfinished.write_bytes(buffer.getbuffer())

    def _read(self) -> dict[str, Any]:
        name = self.path.name
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise SettingError(
                f"{name}: no such file: the training has ended, or none was interrupted; "
                "leave out --resume to start anew"
            ) from None
        except Exception as error:
            raise WeightsError(
                f"{name}: damaged ({type(error).__name__}); start from --initial_weights"
            ) from None
        if not isinstance(found, dict) or set(found) != _CONTENT:
            raise WeightsError(f"{name}: not the state of a training; start from --initial_weights")
        changed = differences(found["settings"], self.settings)
        if changed:
            raise SettingError(f"{name}: was made with {'; '.join(changed)}; {_ADVICE}")
        if _shapes(found["parts"]["average"]) != _shapes(self.average.ema_model.state_dict()):
            raise SettingError(f"{name}: was made for another network; {_ADVICE}")
        return dict(found)

    def _restore(self, engine: Engine) -> None:
        found, self._found = self._found, {}
        try:
            self._restore_parts(engine, found["parts"])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise SettingError(
                f"{self.path.name}: was made by another trainer ({reason}); {_ADVICE}"
            ) from None
        trainer, draws = found["trainer"], found["random"]
        # The number of iterations may have changed.
        engine.load_state_dict({**trainer, "epoch_length": engine.state.epoch_length})
        done = engine.state.iteration % engine.state.epoch_length
        if done:
            self._order = draws["order"]
            left = _RemainingBatches(
                engine.data_loader.batch_sampler, done, order=self._order, now=draws["torch"]
            )
            engine.state.dataloader = update_dataloader(engine.data_loader, left)
        # Now: a new loader seeds the transforms anew.
        random.setstate(draws["python"])
        np.random.set_state(draws["numpy"])  # noqa: NPY002 - what others draw from
        torch.set_rng_state(draws["torch"])
        if draws["device"] is not None and engine.state.device.type == "cuda":
            torch.cuda.set_rng_state(draws["device"], engine.state.device)
        for name, one in _drawers(engine).items():
            _set_state(one, draws["drawers"][name])
        _log.info("the training goes on after iteration %d", engine.state.iteration)

    def _restore_parts(self, engine: Engine, found: Mapping[str, Any]) -> None:
        parts = self._parts(engine)
        differing = sorted(set(parts) ^ set(found))
        if differing:
            raise KeyError(differing[0])
        for name, part in parts.items():
            part.load_state_dict(found[name])


class _RemainingBatches(BatchSampler):
    """The batches of an epoch after the first ones, in the order that was drawn when the epoch began.

    ``ignite.engine.deterministic.ReproducibleBatchSampler`` was considered: it cannot set the random state between
    drawing the order, which happens when the first batch is wanted, and the transforms of that batch.
    """

    def __init__(self, batches: BatchSampler, done: int, *, order: Tensor, now: Tensor) -> None:
        self.batches, self.done, self.order, self.now = batches, done, order, now

    def __iter__(self) -> Iterator[list[int]]:
        torch.set_rng_state(self.order)
        batches = iter(self.batches)
        for _ in islice(batches, self.done):
            pass
        torch.set_rng_state(self.now)
        yield from batches

    def __len__(self) -> int:
        return len(self.batches) - self.done


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(one) for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str, type(None)))


def may_change(key: str) -> bool:
    """Whether a setting changes only how fast a training runs, how long, or where its files lie.

    Example:
        >>> may_change("workers"), may_change("dataset_dir"), may_change("learning_rate")
        (True, True, False)
    """
    return key in _MAY_CHANGE or key.endswith(("_dir", "_root"))


def _shapes_training(key: str) -> bool:
    """Whether it matters to a training what was asked for under an id inside a component."""
    return not may_change(key.rpartition("::")[2]) and not key.startswith("cross_validation::")


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What another run was made with, each in a few words.

    Example:
        >>> differences({"seed": 0, "width": 8}, {"seed": 1, "width": 8})
        ['seed 0, not 1']
    """
    return [
        f"{key} {reprlib.repr(then.get(key))}, not {reprlib.repr(now.get(key))}"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
    ]


def content_of(value: Any) -> Any:
    """A setting with what a file holds in place of its name: a copy elsewhere is the same, another file is not.

    Example:
        >>> content_of({"seed": 0, "weights": "none.pt"})
        {'seed': 0, 'weights': 'none.pt'}
    """
    if isinstance(value, Mapping):
        return {key: content_of(one) for key, one in value.items()}
    if isinstance(value, str) and os.path.isfile(value):  # noqa: PTH113 - Path's raises for long texts
        return f"SHA-256 {hashlib.sha256(Path(value).read_bytes()).hexdigest()[:16]}"
    return value


def _content_of_images(dataset: object) -> str | None:
    """Of all files and folders that the items of a dataset name, masks included; None if they name none."""
    data = getattr(dataset, "data", None)
    items = data if isinstance(data, Sequence) else []
    named = [
        {key: value for key, value in item.items() if _is_there(value)}
        for item in items
        if isinstance(item, Mapping)
    ]
    if not any(named):
        return None
    # In their order, because the sampler draws by it.
    digests = " ".join(input_digest(paths) for paths in named)
    return f"SHA-256 {hashlib.sha256(digests.encode()).hexdigest()[:16]}"


def _is_there(value: object) -> bool:
    if not isinstance(value, (str, Path)):
        return False
    path = Path(value)
    # The name of a case or a group may be that of a folder where the training was started.
    return path.is_file() or (path.is_absolute() and path.is_dir())


def _is_frozen(part: object) -> bool:
    return isinstance(part, nn.Module) and not any(one.requires_grad for one in part.parameters())


def _shapes(state: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    return {name: value.shape for name, value in state.items()}


def _device_state(engine: Engine) -> Tensor | None:
    device = engine.state.device
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _drawers(engine: Engine) -> dict[str, _Drawer]:
    """What the transforms and the preparation of a batch draw from, by the path to it."""
    found: dict[str, _Drawer] = {}
    seen: set[int] = set()
    waiting: list[tuple[str, object]] = [
        ("prepare_batch", engine.prepare_batch),
        ("transform", getattr(engine.data_loader.dataset, "transform", None)),
    ]
    while waiting:
        path, value = waiting.pop()
        if id(value) in seen or isinstance(value, (type, ModuleType, nn.Module, Tensor)):
            continue
        seen.add(id(value))
        if isinstance(value, (np.random.RandomState, np.random.Generator)):
            found[path] = value
            continue
        if isinstance(value, Mapping):
            children = [(str(key), child) for key, child in value.items()]
        elif isinstance(value, (list, tuple)):
            children = [(str(index), child) for index, child in enumerate(value)]
        else:
            children = list(getattr(value, "__dict__", {}).items())
            # Of MONAI: transforms that were not seeded draw from one generator of their class.
            children += [("R", value.R)] if isinstance(value, Randomizable) else []
        waiting += [(f"{path}.{name}", child) for name, child in children]
    return found


def _state_of(drawer: _Drawer) -> Any:
    if isinstance(drawer, np.random.RandomState):
        return drawer.get_state(legacy=False)
    return drawer.bit_generator.state


def _set_state(drawer: _Drawer, state: Mapping[str, Any]) -> None:
    if isinstance(drawer, np.random.RandomState):
        drawer.set_state(state)
    else:
        drawer.bit_generator.state = state


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value
