from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest
import torch
from medsr.errors import MedsrError, OutputError, SettingError
from medsr.handlers.training import (
    BudgetSchedule,
    GradientGuard,
    RunRecord,
    WeightSaver,
    save_weights,
)
from medsr.handlers.weight_average import WeightAverage
from medsr.inferers.mixed_precision import MixedPrecisionInferer
from monai.engines import SupervisedTrainer
from monai.inferers import Inferer, SimpleInferer
from torch import Tensor, nn


class Trial:
    """A MONAI trainer on one weight, whose loss and input a test can make bad."""

    def __init__(
        self, bad: tuple[int, ...] = (), *, iterations: int = 6, loss: nn.Module | None = None
    ) -> None:
        self.network = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.network.weight)
        self.optimizer = torch.optim.SGD(self.network.parameters(), 0.1)
        self.batches = [{"image": torch.ones(1, 1), "label": torch.zeros(1, 1)} for _ in range(iterations)]
        for index in bad:
            self.batches[index]["image"] = torch.full((1, 1), float("nan"))
        self.loss = loss or nn.MSELoss()

    def run(self, *handlers, inferer: Inferer | None = None) -> SupervisedTrainer:
        trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=1,
            train_data_loader=self.batches,
            network=self.network,
            optimizer=self.optimizer,
            loss_function=self.loss,
            inferer=inferer or SimpleInferer(),
            train_handlers=list(handlers),
        )
        trainer.run()
        return trainer

    @property
    def weight(self) -> float:
        return float(self.network.weight.detach())


class At:
    """Calls something at the end of every iteration."""

    def __init__(self, do) -> None:
        self.do = do

    def attach(self, engine) -> None:
        from ignite.engine import Events

        engine.add_event_handler(Events.ITERATION_COMPLETED, self.do)


# --- guard --------------------------------------------------------------------------------------------------------


def test_a_bad_batch_is_skipped_and_the_weights_survive():
    trial, seen = Trial(bad=(1, 3)), []
    guard = GradientGuard(trial.network)
    trial.run(guard, At(lambda engine: seen.append(trial.weight)))
    assert guard.skipped == 2
    assert all(value == value for value in seen)
    assert seen[1] == seen[0]
    assert seen[3] == seen[2]
    assert seen[0] > seen[2] > seen[4] > seen[5]


def test_a_bad_batch_leaves_nothing_in_running_statistics():
    trial = Trial(bad=(2,))
    trial.network = nn.Sequential(trial.network, nn.BatchNorm1d(1))
    trial.batches = [
        {"image": batch["image"] * torch.tensor([[1.0], [3]]), "label": torch.zeros(2, 1)}
        for batch in trial.batches
    ]
    seen = []
    average = WeightAverage(trial.network, 0.1, handle_buffers="update")
    trial.run(
        GradientGuard(trial.network),
        average,
        At(lambda engine: seen.append(float(trial.network[1].running_var))),
    )
    assert seen[2] == seen[1] != seen[0]
    assert seen[3] != seen[2]
    assert all(torch.isfinite(value).all() for value in average.ema_model.state_dict().values())


def test_without_the_guard_the_weights_would_be_lost():
    trial = Trial(bad=(1,))
    trial.run()
    assert trial.weight != trial.weight


def test_too_many_bad_batches_in_a_row_stop_the_training(caplog):
    trial = Trial(bad=(1, 3, 4, 5), iterations=8)
    guard = GradientGuard(trial.network, patience=3)
    with caplog.at_level(logging.CRITICAL), pytest.raises(MedsrError, match="3 batches in a row"):
        trial.run(guard)
    assert guard.skipped == 4
    assert trial.weight == trial.weight


def test_a_large_gradient_is_scaled_down():
    trial = Trial(iterations=1)
    trial.batches[0]["image"] *= 100
    trial.run(GradientGuard(trial.network, max_norm=0.5))
    assert trial.weight == pytest.approx(1 - 0.1 * 0.5, abs=1e-4)


def test_gradients_that_a_scaler_has_scaled_are_clipped_at_their_true_size():
    network = nn.Linear(1, 1, bias=False)
    nn.init.ones_(network.weight)
    optimizer, scaler = (
        torch.optim.SGD(network.parameters(), 0.1),
        torch.amp.GradScaler("cpu", init_scale=1024.0),
    )
    guard = GradientGuard(network, max_norm=0.5)
    engine = SimpleNamespace(scaler=scaler)
    for value, expected in ((0.2, 1 - 0.1 * 0.2), (100.0, 1 - 0.1 * (0.2 + 0.5)), (float("inf"), None)):
        before = float(network.weight.detach())
        optimizer.zero_grad()
        scaler.scale(network(torch.full((1, 1), value)).sum()).backward()
        guard(engine)
        scaler.step(optimizer)
        scaler.update()
        assert float(network.weight.detach()) == pytest.approx(before if expected is None else expected)
    assert guard.skipped == 1
    assert scaler.get_scale() == 512


# --- schedule -----------------------------------------------------------------------------------------------------


def test_the_rate_rises_and_falls_once():
    schedule = BudgetSchedule(Trial().optimizer, 2.0, iterations=100, warm_up=0.1)
    rates = [schedule.rate_at(p / 100) for p in range(101)]
    top = rates.index(max(rates))
    assert top == 10
    assert max(rates) == pytest.approx(2.0)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[0] == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(0.002)
    # Late iterations may overshoot the clock.
    assert schedule.rate_at(1.3) == pytest.approx(0.002)


def rates_of(trial: Trial, schedule: BudgetSchedule) -> list[float]:
    rates: list[float] = []
    trial.run(schedule, At(lambda engine: rates.append(trial.optimizer.param_groups[0]["lr"])))
    return rates


def test_a_budget_of_iterations_is_used_up_exactly():
    trial = Trial(iterations=50)
    schedule = BudgetSchedule(trial.optimizer, 1.0, iterations=20)
    rates = rates_of(trial, schedule)
    assert rates == pytest.approx([schedule.rate_at(k / 20) for k in range(20)])
    assert rates[-1] < 0.02


def test_a_budget_of_minutes_anneals_as_completely(monkeypatch):
    clock = iter(range(0, 100_000, 6))
    monkeypatch.setattr("medsr.handlers.training.time.monotonic", lambda: float(next(clock)))
    trial = Trial(iterations=50)
    rates = rates_of(trial, BudgetSchedule(trial.optimizer, 1.0, iterations=1000, minutes=2.0))
    # Two looks at the clock of 6 s per iteration: ten iterations in two minutes.
    assert 8 <= len(rates) <= 12
    assert max(rates) > 0.9
    assert rates[-1] < 0.05


@pytest.mark.parametrize("minutes", [0, -5, "soon"])
def test_a_budget_of_no_minutes_is_not_one_without_limit(minutes):
    with pytest.raises(SettingError, match="minutes must be a number > 0"):
        BudgetSchedule(Trial().optimizer, 1.0, iterations=7, minutes=minutes)


@pytest.mark.parametrize("minutes", [None, 60.0])
def test_whichever_budget_is_used_up_first_stops(minutes):
    trial = Trial(iterations=50)
    assert len(rates_of(trial, BudgetSchedule(trial.optimizer, 1.0, iterations=7, minutes=minutes))) == 7


def two_heads() -> nn.ModuleDict:
    return nn.ModuleDict({"trunk": nn.Linear(2, 3), "head": nn.Linear(3, 1)})


# --- saving -------------------------------------------------------------------------------------------------------


def digests(folder: Path) -> dict[str, str]:
    pairs = [line.split("  ") for line in (folder / "SHA256SUMS").read_text().splitlines()]
    return {name: digest for digest, name in pairs}


def test_saved_weights_read_back_and_are_listed(tmp_path):
    network = two_heads()
    digest = save_weights(network.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())
    assert digest == hashlib.sha256((tmp_path / "model.pt").read_bytes()).hexdigest()
    assert digests(tmp_path) == {"model.pt": digest}


def test_the_list_of_digests_keeps_the_other_files(tmp_path):
    other = save_weights(two_heads().state_dict(), tmp_path / "other.pt")
    save_weights(two_heads().state_dict(), tmp_path / "model.pt")
    newest = save_weights(two_heads().state_dict(), tmp_path / "model.pt")
    assert digests(tmp_path) == {"other.pt": other, "model.pt": newest}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["SHA256SUMS", "model.pt", "other.pt"]


def test_half_precision_halves_the_file_and_leaves_integers(tmp_path):
    state = {"w": torch.rand(64, 64), "count": torch.tensor(2**40)}
    save_weights(state, tmp_path / "full.pt")
    save_weights(state, tmp_path / "half.pt", dtype=torch.float16)
    assert (tmp_path / "half.pt").stat().st_size < 0.7 * (tmp_path / "full.pt").stat().st_size
    loaded = torch.load(tmp_path / "half.pt", weights_only=True)
    assert loaded["w"].dtype == torch.float16
    assert torch.allclose(loaded["w"].float(), state["w"], atol=1e-3)
    assert int(loaded["count"]) == 2**40


def test_a_failed_save_leaves_the_last_good_file(tmp_path, monkeypatch):
    before = save_weights({"w": torch.zeros(3)}, tmp_path / "model.pt")

    def full(content: object, target: IO[bytes]) -> None:
        target.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match=r"^model\.pt: cannot be written"):
        save_weights({"w": torch.ones(3)}, tmp_path / "model.pt")
    assert digests(tmp_path) == {"model.pt": before}
    assert hashlib.sha256((tmp_path / "model.pt").read_bytes()).hexdigest() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["SHA256SUMS", "model.pt"]


def test_a_file_that_reads_back_different_is_not_kept(tmp_path, monkeypatch):
    real = torch.save
    monkeypatch.setattr(torch, "save", lambda content, path: real({"w": content["w"] + 1}, path))
    with pytest.raises(OutputError, match="do not read back equal"):
        save_weights({"w": torch.zeros(3)}, tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_not_blamed_on_the_disk(tmp_path):
    with pytest.raises(OutputError, match=r"^model\.pt: the weights are not finite; lower"):
        save_weights({"w": torch.tensor([1.0, float("nan")])}, tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []


class CountedSaver(WeightSaver):
    saved_at: list[int]

    def __call__(self, engine=None) -> None:
        super().__call__(engine)
        self.saved_at = [*getattr(self, "saved_at", []), engine.state.iteration]


def test_weights_are_saved_now_and_then_and_at_the_end(tmp_path):
    trial = Trial(iterations=7)
    saver = CountedSaver(trial.network, tmp_path / "deep" / "model.pt", every=3)
    trial.run(saver)
    assert saver.saved_at == [3, 6, 7]
    assert float(torch.load(saver.path, weights_only=True)["weight"]) == trial.weight


def test_weights_are_saved_when_the_budget_ends_the_training(tmp_path):
    trial = Trial(iterations=50)
    saver = CountedSaver(trial.network, tmp_path / "model.pt")
    trial.run(BudgetSchedule(trial.optimizer, 0.1, iterations=4), saver)
    assert saver.saved_at[-1] == 4


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_weights_are_saved_when_the_training_breaks_off(tmp_path, error, caplog):
    trial = Trial()

    def stop(engine) -> None:
        if engine.state.iteration == 3:
            raise error("stop")

    with caplog.at_level(logging.CRITICAL), pytest.raises(error, match="stop"):
        trial.run(WeightSaver(trial.network, tmp_path / "model.pt"), At(stop))
    assert float(torch.load(tmp_path / "model.pt", weights_only=True)["weight"]) == trial.weight


def stop_in(iteration: int) -> At:
    def stop(engine) -> None:
        if engine.state.iteration == iteration:
            raise KeyboardInterrupt("stop")

    return At(stop)


def test_every_saver_saves_when_the_training_breaks_off(tmp_path, caplog):
    trial = Trial()
    savers = [WeightSaver(trial.network, tmp_path / name / "model.pt") for name in "ab"]
    with caplog.at_level(logging.CRITICAL), pytest.raises(KeyboardInterrupt, match="stop"):
        trial.run(*savers, stop_in(3))
    for saver in savers:
        assert float(torch.load(saver.path, weights_only=True)["weight"]) == trial.weight


def test_a_record_belongs_to_the_weights_that_a_stopped_training_leaves(tmp_path, caplog):
    for iterations, attached in ((3, 1), (4, -1)):
        trial = Trial()
        saver = WeightSaver(trial.network, tmp_path / "model.pt")
        record = RunRecord(tmp_path / "train_record.json", settings={"seed": iterations})
        with caplog.at_level(logging.CRITICAL), pytest.raises(KeyboardInterrupt, match="stop"):
            trial.run(*[record, saver][::attached], stop_in(iterations))
        found = json.loads((tmp_path / "train_record.json").read_text())
        assert found["iterations"] == iterations
        assert found["settings"] == {"seed": iterations}
        assert float(torch.load(tmp_path / "model.pt", weights_only=True)["weight"]) == trial.weight
    assert json.loads((tmp_path / "train_record_earlier.json").read_text())["iterations"] == 3


def test_bad_batches_that_stop_the_training_leave_weights_and_record(tmp_path, caplog):
    trial = Trial(bad=(1, 2))
    record = RunRecord(tmp_path / "train_record.json", settings={}, every=1)
    saver = WeightSaver(trial.network, tmp_path / "model.pt")
    with caplog.at_level(logging.CRITICAL), pytest.raises(MedsrError, match="2 batches in a row"):
        trial.run(GradientGuard(trial.network, patience=2), record, saver)
    assert float(torch.load(saver.path, weights_only=True)["weight"]) == trial.weight
    # It was stopped in the third iteration; the second was skipped, and has no loss.
    found = json.loads(record.path.read_text())
    assert found["iterations"] == 2
    assert [entry["iteration"] for entry in found["history"]] == [1]


def test_a_record_that_cannot_be_written_does_not_hide_why_the_training_broke_off(tmp_path, caplog):
    trial = Trial()
    record = RunRecord(tmp_path / "train_record.json", settings={"ratio": float("nan")})
    with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt, match="stop"):
        trial.run(record, WeightSaver(trial.network, tmp_path / "model.pt"), stop_in(3))
    assert (tmp_path / "model.pt").exists()
    assert "train_record.json: not expressible in JSON" in caplog.text


def test_a_training_that_fails_at_once_leaves_the_weights_of_an_earlier_one(tmp_path, caplog):
    before = save_weights({"weight": torch.zeros(1, 1)}, tmp_path / "model.pt")
    trial = Trial()
    with caplog.at_level(logging.CRITICAL), pytest.raises(KeyboardInterrupt, match="stop"):
        trial.run(WeightSaver(trial.network, tmp_path / "model.pt"), stop_in(1))
    assert digests(tmp_path)["model.pt"] == before
    assert hashlib.sha256((tmp_path / "model.pt").read_bytes()).hexdigest() == before


def test_weights_and_record_of_an_earlier_training_are_kept(tmp_path, caplog):
    found = []
    for number in (1, 2, 3):
        trial = Trial(iterations=number + 2)
        saver = WeightSaver(trial.network, tmp_path / "model.pt", every=1)
        with caplog.at_level(logging.WARNING):
            trial.run(saver, RunRecord(tmp_path / "train_record.json", settings={}, every=1))
        found.append(trial.weight)
    names = {"model.pt": 2, "model_earlier.pt": 0, "model_earlier_2.pt": 1}
    for name, number in names.items():
        assert float(torch.load(tmp_path / name, weights_only=True)["weight"]) == found[number]
        record = name.replace("model", "train_record").replace(".pt", ".json")
        assert json.loads((tmp_path / record).read_text())["iterations"] == number + 3
    assert digests(tmp_path) == {
        name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in names
    }
    assert caplog.messages.count("model.pt of an earlier training is kept as model_earlier.pt") == 1


def test_what_a_killed_and_resumed_training_replaces_was_kept_before(tmp_path, caplog):
    earlier = save_weights({"weight": torch.zeros(1, 1)}, tmp_path / "model.pt")
    saver = WeightSaver(Trial().network, tmp_path / "model.pt")
    trial = Trial()
    # It ends before it has saved anything.
    with caplog.at_level(logging.CRITICAL), pytest.raises(KeyboardInterrupt, match="stop"):
        trial.run(saver, stop_in(1))
    assert digests(tmp_path) == {"model.pt": earlier, "model_earlier.pt": earlier}
    # Begun once more, there is nothing new to be kept; resumed, its own file is replaced.
    Trial(iterations=2).run(WeightSaver(trial.network, tmp_path / "model.pt"))
    assert set(digests(tmp_path)) == {"model.pt", "model_earlier.pt"}
    assert digests(tmp_path)["model_earlier.pt"] == earlier
    assert digests(tmp_path)["model.pt"] != earlier


def test_without_links_an_earlier_file_is_copied(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    earlier = save_weights({"weight": torch.zeros(1, 1)}, tmp_path / "model.pt")
    trial = Trial(iterations=2)
    trial.run(WeightSaver(trial.network, tmp_path / "model.pt"))
    assert hashlib.sha256((tmp_path / "model_earlier.pt").read_bytes()).hexdigest() == earlier


def test_files_of_one_training_are_kept_under_one_number(tmp_path):
    (tmp_path / "model_earlier_2.pt").write_bytes(b"")
    for name in ("model.pt", "train_record.json"):
        (tmp_path / name).write_text("earlier")
    trial = Trial(iterations=2)
    trial.run(
        WeightSaver(trial.network, tmp_path / "model.pt"),
        RunRecord(tmp_path / "train_record.json", settings={}),
    )
    assert (tmp_path / "model_earlier_3.pt").read_text() == "earlier"
    assert (tmp_path / "train_record_earlier_3.json").read_text() == "earlier"


def test_the_averaged_weights_are_saved(tmp_path):
    trial = Trial()
    average = WeightAverage(trial.network, momentum=0.1)
    trial.run(average, WeightSaver(average.ema_model, tmp_path / "model.pt"))
    saved = float(torch.load(tmp_path / "model.pt", weights_only=True)["weight"])
    assert saved == float(average.ema_model.weight)
    assert trial.weight < saved < 1


# --- record -------------------------------------------------------------------------------------------------------


class Loss(nn.Module):
    """Two terms, of which the second counts the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.last_terms: dict[str, float] = {}
        self.calls = 0

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        self.last_terms = {"l1": 2.0, "calls": float(self.calls)}
        return (pred - target).abs().mean()


def test_the_record_tells_what_was_trained(tmp_path):
    loss = Loss()
    settings = {"stage": "plain", "ratio": (1.6, 8.0), "path": Path("a"), "device": torch.device("cpu")}
    record = RunRecord(tmp_path / "runs" / "train_record.json", settings, loss, every=2)
    Trial(iterations=5, loss=loss).run(record)
    found = json.loads((tmp_path / "runs" / "train_record.json").read_text())
    assert found["iterations"] == 5
    assert found["settings"] == {"stage": "plain", "ratio": [1.6, 8.0], "path": "a", "device": "cpu"}
    assert found["minutes"] >= 0
    assert set(found) >= {"command", "commit", "machine", "versions"}
    assert found["precision"] == "float32"
    # Each entry is the mean since the entry before.
    assert [(e["iteration"], e["l1"], e["calls"]) for e in found["history"]] == [
        (2, 2.0, 1.5),
        (4, 2.0, 3.5),
        (5, 2.0, 5.0),
    ]


def test_the_record_tells_the_precision_of_the_convolutions(tmp_path):
    record = RunRecord(tmp_path / "record.json", {})
    Trial(iterations=1).run(record, inferer=MixedPrecisionInferer("bfloat16"))
    assert json.loads((tmp_path / "record.json").read_text())["precision"] == "bfloat16"


class LateLoss(Loss):
    """A second term joins at the fourth call."""

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        value = super().forward(pred, target)
        self.last_terms = {"l1": 2.0, **({"late": 3.0} if self.calls > 3 else {})}
        return value


def test_a_term_that_joins_late_has_its_own_mean(tmp_path):
    loss = LateLoss()
    Trial(iterations=5, loss=loss).run(RunRecord(tmp_path / "record.json", {}, loss, every=5))
    (entry,) = json.loads((tmp_path / "record.json").read_text())["history"]
    assert (entry["l1"], entry["late"]) == (2.0, 3.0)


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/opt/bin/medsr", "run", "bundle", "data"], "medsr run bundle data"),
        (["/lib/monai/bundle/__main__.py", "run", "--lr", "1"], "python -m monai.bundle run --lr 1"),
    ],
)
def test_the_recorded_command_is_the_one_that_was_typed(argv, command, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    Trial(iterations=1).run(RunRecord(tmp_path / "record.json", {}, every=1))
    assert json.loads((tmp_path / "record.json").read_text())["command"] == command


def test_without_terms_the_loss_itself_is_recorded(tmp_path):
    Trial(iterations=2).run(RunRecord(tmp_path / "record.json", {}, every=1))
    history = json.loads((tmp_path / "record.json").read_text())["history"]
    assert [set(entry) for entry in history] == [{"iteration", "minutes", "loss"}] * 2
    assert history[0]["loss"] > history[1]["loss"] > 0


def test_the_record_is_complete_when_the_budget_ends_the_training(tmp_path):
    trial = Trial(iterations=50)
    record = RunRecord(tmp_path / "record.json", {}, every=100)
    trial.run(BudgetSchedule(trial.optimizer, 0.1, iterations=3), record)
    found = json.loads((tmp_path / "record.json").read_text())
    assert found["iterations"] == 3
    assert [entry["iteration"] for entry in found["history"]] == [3]
