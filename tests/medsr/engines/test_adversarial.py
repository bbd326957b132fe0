from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from medsr.engines.adversarial import AdversarialSRTrainer
from medsr.errors import MedsrError, SettingError
from medsr.handlers.training import BudgetSchedule, GradientGuard, RunRecord, WeightSaver
from medsr.handlers.weight_average import WeightAverage
from medsr.losses.fusion import FusionLoss
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from torch import Tensor, nn

BATCHES = 4
LOGITS = ("real_logits", "fake_logits")


class Discriminator(nn.Module):
    """Records what it is shown, and under which conditions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 1))
        self.seen: list[dict[str, Any]] = []

    def forward(self, image: Tensor) -> Tensor:
        frozen = not any(parameter.requires_grad for parameter in self.parameters())
        self.seen.append({"image": image.detach().clone(), "frozen": frozen, "graph": image.requires_grad})
        return self.layers(image).mean((2, 3))


class Brightness(nn.Module):
    """Logit proportional to the mean of the image; the sign is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(()))

    def forward(self, image: Tensor) -> Tensor:
        return self.factor * image.mean((2, 3))


def generator() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.PixelShuffle(2))


def discriminator() -> Discriminator:
    torch.manual_seed(1)
    return Discriminator()


def batches(count: int = BATCHES) -> list[dict[str, Tensor]]:
    torch.manual_seed(2)
    return [{"image": torch.rand(2, 1, 6, 6), "label": torch.rand(2, 1, 12, 12)} for _ in range(count)]


def make(network: nn.Module, judge: nn.Module, **settings: Any) -> AdversarialSRTrainer:
    return AdversarialSRTrainer(
        **{
            "device": "cpu",
            "max_epochs": 1,
            "train_data_loader": batches(),
            "network": network,
            "optimizer": torch.optim.Adam(network.parameters(), lr=0.01),
            "loss_function": FusionLoss(feature_weight=0),
            "discriminator": judge,
            "discriminator_optimizer": torch.optim.Adam(judge.parameters(), lr=0.01),
            **settings,
        }
    )


def weights(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def test_the_discriminator_is_untouched_in_the_warm_up_and_both_move_after():
    network, judge = generator(), discriminator()
    trainer = make(network, judge, warm_up=2)
    start, states, terms = (weights(network), weights(judge)), [], []

    def look(engine: Any) -> None:
        states.append((weights(network), weights(judge)))
        terms.append(dict(trainer.loss_function.last_terms))

    trainer.add_event_handler(Events.ITERATION_COMPLETED, look)
    trainer.run()
    moved = [(bool(changed(network, start[0])), bool(changed(judge, start[1])))]
    before = start
    for state in states:
        moved.append(
            tuple(
                any(not torch.equal(new[k], old[k]) for k in new)
                for new, old in zip(state, before, strict=True)
            )
        )
        before = state
    assert moved == [(True, True), (True, False), (True, False), (True, True), (True, True)]
    assert [set(one) for one in terms] == [{"l1", "mse"}] * 2 + [
        {"l1", "mse", "adversarial", "discriminator"}
    ] * 2
    # It was not even asked: of two iterations, four images each.
    assert len(judge.seen) == 2 * 4


def test_in_the_warm_up_the_step_is_that_of_monai():
    networks = [generator(), generator()]
    make(networks[0], discriminator(), warm_up=BATCHES).run()
    SupervisedTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=batches(),
        network=networks[1],
        optimizer=torch.optim.Adam(networks[1].parameters(), lr=0.01),
        loss_function=FusionLoss(feature_weight=0, adversarial_weight=0),
    ).run()
    assert changed(networks[0], networks[1].state_dict()) == set()


def test_both_players_see_target_and_output_and_neither_sees_the_input():
    judge = discriminator().eval()
    make(generator(), judge).run()
    assert judge.training
    for index, batch in enumerate(batches()):
        real, fake, real_again, fake_again = judge.seen[4 * index : 4 * index + 4]
        assert torch.equal(real["image"], batch["label"])
        assert torch.equal(real_again["image"], batch["label"])
        assert torch.equal(fake["image"], fake_again["image"])
        assert fake["image"].shape == batch["label"].shape
        # The generator learns from frozen weights, the discriminator from detached images.
        assert [one["frozen"] for one in (real, fake, real_again, fake_again)] == [True, True, False, False]
        assert [one["graph"] for one in (real, fake, real_again, fake_again)] == [False, True, False, False]


@pytest.mark.parametrize(("target", "sign"), [(0.9, 1), (0.1, -1)])
def test_the_target_is_what_the_discriminator_calls_real(target, sign):
    # The input lies on the other side of the output: taken for real, it would turn the sign.
    batch = {"image": torch.full((2, 1, 6, 6), 1 - target), "label": torch.full((2, 1, 12, 12), target)}
    network, judge = nn.Sequential(generator(), nn.Conv2d(1, 1, 1)), Brightness()
    nn.init.zeros_(network[1].weight)
    nn.init.constant_(network[1].bias, 0.5)
    loss = FusionLoss(feature_weight=0)
    trainer = make(
        network,
        judge,
        train_data_loader=[batch] * 20,
        loss_function=loss,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.0),
        discriminator_optimizer=torch.optim.SGD(judge.parameters(), lr=1.0),
    )
    history: list[float] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda _: history.append(loss.last_terms["discriminator"])
    )
    trainer.run()
    assert judge.factor.item() * sign > 0.5
    assert history[-1] < history[0]


def test_the_generator_follows_the_discriminator():
    judge = Brightness()
    nn.init.constant_(judge.factor, 10.0)
    network = generator()
    gray = {"image": torch.full((2, 1, 6, 6), 0.5), "label": torch.full((2, 1, 12, 12), 0.5)}
    loss = FusionLoss(feature_weight=0, l1_weight=0, mse_weight=1e-6, adversarial_weight=1.0)
    trainer = make(
        network,
        judge,
        loss_function=loss,
        train_data_loader=[gray] * 10,
        discriminator_optimizer=torch.optim.SGD(judge.parameters(), lr=0.0),
    )
    before = network(gray["image"]).mean().item()
    trainer.run()
    assert network(gray["image"]).mean().item() > before + 0.1


def test_the_generator_s_step_leaves_no_gradient_in_the_discriminator():
    judge, seen = discriminator(), []
    trainer = make(generator(), judge)
    trainer.add_event_handler(
        IterationEvents.BACKWARD_COMPLETED,
        lambda _: seen.extend(parameter.grad for parameter in judge.parameters()),
    )
    trainer.run()
    assert len(seen) == BATCHES * 4
    assert all(gradient is None for gradient in seen)
    assert all(parameter.requires_grad for parameter in judge.parameters())


def test_weights_that_were_frozen_before_stay_frozen():
    judge = discriminator()
    judge.layers[0].requires_grad_(False)
    before = weights(judge)
    make(generator(), judge).run()
    assert not judge.layers[0].weight.requires_grad
    assert changed(judge, before).isdisjoint({"layers.0.weight", "layers.0.bias"})
    assert "layers.2.weight" in changed(judge, before)


def test_a_bad_gradient_moves_neither_player_and_is_counted():
    network, judge = generator(), discriminator()
    spoilt = batches(3)
    spoilt[1]["label"][0, 0, 0, 0] = torch.nan
    trainer = make(network, judge, train_data_loader=spoilt)
    guard = GradientGuard(network)
    guard.attach(trainer)
    states: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda _: states.append((weights(network), weights(judge)))
    )
    trainer.run()
    assert (guard.skipped, trainer.discriminator_guard.skipped) == (1, 1)
    for first, second, third in zip(*states, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert any(not torch.equal(second[name], third[name]) for name in first)


def test_a_discriminator_that_never_recovers_stops_the_training():
    judge = discriminator()
    nn.init.constant_(judge.layers[2].bias, torch.inf)
    network = generator()
    trainer = make(network, judge, train_data_loader=batches(12))
    GradientGuard(network, patience=100).attach(trainer)
    with pytest.raises(MedsrError, match="10 batches in a row gave no finite gradient"):
        trainer.run()
    # The trainer is whole after the error.
    assert isinstance(trainer.loss_function, FusionLoss)


def test_an_error_in_the_generator_s_step_leaves_the_trainer_whole():
    judge = discriminator()
    trainer = make(
        generator(),
        judge,
        train_data_loader=[{"image": torch.rand(2, 1, 6, 6), "label": torch.rand(2, 1, 6, 6)}],
    )
    with pytest.raises(SettingError, match="check the scale"):
        trainer.run()
    assert isinstance(trainer.loss_function, FusionLoss)
    assert all(parameter.requires_grad for parameter in judge.parameters())


def test_events_and_output_are_those_of_monai():
    fired: list[str] = []
    trainer = make(generator(), discriminator(), decollate=False)
    events = ("FORWARD_COMPLETED", "LOSS_COMPLETED", "BACKWARD_COMPLETED", "MODEL_COMPLETED")
    for name in events:
        trainer.add_event_handler(IterationEvents[name], lambda _, name=name: fired.append(name))
    trainer.run()
    assert fired == list(events) * BATCHES
    output = trainer.state.output
    assert set(output) == {"image", "label", "pred", "loss"}
    terms = dict(trainer.loss_function.last_terms)
    del terms["discriminator"]
    assert output["loss"].item() == pytest.approx(sum(terms.values()))


def test_the_handlers_of_a_run_work(tmp_path):
    network, judge = generator(), discriminator()
    trainer = make(network, judge, warm_up=1)
    average = WeightAverage(network, momentum=0.5)
    average.attach(trainer, event=Events.ITERATION_COMPLETED)
    record = RunRecord(
        tmp_path / "record.json", trainer.loss_function.describe(), trainer.loss_function, every=1
    )
    handlers = (
        GradientGuard(network),
        BudgetSchedule(trainer.optimizer, 0.01, BATCHES),
        BudgetSchedule(trainer.discriminator_optimizer, 0.02, BATCHES),
        WeightSaver(average.ema_model, tmp_path / "model.pt"),
        record,
    )
    for handler in handlers:
        handler.attach(trainer)
    expected = weights(network)

    @trainer.on(Events.ITERATION_COMPLETED)
    def follow(engine: Engine) -> None:
        momentum = average.momentum_at(engine.state.iteration)
        for name, value in network.state_dict().items():
            expected[name].mul_(1 - momentum).add_(value, alpha=momentum)

    trainer.run()
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert set(saved) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(saved[name], value)
    written = json.loads((tmp_path / "record.json").read_text())
    assert "discriminator" not in written["history"][0]
    assert {"l1", "mse", "adversarial", "discriminator"} <= set(written["history"][1])
    assert written["settings"]["perceptual"] == "none"
    assert trainer.discriminator_optimizer.param_groups[0]["lr"] != pytest.approx(0.01)


def test_accumulated_steps_are_those_of_the_larger_batch_and_end_with_the_epoch():
    network, judge = generator(), discriminator()
    trainer = make(network, judge, train_data_loader=batches(3), accumulation_steps=2)
    start, moved = weights(judge), []

    @trainer.on(Events.ITERATION_COMPLETED)
    def look(_: Any) -> None:
        moved.append(bool(changed(judge, start)))
        start.update(weights(judge))

    trainer.run()
    assert moved == [False, True, True]


def test_accumulation_averages_the_gradients():
    # Plain descent without clipping: a repeated batch accumulated is that batch once.
    judges = [Brightness(), Brightness()]
    for judge, count in zip(judges, (1, 2), strict=True):
        network = generator()
        make(
            network,
            judge,
            optimizer=torch.optim.SGD(network.parameters(), lr=0.0),
            discriminator_optimizer=torch.optim.SGD(judge.parameters(), lr=1.0),
            train_data_loader=batches(1) * count,
            accumulation_steps=count,
        ).run()
    assert judges[0].factor.item() != 0
    assert judges[1].factor.item() == pytest.approx(judges[0].factor.item())


def test_an_epoch_of_unknown_length_is_stepped_through():
    judge = discriminator()
    before = weights(judge)

    class Stream:
        def __iter__(self):
            return iter(batches())

    make(generator(), judge, train_data_loader=Stream()).run()
    assert changed(judge, before)


class Scaler:
    """Stands in for the gradient scaler, which needs a GPU."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def scale(self, loss: Tensor) -> Tensor:
        self.log.append(f"{self.name} scale")
        return loss * 4

    def is_enabled(self) -> bool:
        return True

    def get_scale(self) -> float:
        return 4.0

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.log.append(f"{self.name} step")
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad /= 4
        optimizer.step()

    def update(self) -> None:
        self.log.append(f"{self.name} update")


def test_mixed_precision_holds_for_both_networks(monkeypatch):
    log: list[str] = []
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", lambda: Scaler(log, "generator"))
    autocast, dtypes = torch.autocast, []
    # The CPU's autocast in place of the GPU's, with the settings that were asked for.
    monkeypatch.setattr(torch, "autocast", lambda device, **kwargs: autocast("cpu", **kwargs))
    judge = discriminator()
    judge.layers.register_forward_hook(lambda _module, _inputs, output: dtypes.append(output.dtype))
    trainer = make(
        generator(), judge, amp=True, amp_kwargs={"dtype": torch.bfloat16}, train_data_loader=batches(1)
    )
    trainer.discriminator_scaler = Scaler(log, "discriminator")
    trainer.run()
    assert dtypes == [torch.bfloat16] * 4
    assert log == [
        f"{who} {what}" for who in ("generator", "discriminator") for what in ("scale", "step", "update")
    ]


def test_the_discriminator_s_scaler_survives_a_bad_batch():
    spoilt = batches(2)
    spoilt[0]["label"][0, 0, 0, 0] = torch.nan
    network, judge = generator(), discriminator()
    trainer = make(network, judge, train_data_loader=spoilt)
    GradientGuard(network).attach(trainer)
    trainer.discriminator_scaler = torch.amp.GradScaler("cpu")
    before, scale = weights(judge), trainer.discriminator_scaler.get_scale()
    trainer.run()
    assert trainer.discriminator_guard.skipped == 1
    assert trainer.discriminator_scaler.get_scale() == scale / 2
    assert changed(judge, before)
    assert all(torch.isfinite(value).all() for value in judge.state_dict().values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warm_up": -1}, "warm_up is a number of iterations"),
        ({"loss_function": nn.L1Loss()}, "the loss has no adversarial term"),
        ({"loss_function": FusionLoss(feature_weight=0, adversarial_weight=0)}, "no adversarial term"),
    ],
)
def test_settings_that_do_not_fit_are_explained(settings, message):
    with pytest.raises(SettingError, match=message):
        make(generator(), discriminator(), **settings)
