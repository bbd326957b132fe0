from __future__ import annotations

import pytest
import torch
from ignite.engine import Engine, Events
from medsr.errors import SettingError
from medsr.handlers.recycling import RecycleDormantUnits
from medsr.handlers.weight_average import WeightAverage
from medsr.networks.plane_prior import PlanePrior
from medsr.networks.se_gan import SEGenerator
from medsr.networks.vdsr import VDSR
from torch import Tensor, nn


def block(dormant: int = 3, *, dimensions: int = 2) -> nn.Sequential:
    """Eight hidden channels, some of them so far below zero that nothing wakes them."""
    torch.manual_seed(0)
    kind = nn.Conv2d if dimensions == 2 else nn.Conv3d
    network = nn.Sequential(kind(1, 8, 3, padding=1), nn.ReLU(inplace=True), kind(8, 1, 3, padding=1))
    with torch.no_grad():
        network[0].bias[:dormant] = -100
    return network


def images(*, dimensions: int = 2) -> Tensor:
    return torch.randn(2, 1, *[6] * dimensions, generator=torch.Generator().manual_seed(1))


def train(network: nn.Module, handler: RecycleDormantUnits, *, iterations: int, step=None, data=None) -> None:
    def process(_: Engine, batch: Tensor) -> None:
        loss = network(batch).square().mean()
        if step is not None:
            step.zero_grad()
            loss.backward()
            step.step()

    engine = Engine(process)
    handler.attach(engine)
    engine.run([images() if data is None else data] * iterations, max_epochs=1)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_dormant_channels_start_anew_and_the_result_stays(dimensions):
    network, data = block(3, dimensions=dimensions), images(dimensions=dimensions)
    before, kept = network(data), network[0].weight[3:].clone()
    handler = RecycleDormantUnits(network, at=[2])
    train(network, handler, iterations=3, data=data)
    assert handler.recycled == 3
    assert torch.allclose(network(data), before, atol=1e-6)
    assert torch.equal(network[0].weight[3:], kept)
    assert (network[:2](data).amax(dim=(0, *range(2, 2 + dimensions))) > 0).all()
    assert not network[2].weight[:, :3].any()
    # The hooks are gone.
    assert not network[1]._forward_hooks


def test_a_recycled_channel_learns():
    network = block(8)
    step = torch.optim.Adam(network.parameters(), lr=0.01)
    train(network, RecycleDormantUnits(network, at=[1], optimizer=step), iterations=5, step=step)
    assert network[2].weight.abs().amax(dim=(0, 2, 3)).gt(0).all()


def test_a_channel_that_answered_once_since_the_last_time_is_left_alone():
    network = block(0)
    handler = RecycleDormantUnits(network, at=[2, 4])

    def process(engine: Engine, batch: Tensor) -> None:
        with torch.no_grad():
            network[0].bias[0] = 0 if engine.state.iteration == 1 else -100
        network(batch)

    engine = Engine(process)
    handler.attach(engine)
    found = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda _: found.append(handler.recycled))
    engine.run([images()] * 4, max_epochs=1)
    assert found == [0, 0, 0, 1]


def test_the_average_follows_and_the_optimiser_forgets():
    network = block(3)
    step = torch.optim.Adam(network.parameters(), lr=0.01)
    average = WeightAverage(network, momentum=0.1)
    handler = RecycleDormantUnits(network, at=[3], optimizer=step, average=average.ema_model)
    train(network, handler, iterations=3, step=step)
    assert torch.equal(average.ema_model[0].weight[:3], network[0].weight[:3])
    assert not average.ema_model[2].weight[:, :3].any()
    for parameter, where in ((network[0].weight, (slice(3),)), (network[2].weight, (slice(None), slice(3)))):
        state = step.state[parameter]
        assert not state["exp_avg"][where].any()
        assert state["exp_avg_sq"].any()


def test_what_answered_before_an_interruption_counts_after_it():
    def training(network: nn.Sequential) -> tuple[Engine, RecycleDormantUnits]:
        def process(engine: Engine, batch: Tensor) -> None:
            with torch.no_grad():
                network[0].bias[0] = 0 if engine.state.iteration == 1 else -100
            network(batch)

        engine, handler = Engine(process), RecycleDormantUnits(network, at=[3])
        handler.attach(engine)
        return engine, handler

    network = block(3)
    first, interrupted = training(network)
    first.run([images()] * 2, max_epochs=1)
    second, resumed = training(network)
    second.add_event_handler(Events.STARTED, lambda _: resumed.load_state_dict(interrupted.state_dict()))
    second.load_state_dict({"epoch_length": 3, "max_epochs": 1, "iteration": 2, "rng_states": None})
    second.run([images()] * 3, max_epochs=1)
    # The first of the three channels that are silent now answered in the first iteration.
    assert resumed.recycled == 2


def test_frozen_channels_stay():
    network = block(3).requires_grad_(requires_grad=False)
    before = network[0].weight.clone()
    handler = RecycleDormantUnits(network, at=[1])
    train(network, handler, iterations=1)
    assert handler.recycled == 0
    assert torch.equal(network[0].weight, before)


def test_without_a_time_nothing_is_watched():
    network = block(3)
    engine = Engine(lambda *_: network(images()))
    RecycleDormantUnits(network).attach(engine)
    engine.run([0], max_epochs=1)
    assert not network[1]._forward_hooks
    assert (network[0].bias[:3] == -100).all()


@pytest.mark.parametrize(
    ("network", "data", "count"),
    [
        (PlanePrior(channels=4, hidden=[8, 8, 8]), torch.rand(1, 1, 8, 5), 8 * 3),
        (VDSR(layers=5, features=6), torch.rand(1, 3, 4, 4), 6 * 4),
        (SEGenerator(features=4, blocks=3), torch.rand(1, 3, 4, 4), 4 * 3),
    ],
)
def test_the_networks_that_have_such_channels_are_understood(network, data, count):
    # What a hook of an earlier registration returns, later ones see: no channel answers.
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            module.register_forward_hook(lambda _, __, found: -found.abs() - 1)
    handler = RecycleDormantUnits(network, at=[1])
    train(network, handler, iterations=1, data=data)
    assert handler.recycled == count


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(SettingError, match="recycle_at"):
        RecycleDormantUnits(block(), at=[1]).attach(Engine(lambda *_: None))


@pytest.mark.parametrize("at", [[0], [1.5], "soon", None, 100])
def test_times_that_are_none_are_named(at):
    with pytest.raises(SettingError, match="recycle_at"):
        RecycleDormantUnits(block(), at=at)
