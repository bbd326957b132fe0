from __future__ import annotations

import copy
from itertools import count

import pytest
import torch
from medsr.engines.prepare_batch import PrepareThickSlices
from medsr.engines.self_training import PrepareThickPlanes, SelfTraining
from medsr.errors import SettingError
from medsr.networks.slice_sr import SliceSRNet
from medsr.networks.wdsr import PlaneSRNet
from monai.data import MetaTensor
from torch import Tensor, nn


@pytest.fixture(scope="module")
def volume() -> Tensor:
    """Cubes of eight voxels, sharp along all axes: what thick slices hide of them is quickly learnt."""
    index = torch.arange(32) // 8 % 2
    return (index[:, None, None] ^ index[None, :, None] ^ index).float()[None]


def image_of(volume: Tensor, sharp: tuple[int, ...] = (0, 1)) -> MetaTensor:
    return MetaTensor(volume.clone(), meta={"sharp_axes": sharp})


def slices_network() -> SliceSRNet:
    torch.manual_seed(0)
    return SliceSRNet(0.125, branches=4)


def planes_network() -> PlaneSRNet:
    torch.manual_seed(0)
    return PlaneSRNet(4.0, channels=16, blocks=2)


def trained(
    network: nn.Module, volume: Tensor, iterations: int, *, planes: bool = False, **settings
) -> tuple[nn.Module, SelfTraining]:
    training = SelfTraining(
        None,
        iterations,
        **{
            "learning_rate": 5e-3,
            "batch_size": 2,
            "block_size": (16, 16),
            "average_momentum": 0.2,
            "noise": 0,
            **settings,
        },
    )
    found = training(network, image_of(volume), ratio=4.0, thickness=1.0, profile="box", planes=planes)
    return found, training


def loss_of(network: nn.Module, volume: Tensor, *, planes: bool) -> float:
    """L1 on slices that are acquired along the second axis, which the training may draw but has not seen whole."""
    sharp = volume.permute(0, 3, 1, 2)[None]
    inputs, target = sharp.unflatten(-1, (8, 4)).mean(-1), sharp
    if planes:
        inputs, target = (x[0, 0].permute(1, 0, 2)[:, None] for x in (inputs, target))
    with torch.inference_mode():
        found = network.eval()(inputs, scale=4.0, thickness=1.0)
    return float((found[:, :1] - target).abs().mean())


@pytest.mark.parametrize("planes", [False, True], ids=["slices", "planes"])
def test_a_few_iterations_reduce_the_loss(volume, planes):
    network = planes_network() if planes else slices_network()
    before = loss_of(network, volume, planes=planes)
    found, training = trained(network, volume, 20, planes=planes)
    assert loss_of(found, volume, planes=planes) < 0.8 * before
    assert training.done["iterations"] == 20
    assert not found.training


@pytest.mark.parametrize("planes", [False, True], ids=["slices", "planes"])
def test_the_network_it_starts_from_is_not_changed(volume, planes):
    network = planes_network() if planes else slices_network()
    before = copy.deepcopy(network.state_dict())
    found, _ = trained(network, volume, 2, planes=planes)
    after = network.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert any(not torch.equal(found.state_dict()[key], before[key]) for key in before)


def test_the_uncertainty_head_is_taught_as_well(volume):
    torch.manual_seed(0)
    network = SliceSRNet(0.125, head="uncertainty", branches=4)
    found, _ = trained(network, volume, 2)
    assert not torch.equal(found.log_uncertainty.weight, network.log_uncertainty.weight)


def test_one_seed_gives_one_network(volume):
    first, again, other = (trained(slices_network(), volume, 3, seed=s)[0].state_dict() for s in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_a_budget_of_minutes_ends_the_training(volume, monkeypatch):
    # Every look at the clock takes three seconds.
    clock = iter(range(0, 1_000_000, 3))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    training = SelfTraining(0.5, batch_size=1, block_size=(16, 16))
    training(slices_network(), image_of(volume), ratio=4.0, thickness=1.0, profile="box")
    assert 1 <= training.done["iterations"] < 12
    assert training.done["minutes"] >= 0.5
    assert training.warnings == []


def test_iterations_make_a_run_that_can_be_repeated_whatever_the_clock_says(volume, monkeypatch):
    found = []
    for seconds in (0.1, 9):
        clock = count(0, seconds)
        monkeypatch.setattr("time.monotonic", lambda clock=clock: float(next(clock)))
        training = SelfTraining(10, 3, batch_size=1, block_size=(16, 16))
        network = training(slices_network(), image_of(volume), ratio=4.0, thickness=1.0, profile="box")
        assert training.done["iterations"] == 3
        assert training.warnings == []
        found.append(network.state_dict())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_minutes_are_a_cap_on_iterations(volume, monkeypatch):
    clock = count(0, 10)
    monkeypatch.setattr("time.time", lambda: float(next(clock)))
    training = SelfTraining(0.25, 500, batch_size=1, block_size=(16, 16))
    training(slices_network(), image_of(volume), ratio=4.0, thickness=1.0, profile="box")
    done = training.done["iterations"]
    assert 1 <= done < 20
    assert training.warnings == [f"training stopped after 0.25 minutes: {done} of 500 iterations"]


@pytest.mark.parametrize("iterations", [0, 1.5, "many"])
def test_iterations_are_a_whole_number(iterations):
    with pytest.raises(SettingError, match="iterations must be a whole number >= 1"):
        SelfTraining(4.0, iterations)


def test_a_training_without_an_end_is_refused(volume):
    with pytest.raises(SettingError, match="give minutes, iterations, or both"):
        SelfTraining(None)(PlaneSRNet(), volume, ratio=4.0, thickness=1.0, planes=True)


def test_the_random_state_of_the_caller_stays(volume):
    network = slices_network()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    trained(network, volume, 1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("ratio", [1.5, 8.0])
def test_blocks_are_long_enough_for_any_ratio(volume, ratio):
    training = SelfTraining(None, 1, batch_size=1, block_size=(16, 16))
    training(slices_network(), image_of(volume), ratio=ratio, thickness=0.7)
    assert training.done["iterations"] == 1


@pytest.mark.parametrize("amp", ["float32", "bfloat16"])
def test_the_precision_is_the_one_that_was_asked_for_and_told(amp, volume):
    training = SelfTraining(None, 1, batch_size=1, block_size=(16, 16), amp=amp)
    network = slices_network()
    seen = []
    network.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    training(network, image_of(volume), ratio=4.0, thickness=1.0)
    assert seen == [amp == "bfloat16"]
    assert training.done["convolutions"] == amp
    with pytest.raises(SettingError, match="amp must be one of"):
        SelfTraining(amp="half")


def test_the_scan_is_not_changed(volume):
    image = MetaTensor(volume.clone())
    training = SelfTraining(None, 1, batch_size=1, block_size=(16, 16))
    training(slices_network(), image, ratio=4.0, thickness=1.0)
    assert "sharp_axes" not in image.meta


def test_planes_of_a_block_become_the_batch():
    prepare = PrepareThickPlanes(ratio=(4, 4), noise=0, gamma=(1, 1), profiles={"box": 1.0})
    block = torch.rand(2, 1, 8, 3, 64)
    inputs, targets, args, facts = prepare({"image": block})
    assert inputs.shape == (6, 1, 8, 12)
    assert targets.shape == (6, 1, 8, 48)
    assert args == ()
    assert facts == {"scale": 4.0, "thickness": pytest.approx(facts["thickness"])}
    # The same seed draws the same thickness for whole blocks: plane k of block b is item 3 b + k.
    slices, fine, _, _ = PrepareThickSlices(ratio=(4, 4), noise=0, gamma=(1, 1), profiles={"box": 1.0})(
        {"image": block}
    )
    for sample, plane in ((0, 0), (1, 2)):
        assert torch.equal(inputs[3 * sample + plane, 0], slices[sample, 0, :, plane])
        assert torch.equal(targets[3 * sample + plane, 0], fine[sample, 0, :, plane])
