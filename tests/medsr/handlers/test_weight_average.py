from __future__ import annotations

import pytest
import torch
from ignite.engine import Engine, Events
from medsr.errors import SettingError
from medsr.handlers.weight_average import WeightAverage
from torch import nn


def train(iterations: int, momentum: float, *, buffers: str = "copy") -> tuple[nn.Module, list[float]]:
    """A weight and a statistic that are the number of the iteration, from a start far away; the momenta used."""
    network = nn.BatchNorm1d(1)
    network.weight.data.fill_(-1e6)
    network.running_mean.fill_(-1e6)
    used = []

    def step(engine: Engine, _: object) -> None:
        network.weight.data.fill_(engine.state.iteration)
        network.running_mean.fill_(engine.state.iteration)

    engine = Engine(step)
    average = WeightAverage(network, momentum, handle_buffers=buffers)
    average.attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: used.append(engine.state.ema_momentum))
    engine.run(range(iterations))
    return average.ema_model, used


@pytest.mark.parametrize("iterations", [1, 30, 300, 3000])
def test_nothing_of_the_start_is_left(iterations):
    network, _ = train(iterations, 0.002)
    lag = iterations - float(network.weight)
    # The mean age of what a polynomial-decay average holds is one eleventh of its length.
    assert 0 <= lag <= iterations / 10


def test_a_long_training_is_averaged_as_asked():
    network, used = train(4000, 0.02)
    assert used[-1] == 0.02
    assert used == sorted(used, reverse=True)
    assert 4000 - float(network.weight) == pytest.approx(1 / 0.02 - 1, rel=1e-3)


def test_statistics_are_averaged_when_asked():
    average, _ = train(50, 0.1, buffers="update")
    assert float(average.running_mean) == pytest.approx(float(average.weight))
    newest, _ = train(50, 0.1)
    assert float(newest.running_mean) == 50


def test_the_momentum_follows_from_the_iteration_alone():
    average = WeightAverage(nn.Linear(1, 1), 0.05)
    engine = Engine(lambda engine, batch: None)
    average.attach(engine)
    engine.load_state_dict({"iteration": 40, "max_epochs": 1, "epoch_length": 41})
    engine.run(range(41))
    assert engine.state.ema_momentum == average.momentum_at(41)


def test_the_network_itself_is_not_touched():
    network = nn.Linear(2, 2)
    before = network.weight.clone()
    average = WeightAverage(network)
    engine = Engine(lambda engine, batch: None)
    average.attach(engine)
    engine.run(range(3))
    torch.testing.assert_close(network.weight, before, rtol=0, atol=0)
    assert average.ema_model is not network


@pytest.mark.parametrize("momentum", [0, 1, 2, -0.1, "half"])
def test_a_momentum_out_of_range_is_named(momentum):
    with pytest.raises(SettingError, match="average_momentum"):
        WeightAverage(nn.Linear(1, 1), momentum)
