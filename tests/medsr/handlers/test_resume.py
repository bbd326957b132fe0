from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from medsr.errors import MedsrError, OutputError, SettingError, WeightsError
from medsr.handlers.resume import TrainingState
from medsr.handlers.training import BudgetSchedule, GradientGuard, RunRecord, WeightSaver
from medsr.handlers.weight_average import WeightAverage
from medsr.overrides import asking
from monai.data import CacheDataset, DataLoader
from monai.engines import SupervisedTrainer
from monai.inferers import SimpleInferer
from monai.transforms import Compose, RandFlipd, RandGaussianNoised, RandSpatialCropd
from torch import Tensor, nn

TOTAL = 8


class Stop:
    """Raises in an iteration, as the last of all handlers."""

    def __init__(self, at: int | None, error: type[BaseException], event: Events) -> None:
        self.at, self.error, self.event = at, error, event

    def attach(self, engine) -> None:
        engine.add_event_handler(self.event, self)

    def __call__(self, engine) -> None:
        if engine.state.iteration == self.at:
            raise self.error("stop")


class Loss(nn.Module):
    """A loss that is trained, beside a part of it that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return ((self.weight * pred - target) ** 2).mean() + (self.weight - 1) ** 2


def prepare(batch, device=None, non_blocking=False, **_):
    """Noise from every global generator."""
    image = torch.as_tensor(batch["image"].as_tensor())
    noise = torch.randn_like(image) + random.random() + np.random.rand()  # noqa: NPY002
    return image + 0.1 * noise, image


class Prepare:
    """Noise from a generator of its own."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)

    def __call__(self, batch, *args, **kwargs):
        noisy, image = prepare(batch)
        return noisy * self.random.uniform(0.9, 1.1), image


class Trial:
    """A tiny training with batch norm, a trained loss, two optimiser groups, random crops and a warm average."""

    def __init__(
        self,
        folder: Path,
        *,
        features: int = 3,
        images: int = 4,
        file: Path | None = None,
        batches: int = TOTAL,
        weighted: bool = False,
        resume: bool | str = False,
        save_minutes: float = 0.0,
        stop: int | None = None,
        error: type[BaseException] = RuntimeError,
        event: Events = Events.ITERATION_COMPLETED,
        accumulation: int = 1,
        budget: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        self.folder = folder
        self.network = nn.Sequential(
            nn.Conv2d(1, features, 3, padding=1),
            nn.BatchNorm2d(features),
            nn.ReLU(),
            nn.Conv2d(features, 1, 1),
        )
        self.loss = Loss()
        trained = nn.ModuleList([self.network, self.loss])
        optimizer = torch.optim.Adam(trained.parameters(), 0.01)
        drawn = torch.Generator().manual_seed(0)
        data = [{"image": torch.rand(1, 12, 12, generator=drawn)} for _ in range(images)]
        data = [{**item, "file": str(file)} if file else item for item in data]
        transform = Compose(
            [
                RandSpatialCropd("image", 8, random_size=False),
                RandFlipd("image", 0.5),
                RandGaussianNoised("image", 0.5),
            ]
        )
        dataset = CacheDataset(data, transform, progress=False)
        sampler = (
            torch.utils.data.WeightedRandomSampler([1.0] * (images - 1) + [3.0], 2 * batches)
            if weighted
            else torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=2 * batches)
        )
        schedule = BudgetSchedule(optimizer, 0.01, **{"iterations": TOTAL, **(budget or {})})
        average = WeightAverage(self.network, momentum=0.1, handle_buffers="update")
        self.average = average.ema_model
        record = RunRecord(folder / "train_record.json", {}, every=3)
        self.state = TrainingState(
            folder / "training_state.pt",
            {"seed": 0, "range": (1, 2), **settings},
            schedule,
            average=average,
            record=record,
            resume=resume,
            minutes=save_minutes,
            config=config,
        )
        self.trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=1,
            train_data_loader=DataLoader(dataset, sampler=sampler, batch_size=2),
            network=self.network,
            optimizer=optimizer,
            loss_function=self.loss,
            inferer=SimpleInferer(),
            prepare_batch=Prepare(),
            accumulation_steps=accumulation,
            train_handlers=[
                GradientGuard(trained),
                schedule,
                average,
                record,
                WeightSaver(self.average, folder / "model.pt"),
                self.state,
                Stop(stop, error, event),
            ],
        )
        self.trainer.logger.setLevel(logging.CRITICAL + 1)

    def run(self) -> Trial:
        self.trainer.run()
        return self

    def outcome(self) -> dict[str, Tensor]:
        parts = {"network": self.network, "loss": self.loss, "average": self.average}
        return {
            f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()
        }


def interrupted(folder: Path, **settings: Any) -> Trial:
    trial = Trial(folder, **{"stop": 5, **settings})
    with pytest.raises(settings.get("error", RuntimeError), match="stop"):
        trial.run()
    return trial


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


# --- The same result ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_resumed_training_ends_as_an_uninterrupted_one(tmp_path, error):
    whole = Trial(tmp_path / "whole").run()
    stopped = interrupted(tmp_path / "parts", error=error)
    resumed = Trial(tmp_path / "parts", resume=True).run()
    assert resumed.trainer.state.iteration == TOTAL
    assert_equal(resumed.outcome(), whole.outcome())
    # It was not yet there when it stopped.
    assert not torch.equal(stopped.network[0].weight, whole.network[0].weight)
    # What the first part saved is of the same training.
    assert not list((tmp_path / "parts").glob("*earlier*"))


PIECES = [
    *(("parts", name) for name in ("network", "optimizer", "loss_function", "average")),
    *(("random", name) for name in ("order", "python", "numpy", "torch", "drawers")),
]


@pytest.mark.parametrize("piece", PIECES, ids="-".join)
def test_every_piece_of_the_state_matters(tmp_path, piece):
    for name, stop in (("earlier", 2), ("parts", 4)):
        interrupted(tmp_path / name, stop=stop)
    part, name = piece
    path = tmp_path / "parts" / "training_state.pt"
    state = torch.load(path, weights_only=True)
    earlier = torch.load(tmp_path / "earlier" / "training_state.pt", weights_only=True)
    # The order was drawn before both: the later state of the same generator stands for another one.
    state[part][name] = state[part]["torch"] if name == "order" else earlier[part][name]
    torch.save(state, path)
    whole = Trial(tmp_path / "whole").run().outcome()
    other = Trial(tmp_path / "parts", resume=True).run().outcome()
    assert any(not torch.equal(whole[key], other[key]) for key in whole)


@pytest.mark.parametrize("weighted", [False, True])
def test_an_iteration_that_was_not_completed_is_done_again(tmp_path, weighted):
    whole = Trial(tmp_path / "whole", weighted=weighted).run()
    # The batch was drawn already, and nothing was saved of it.
    interrupted(tmp_path / "parts", event=Events.ITERATION_STARTED, weighted=weighted)
    resumed = Trial(tmp_path / "parts", weighted=weighted, resume="true").run()
    assert_equal(resumed.outcome(), whole.outcome())


def test_a_training_may_be_interrupted_often(tmp_path):
    whole = Trial(tmp_path / "whole").run()
    interrupted(tmp_path / "parts", stop=2)
    interrupted(tmp_path / "parts", stop=3, resume=True)
    interrupted(tmp_path / "parts", stop=6, resume=True)
    assert_equal(Trial(tmp_path / "parts", resume=True).run().outcome(), whole.outcome())


def test_nothing_is_left_to_do_after_the_last_iteration(tmp_path):
    whole = interrupted(tmp_path, stop=TOTAL)
    resumed = Trial(tmp_path, resume=True).run()
    assert_equal(resumed.outcome(), whole.outcome())
    assert not resumed.state.path.exists()


def test_gradients_that_are_being_collected_are_not_cut_off(tmp_path):
    whole = Trial(tmp_path / "whole", accumulation=3).run()
    interrupted(tmp_path / "parts", accumulation=3)
    kept = torch.load(tmp_path / "parts" / "training_state.pt", weights_only=True)
    assert kept["trainer"]["iteration"] == 3
    resumed = Trial(tmp_path / "parts", accumulation=3, resume=True).run()
    assert_equal(resumed.outcome(), whole.outcome())


def test_the_record_goes_on(tmp_path):
    Trial(tmp_path / "whole").run()
    interrupted(tmp_path / "parts")
    Trial(tmp_path / "parts", resume=True).run()
    histories = [
        json.loads((tmp_path / name / "train_record.json").read_text())["history"]
        for name in ("whole", "parts")
    ]
    for history in histories:
        for entry in history:
            assert entry.pop("minutes") >= 0
    # An entry is a mean over iterations before and after the interruption.
    assert [entry["iteration"] for entry in histories[0]] == [3, 6, 8]
    assert histories[0] == histories[1]


def test_the_precision_of_what_was_done_stays_in_the_record(tmp_path):
    trial = Trial(tmp_path, stop=TOTAL)
    trial.trainer.inferer.used_precision = "bfloat16"
    with pytest.raises(RuntimeError, match="stop"):
        trial.run()
    # No iteration is left that could tell.
    Trial(tmp_path, resume=True).run()
    assert json.loads((tmp_path / "train_record.json").read_text())["precision"] == "bfloat16"


def test_spent_minutes_count(tmp_path, monkeypatch):
    now = [0.0]
    # Of that module alone: others wait by the clock.
    monkeypatch.setattr("medsr.handlers.training.time", SimpleNamespace(monotonic=lambda: now[0]))
    budget = {"iterations": 1000, "minutes": 10.0}

    def elapse(trial: Trial) -> Trial:
        trial.trainer.add_event_handler(Events.ITERATION_STARTED, lambda: now.__setitem__(0, now[0] + 120))
        return trial

    with pytest.raises(RuntimeError, match="stop"):
        elapse(Trial(tmp_path, budget=budget, stop=3)).run()
    now[0] = 1e6
    resumed = elapse(Trial(tmp_path, budget=budget, resume=True)).run()
    assert resumed.trainer.state.iteration == 5
    assert json.loads((tmp_path / "train_record.json").read_text())["minutes"] == 10


# --- When it is written -------------------------------------------------------------------------------------------


def test_the_state_is_written_after_some_minutes_only(tmp_path):
    trial = interrupted(tmp_path, save_minutes=60)
    assert not trial.state.path.exists()
    with pytest.raises(SettingError, match="no such file: the training has ended, or none was interrupted"):
        Trial(tmp_path, resume=True)


@pytest.mark.parametrize("iterations", [TOTAL, 3])
def test_after_the_end_there_is_nothing_to_resume(tmp_path, iterations):
    trial = Trial(tmp_path, budget={"iterations": iterations}).run()
    assert trial.trainer.state.iteration == iterations
    assert sorted(path.name for path in tmp_path.iterdir()) == ["SHA256SUMS", "model.pt", "train_record.json"]
    with pytest.raises(SettingError, match="the training has ended"):
        Trial(tmp_path, resume=True)


def test_a_new_start_warns_of_the_state_that_it_replaces(tmp_path, caplog):
    interrupted(tmp_path)
    with caplog.at_level(logging.WARNING):
        Trial(tmp_path, resume="false")
    assert "training_state.pt of an interrupted training will be replaced" in caplog.text


def test_a_full_disk_leaves_the_last_good_state(tmp_path, monkeypatch):
    interrupted(tmp_path, stop=3)
    before = (tmp_path / "training_state.pt").read_bytes()

    def full(path: Path, content: bytes) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match=r"^training_state\.pt: cannot be written"):
        Trial(tmp_path, resume=True).run()
    assert (tmp_path / "training_state.pt").read_bytes() == before
    assert not list(tmp_path.glob(".medsr-*"))


def test_what_is_frozen_is_not_written(tmp_path):
    trial = Trial(tmp_path, stop=1)
    trial.trainer.teacher = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(RuntimeError, match="stop"):
        trial.run()
    parts = torch.load(trial.state.path, weights_only=True)["parts"]
    assert set(parts) == {"network", "optimizer", "loss_function", "average", "schedule", "record"}


# --- What is refused ----------------------------------------------------------------------------------------------


def refusal(folder: Path, error: type[MedsrError] = SettingError, **settings: Any) -> str:
    """The line in which a resumption is refused; the weights of the interrupted training stay."""
    before = (folder / "model.pt").read_bytes()
    with pytest.raises(error) as caught:
        Trial(folder, resume=True, **settings).run()
    assert (folder / "model.pt").read_bytes() == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seed": 1}, "was made with seed 0, not 1"),
        ({"range": (1, 3)}, "was made with range [1, 2], not [1, 3]"),
        ({"another": "x"}, "was made with another None, not 'x'"),
        ({"images": 5}, "was made with number of images 4, not 5"),
        ({"seed": 1, "range": 2}, "was made with range [1, 2], not 2; seed 0, not 1; give the same settings"),
        ({"features": 4}, "was made for another network"),
    ],
)
def test_a_state_of_another_training_is_refused(tmp_path, settings, words):
    interrupted(tmp_path, stop=3)
    assert words in refusal(tmp_path, **settings)


def test_images_are_known_by_what_they_hold(tmp_path):
    files = [tmp_path / folder / "a.png" for folder in ("first", "other", "moved")]
    for file, content in zip(files, (b"1", b"2", b"1"), strict=True):
        file.parent.mkdir()
        file.write_bytes(content)
    interrupted(tmp_path, stop=3, file=files[0])
    assert "was made with content of images" in refusal(tmp_path, file=files[1])
    assert Trial(tmp_path, resume=True, file=files[2]).run().trainer.state.iteration == TOTAL


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("iterations", "end"), [(12, 12), (7, 7), (3, 5)])
def test_the_budget_may_be_another(tmp_path, iterations, end, weighted):
    interrupted(tmp_path, weighted=weighted)
    budget = {"iterations": iterations, "minutes": 500}
    resumed = Trial(tmp_path, weighted=weighted, resume=True, batches=iterations, budget=budget).run()
    assert resumed.trainer.state.iteration == end
    assert not resumed.state.path.exists()


def test_plain_settings_of_a_config_must_be_the_same_and_components_are_passed_over(tmp_path):
    config = {"zoom": [0.7, 1.4], "classes": {"a": [0]}, "network": nn.Linear(1, 1), "train::items": [1]}
    may_change = {"output_dir": "a", "workers": 0, "minutes": None, "cached": 5, "device": "cpu"}
    interrupted(tmp_path, stop=3, config={**config, **may_change})
    said = refusal(tmp_path, config={**config, "zoom": 0, "classes": {"a": [1]}})
    assert "was made with classes {'a': [0]}, not {'a': [1]}; zoom [0.7, 1.4], not 0;" in said
    others = {
        "output_dir": "b",
        "workers": 2,
        "minutes": 5,
        "cached": 0,
        "device": "cuda",
        "train::items": [2],
    }
    resumed = Trial(tmp_path, resume=True, config={**config, **others}).run()
    assert resumed.trainer.state.iteration == TOTAL


def test_weights_are_known_by_their_content(tmp_path):
    files = [tmp_path / name for name in ("a.pt", "copy.pt", "b.pt")]
    for file, content in zip(files, (b"same", b"same", b"other"), strict=True):
        file.write_bytes(content)
    run = tmp_path / "run"
    interrupted(run, stop=3, config={"initial_weights": str(files[0])})
    assert "initial_weights 'SHA-256 0967115f2813a354', not" in refusal(
        run, config={"initial_weights": str(files[2])}
    )
    Trial(run, resume=True, config={"initial_weights": str(files[1])}).run()


def test_weights_of_the_own_folder_may_have_been_replaced_since(tmp_path):
    Trial(tmp_path).run()
    config = {"initial_weights": str(tmp_path / "model.pt")}
    before = (tmp_path / "model.pt").read_bytes()
    interrupted(tmp_path, config=config)
    assert (tmp_path / "model.pt").read_bytes() != before
    Trial(tmp_path, resume=True, config=config).run()


def test_what_was_set_inside_components_must_be_the_same(tmp_path):
    with asking(["train.json"], {"optimizer::weight_decay": 0.1, "train::handlers::5::minutes": 0}):
        interrupted(tmp_path)
    with asking(["train.json"], {"optimizer::weight_decay": 0.1}):
        Trial(tmp_path, resume=True)
    assert "optimizer::weight_decay 0.1, not None" in refusal(tmp_path)


def change(folder: Path, part: str) -> None:
    path = folder / "training_state.pt"
    state = torch.load(path, weights_only=True)
    state["parts"][part] = state["parts"].pop("loss_function")
    torch.save(state, path)


@pytest.mark.parametrize(
    ("part", "words"),
    [("discriminator", "made by another trainer ('discriminator')"), ("optimizer", "('loss_function')")],
)
def test_a_state_of_another_trainer_is_refused(tmp_path, part, words):
    interrupted(tmp_path, stop=3)
    change(tmp_path, part)
    assert words in refusal(tmp_path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: torch.save({"settings": print}, path), "damaged (UnpicklingError)"),
        (lambda path: torch.save({"weight": torch.zeros(1)}, path), "not the state of a training"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage, words):
    interrupted(tmp_path, stop=3)
    damage(tmp_path / "training_state.pt")
    assert words in refusal(tmp_path, WeightsError)


def test_resume_is_a_yes_or_no(tmp_path):
    with pytest.raises(SettingError, match="resume must be true or false, got 'maybe'"):
        Trial(tmp_path, resume="maybe")


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_several_processes_are_not_resumed_and_write_no_state(tmp_path):
    with pytest.raises(SettingError, match="several processes cannot be resumed"):
        Trial(tmp_path, resume=True)
    assert not interrupted(tmp_path).state.path.exists()
