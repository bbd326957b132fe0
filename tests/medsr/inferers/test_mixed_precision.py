from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from medsr.errors import SettingError
from medsr.inferers import mixed_precision
from medsr.inferers.mixed_precision import MixedPrecisionInferer
from torch import Tensor, nn


class Parts(NamedTuple):
    features: list[Tensor]
    labels: Tensor


class Network(nn.Module):
    def __init__(self, *, safe: bool) -> None:
        super().__init__()
        self.half_precision_safe = safe
        self.inner = nn.Linear(4, 4)
        self.seen: list[torch.dtype] = []

    def forward(self, image: Tensor, *, apart: bool = False) -> Tensor | Parts:
        found = self.inner(image)
        self.seen.append(found.dtype)
        return Parts([found], found.argmax(1)) if apart else found


@pytest.fixture(params=[True, False])
def native(request, monkeypatch) -> bool:
    monkeypatch.setattr(mixed_precision, "native_bfloat16", lambda device: request.param)
    return request.param


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("amp", ["auto", "float32", "bfloat16"])
def test_bfloat16_is_used_where_asked_for_or_native_and_safe(amp, safe, native):
    network, infer = Network(safe=safe), MixedPrecisionInferer(amp)
    found = infer(torch.rand(2, 4), network)
    reduced = amp == "bfloat16" or (amp == "auto" and safe and native)
    wanted = torch.bfloat16 if reduced else torch.float32
    assert network.seen == [wanted]
    assert infer.used_dtype == wanted
    # The loss, its gradients and the weights are in float32 all the same.
    found.square().mean().backward()
    assert found.dtype == network.inner.weight.grad.dtype == torch.float32


def test_a_network_that_says_nothing_stays_in_float32(native):
    infer = MixedPrecisionInferer()
    assert infer(torch.rand(1, 4), nn.Linear(4, 2)).dtype == infer.used_dtype == torch.float32


@pytest.mark.parametrize(("amp", "seen"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_the_precision_of_the_trainer_counts_where_nothing_else_is_asked_for(amp, seen):
    infer, network = MixedPrecisionInferer(amp), Network(safe=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        infer(torch.rand(2, 4), network)
    assert network.seen == [seen]
    assert infer.used_dtype == seen


def test_parts_keep_their_type_and_whole_numbers_stay_whole():
    found = MixedPrecisionInferer("bfloat16")(torch.rand(3, 4), Network(safe=True), apart=True)
    assert isinstance(found, Parts)
    assert found.features[0].dtype == torch.float32
    assert found.labels.dtype == torch.int64


def test_training_in_bfloat16_reaches_what_float32_reaches():
    losses = {}
    for amp in ("float32", "bfloat16"):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))
        infer, optimizer = MixedPrecisionInferer(amp), torch.optim.Adam(network.parameters(), 0.01)
        for _ in range(60):
            image = torch.rand(4, 1, 12, 12)
            loss = (infer(image, network) - image.roll(1, -1)).square()[..., 1:].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[amp] = float(loss.detach())
    # A result of zeros has 0.33.
    assert losses["float32"] < 0.02
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.1)


def test_an_unknown_word_is_refused():
    with pytest.raises(SettingError, match="amp must be one of auto, float32, bfloat16, got 'half'"):
        MixedPrecisionInferer("half")
