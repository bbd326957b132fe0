from __future__ import annotations

import copy
import json
from typing import Any, NamedTuple

import pytest
import torch
from ignite.engine import Events
from medsr.engines.distillation import DistillationTrainer
from medsr.errors import SettingError
from medsr.handlers.training import BudgetSchedule, GradientGuard, RunRecord
from medsr.inferers.mixed_precision import MixedPrecisionInferer
from medsr.losses.thick_segmentation import ThickSegmentationLoss
from medsr.networks.slice_sr import SliceSRNet
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.inferers import SimpleInferer
from torch import Tensor, nn
from torch.nn import functional as F

BATCHES = 3
WITHOUT_TEACHER = {"cosine_weight": 0, "pairwise_weight": 0}


class Prediction(NamedTuple):
    thick: Tensor
    thin: Tensor
    feature: Tensor


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Conv3d(1, 6, 3, padding=1)
        self.thick, self.thin = nn.Conv3d(6, 2, 1), nn.Conv3d(6, 2, 1)
        self.seen: list[dict[str, Any]] = []

    def forward(self, image: Tensor, scale: float | None = None, *, complete: bool = False) -> Any:
        self.seen.append({"image": image.detach().clone(), "scale": scale, "complete": complete})
        feature = self.encode(image)
        fine = feature.repeat_interleave(round(scale), -1)
        thin = self.thin(fine)
        return Prediction(self.thick(feature), thin, F.avg_pool3d(feature, (2, 2, 1))) if complete else thin


class WatchedTeacher(SliceSRNet):
    """Records what it is asked and under which conditions."""

    def __init__(self) -> None:
        super().__init__(width=0.125, label_classes=1)
        self.seen: list[dict[str, Any]] = []

    def encoder_features(
        self, image: Tensor, scale: float | None = None, thickness: float = 1.0, *, count: int = 5
    ) -> list[Tensor]:
        self.seen.append({"image": image.clone(), "scale": scale, "thickness": thickness})
        self.seen[-1].update(training=self.training, gradients=torch.is_grad_enabled())
        return super().encoder_features(image, scale, thickness, count=count)


def student() -> Student:
    torch.manual_seed(0)
    return Student()


def teacher() -> WatchedTeacher:
    torch.manual_seed(1)
    return WatchedTeacher().train()


def prepare_batch(batch: dict[str, Tensor], device: torch.device, *_: Any, **__: Any) -> tuple[Any, ...]:
    image, share = batch["image"].to(device), batch["label"].to(device)
    labels = torch.cat([1 - share, share], 1)
    targets = {
        "thick": labels,
        "thin": labels.repeat_interleave(2, -1),
        "uncertainty": torch.full_like(share, 0.25),
        "teacher_image": torch.cat([image * 0.1 + 0.5, share], 1),
    }
    return image, targets, (), {"scale": 2.0, "thickness": 0.75}


def batches() -> list[dict[str, Tensor]]:
    torch.manual_seed(2)
    return [
        {"image": torch.randn(2, 1, 16, 16, 4), "label": torch.rand(2, 1, 16, 16, 4)} for _ in range(BATCHES)
    ]


def make(network: Student, loss: nn.Module | None = None, **settings: Any) -> DistillationTrainer:
    if loss is None:
        torch.manual_seed(3)
        loss = ThickSegmentationLoss(2, 6, 8, nodes=(4, 4))
    parameters = [*network.parameters(), *loss.parameters()]
    return DistillationTrainer(
        **{
            "device": "cpu",
            "max_epochs": 1,
            "train_data_loader": batches(),
            "network": network,
            "optimizer": torch.optim.SGD(parameters, lr=0.1),
            "loss_function": loss,
            "prepare_batch": prepare_batch,
            **settings,
        }
    )


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def test_student_and_adapter_learn_and_the_teacher_does_not():
    network, guide = student(), teacher()
    trainer = make(network, teacher=guide)
    loss = trainer.loss_function
    before = [copy.deepcopy(module.state_dict()) for module in (network, loss, guide)]
    trainer.run()
    assert changed(network, before[0]) == set(before[0])
    assert changed(loss, before[1]) == {"cosine.adapter.weight", "cosine.adapter.bias"}
    assert changed(guide, before[2]) == set()
    assert not any(p.requires_grad or p.grad is not None for p in guide.parameters())
    assert set(loss.last_terms) == {
        "thick_cross_entropy",
        "thin_cross_entropy",
        "thin_dice",
        "cosine",
        "pairwise",
    }


def test_distillation_lowers_the_distillation_terms():
    network = student()
    trainer = make(network, teacher=teacher(), max_epochs=15)
    history: list[float] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda _: history.append(trainer.loss_function.last_terms["cosine"])
    )
    trainer.run()
    assert sum(history[-3:]) < 0.8 * sum(history[:3])


def test_the_teacher_sees_its_own_image_and_the_student_does_not():
    network, guide = student(), teacher()
    make(network, teacher=guide).run()
    assert len(network.seen) == len(guide.seen) == BATCHES
    for batch, pupil, master in zip(batches(), network.seen, guide.seen, strict=True):
        assert torch.equal(pupil["image"], batch["image"])
        assert (pupil["scale"], pupil["complete"]) == (2.0, True)
        assert torch.equal(master["image"], torch.cat([batch["image"] * 0.1 + 0.5, batch["label"]], 1))
        assert (master["scale"], master["thickness"]) == (2.0, 0.75)
        assert not master["training"]
        assert not master["gradients"]


def test_the_loss_sees_the_features_of_the_stage_and_not_the_image():
    guide, seen = teacher(), []

    class Loss(nn.Module):
        def forward(self, pred: Prediction, target: dict[str, Tensor]) -> Tensor:
            seen.append(target)
            return pred.thin.mean()

    make(student(), Loss(), teacher=guide, teacher_stage=2).run()
    for target, master in zip(seen, guide.seen, strict=True):
        assert set(target) == {"thick", "thin", "uncertainty", "teacher"}
        expected = SliceSRNet.encoder_features(guide, master["image"], 2.0, 0.75)[2]
        assert torch.equal(target["teacher"], expected)
        assert not target["teacher"].requires_grad


def test_a_teacher_that_no_term_asks_changes_nothing():
    networks = [student(), student()]
    for network, guide in zip(networks, (None, teacher()), strict=True):
        make(network, ThickSegmentationLoss(2, **WITHOUT_TEACHER), teacher=guide).run()
    assert changed(networks[0], networks[1].state_dict()) == set()


def test_without_a_teacher_the_step_is_that_of_monai():
    network, reference = student(), student()
    make(network, ThickSegmentationLoss(2, **WITHOUT_TEACHER)).run()

    def prepare_complete(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        inputs, targets, rest, _ = prepare_batch(*args, **kwargs)
        return inputs, targets, rest, {"scale": 2.0, "complete": True}

    SupervisedTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=batches(),
        network=reference,
        optimizer=torch.optim.SGD(reference.parameters(), lr=0.1),
        loss_function=ThickSegmentationLoss(2, **WITHOUT_TEACHER),
        prepare_batch=prepare_complete,
    ).run()
    assert changed(network, reference.state_dict()) == set()


def test_a_loss_that_needs_a_teacher_is_not_left_without():
    trainer = make(student())
    with pytest.raises(SettingError, match="give a teacher or set cosine_weight"):
        trainer.run()


def test_a_batch_without_an_image_for_the_teacher_is_refused():
    def forgetful(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        inputs, targets, rest, settings = prepare_batch(*args, **kwargs)
        del targets["teacher_image"]
        return inputs, targets, rest, settings

    trainer = make(student(), teacher=teacher(), prepare_batch=forgetful)
    with pytest.raises(SettingError, match="teacher_image"):
        trainer.run()
    # The trainer is whole after the error.
    assert trainer.prepare_batch is forgetful


def test_the_batch_is_not_changed_and_prepare_batch_stays():
    kept = prepare_batch(batches()[0], torch.device("cpu"))
    before = {name: value.clone() for name, value in kept[1].items()}
    trainer = make(student(), teacher=teacher(), prepare_batch=lambda *_, **__: kept)
    prepare = trainer.prepare_batch
    trainer.run()
    assert trainer.prepare_batch is prepare
    assert kept[1].keys() == before.keys()
    assert all(torch.equal(kept[1][name], before[name]) for name in before)
    assert kept[3] == {"scale": 2.0, "thickness": 0.75}


def test_events_and_output_are_those_of_monai():
    fired: list[str] = []
    trainer = make(student(), teacher=teacher(), decollate=False)
    for event in (
        IterationEvents.FORWARD_COMPLETED,
        IterationEvents.LOSS_COMPLETED,
        IterationEvents.BACKWARD_COMPLETED,
        IterationEvents.MODEL_COMPLETED,
    ):
        trainer.add_event_handler(event, lambda _, name=event.value: fired.append(name))
    trainer.run()
    assert fired == ["forward_completed", "loss_completed", "backward_completed", "model_completed"] * BATCHES
    output = trainer.state.output
    assert set(output) == {"image", "label", "pred", "loss"}
    assert output["pred"].thin.shape == (2, 2, 16, 16, 8)
    assert output["loss"].item() == pytest.approx(sum(trainer.loss_function.last_terms.values()))


def test_the_handlers_of_a_run_work(tmp_path):
    network, guide = student(), teacher()
    trainer = make(network, teacher=guide)
    both = nn.ModuleList([network, trainer.loss_function])
    record = RunRecord(tmp_path / "record.json", {}, trainer.loss_function, every=1)
    for handler in (GradientGuard(both), BudgetSchedule(trainer.optimizer, 0.01, BATCHES), record):
        handler.attach(trainer)
    trainer.run()
    history = json.loads((tmp_path / "record.json").read_text())["history"]
    assert [entry["iteration"] for entry in history] == [1, 2, 3]
    assert {"thick_cross_entropy", "thin_cross_entropy", "thin_dice", "cosine", "pairwise"} <= set(history[0])


def test_a_bad_batch_moves_neither_network_nor_adapter():
    network = student()
    spoilt = batches()[:1]
    spoilt[0]["image"][0, 0, 0, 0, 0] = torch.nan
    trainer = make(network, teacher=teacher(), train_data_loader=spoilt)
    both = nn.ModuleList([network, trainer.loss_function])
    guard = GradientGuard(both)
    guard.attach(trainer)
    before = copy.deepcopy(both.state_dict())
    trainer.run()
    assert guard.skipped == 1
    assert changed(both, before) == set()


def test_weights_and_inferer_are_the_student_s_alone():
    network, calls = student(), []

    class Inferer(SimpleInferer):
        def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append((inputs.shape[1], kwargs))
            return super().__call__(inputs, network, *args, **kwargs)

    names = set(network.state_dict())
    make(network, teacher=teacher(), inferer=Inferer()).run()
    assert calls == [(1, {"scale": 2.0, "complete": True})] * BATCHES
    assert set(network.state_dict()) == names


def test_steps_are_taken_once_per_accumulation():
    network = student()
    trainer = make(network, teacher=teacher(), accumulation_steps=2)
    weights: list[Tensor] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda _: weights.append(network.encode.weight.detach().clone())
    )
    start = network.encode.weight.detach().clone()
    trainer.run()
    assert torch.equal(weights[0], start)
    assert not torch.equal(weights[1], start)


class Scaler:
    """Stands in for the gradient scaler, which needs a GPU."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def scale(self, loss: Tensor) -> Tensor:
        self.calls.append("scale")
        return loss * 4

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.calls.append("step")
        optimizer.step()

    def update(self) -> None:
        self.calls.append("update")


def test_mixed_precision_holds_for_both_networks(monkeypatch):
    scaler = Scaler()
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", lambda: scaler)
    autocast = torch.autocast
    # The CPU's autocast in place of the GPU's, with the settings that were asked for.
    monkeypatch.setattr(torch, "autocast", lambda device, **kwargs: autocast("cpu", **kwargs))
    seen: dict[str, torch.dtype] = {}

    class Loss(nn.Module):
        def forward(self, pred: Prediction, target: dict[str, Tensor]) -> Tensor:
            seen.update(student=pred.thin.dtype, teacher=target["teacher"].dtype)
            return pred.thin.float().mean()

    make(student(), Loss(), teacher=teacher(), amp=True, amp_kwargs={"dtype": torch.bfloat16}).run()
    assert seen == {"student": torch.bfloat16, "teacher": torch.bfloat16}
    assert scaler.calls == ["scale", "step", "update"] * BATCHES


def test_the_teacher_has_the_precision_that_the_inferer_gives_the_student():
    seen: dict[str, Any] = {}

    class Loss(nn.Module):
        def forward(self, pred: Prediction, target: dict[str, Tensor]) -> Tensor:
            seen.update(student=pred.thin.dtype, teacher=target["teacher"].dtype)
            seen["rounded"] = torch.equal(target["teacher"].bfloat16().float(), target["teacher"])
            return pred.thin.float().mean()

    for amp in ("float32", "bfloat16"):
        make(student(), Loss(), teacher=teacher(), inferer=MixedPrecisionInferer(amp)).run()
        # The loss has float32 from both; what it was rounded to before shows.
        assert seen == {"student": torch.float32, "teacher": torch.float32, "rounded": amp == "bfloat16"}
