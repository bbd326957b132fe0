from __future__ import annotations

import contextlib
import logging
from typing import Any

import pytest
import torch
from medsr.errors import SettingError
from medsr.inferers import precision
from medsr.inferers.precision import (
    PRECISIONS,
    Example,
    choose_planes,
    choose_precision,
    native_bfloat16,
)
from torch import Tensor, nn


def faithful(window: Tensor) -> Tensor:
    """Rounds as bfloat16 does where autocast is on."""
    if torch.is_autocast_enabled("cpu"):
        return window.to(torch.get_autocast_dtype("cpu"))
    return window


def broken(window: Tensor) -> Tensor:
    return window + 1 if torch.is_autocast_enabled("cpu") else window


def not_finite(window: Tensor) -> Tensor:
    return window * float("nan") if torch.is_autocast_enabled("cpu") else window


def forbidden(window: Tensor) -> Tensor:
    raise AssertionError("no trial is needed")


@pytest.fixture
def window() -> Tensor:
    return torch.rand(1, 1, 8, 8, 4)


@pytest.fixture(params=[True, False])
def native(request, monkeypatch) -> bool:
    monkeypatch.setattr(precision, "native_bfloat16", lambda device: request.param)
    return request.param


def test_auto_takes_bfloat16_only_where_it_is_native(native, window):
    expected = torch.bfloat16 if native else torch.float32
    assert choose_precision("auto", faithful if native else forbidden, window) == expected


def test_float32_needs_no_trial(native, window):
    assert choose_precision("float32", forbidden, window) == torch.float32


def test_bfloat16_on_request_even_if_emulated(native, window):
    assert choose_precision("bfloat16", faithful, window) == torch.bfloat16


@pytest.mark.parametrize("run", [broken, not_finite])
@pytest.mark.parametrize("wanted", ["auto", "bfloat16"])
def test_a_device_that_computes_wrongly_gets_float32_and_a_warning(run, wanted, window, monkeypatch, caplog):
    monkeypatch.setattr(precision, "native_bfloat16", lambda device: True)
    with caplog.at_level(logging.WARNING):
        assert choose_precision(wanted, run, window) == torch.float32
    assert "bfloat16 differs from float32" in caplog.text


def test_the_tolerance_is_relative_to_the_spread(window):
    def slightly(x: Tensor) -> Tensor:
        return x + 0.02 * x.std() if torch.is_autocast_enabled("cpu") else x

    for size in (1e-3, 1.0, 1e3):
        assert choose_precision("bfloat16", slightly, window * size, tolerance=0.03) == torch.bfloat16
        assert choose_precision("bfloat16", slightly, window * size, tolerance=0.01) == torch.float32


def test_autocast_is_off_afterwards(window):
    choose_precision("bfloat16", faithful, window)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("word", ["half", "", "fp32", "BFLOAT16"])
def test_an_unknown_word_is_named_with_the_known_ones(word, window):
    with pytest.raises(SettingError, match=f"got '{word}'") as error:
        choose_precision(word, forbidden, window)
    assert all(known in str(error.value) for known in PRECISIONS)


@pytest.mark.parametrize("capability", ["avx512_bf16", "amx_bf16", "arm_bf16", None])
@pytest.mark.parametrize("speed_up", [0.5, 2.0])
def test_a_processor_is_asked_what_it_can_and_whether_that_is_fast(capability, speed_up, monkeypatch):
    found = {} if capability is None else {capability: True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    monkeypatch.setattr(precision, "_speed_up_of_bfloat16", lambda: speed_up)
    assert native_bfloat16("cpu") == (capability is not None and speed_up > 1)


def test_the_trial_of_speed_leaves_the_random_state_and_the_precision_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert precision._speed_up_of_bfloat16.__wrapped__() > 0
    assert torch.equal(torch.rand(2), expected)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(("device", "native"), [("cuda:0", False), ("cuda:1", True)])
def test_of_a_gpu_only_its_own_hardware_counts(device, native, monkeypatch):
    entered = []

    @contextlib.contextmanager
    def current(wanted):
        entered.append(torch.device(wanted).index)
        yield
        entered.pop()

    def supported(including_emulation: bool = True) -> bool:
        return including_emulation or entered == [1]

    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert native_bfloat16(device) is native
    assert native_bfloat16(torch.device(device)) is native


def test_unknown_devices_count_as_not_native():
    assert not native_bfloat16("meta")


# --- planes in 8 bit integers ------------------------------------------------------------------------------------


def test_labels_do_not_hide_what_eight_bits_do_to_the_image(monkeypatch):
    monkeypatch.setattr(precision, "native_int8", lambda device: True)
    monkeypatch.setattr(precision, "_speed_up_of_int8", lambda other: 3.0)
    planes = torch.rand(4, 2, 9, 5) * torch.tensor([1.0, 100.0]).view(2, 1, 1)

    class Prior(nn.Module):
        def __init__(self, error: float) -> None:
            super().__init__()
            self.error = torch.tensor([error, 0.0]).view(2, 1, 1)

        def forward(self, planes: Tensor, scale: float, thickness: float) -> Tensor:
            return planes

        def in_int8(self, examples: list[Example]) -> Any:
            return lambda planes, *_: planes + self.error

    for error, chosen in ((0.001, True), (0.1, False)):
        prior, example = Prior(error), [(planes, 2.0, 1.0)]
        assert (choose_planes(prior, example, example) is not prior) == chosen


class Shifted(nn.Module):
    """A prior whose 8 bits are off by some share of the spread."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share, self.fast = share, None

    def forward(self, planes: Tensor, scale: float, thickness: float) -> Tensor:
        return planes

    def in_int8(self, examples: list[Example]) -> nn.Module:
        assert len(examples) == 1
        if self.share != self.share:
            raise ValueError("features are not finite")

        def fast(planes: Tensor, scale: float, thickness: float) -> Tensor:
            return planes + self.share * planes.std()

        self.fast = fast
        return fast


@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16])
def test_eight_bits_have_to_be_faster_than_what_would_run_otherwise(other, monkeypatch):
    monkeypatch.setattr(precision, "native_int8", lambda device: True)
    monkeypatch.setattr(precision, "_speed_up_of_int8", lambda dtype: 2.0 if dtype == torch.float32 else 1.1)
    prior, example = Shifted(0.001), [(torch.rand(4, 1, 9, 5), 2.0, 1.0)]
    assert (choose_planes(prior, example, example, other=other) is not prior) == (other == torch.float32)


@pytest.mark.parametrize(
    ("native", "speed_up", "share", "chosen"),
    [
        (True, 3.0, 0.001, True),
        (False, 3.0, 0.001, False),
        (True, 1.1, 0.001, False),
        (True, 3.0, 0.02, False),
        (True, 3.0, float("nan"), False),
        (True, 3.0, float("inf"), False),
    ],
)
def test_eight_bits_only_where_they_are_native_fast_and_the_same(
    native, speed_up, share, chosen, monkeypatch, caplog
):
    monkeypatch.setattr(precision, "native_int8", lambda device: native)
    monkeypatch.setattr(precision, "_speed_up_of_int8", lambda other: speed_up)
    prior, planes = Shifted(share), torch.rand(4, 1, 9, 5)
    examples = [(planes, 2.0, 1.0)]
    with caplog.at_level(logging.INFO):
        found = choose_planes(prior, examples, [(planes, 2.0, 1.0), (planes[:2], 2.0, 1.0)])
    assert (found is prior.fast) == chosen
    assert (found is prior) != chosen
    differs = native and speed_up > 1.2 and share > 0.01
    assert ("planes in 8 bits differ" in caplog.text) == differs
