from __future__ import annotations

import pytest
import torch
from medsr.errors import WeightsError
from medsr.networks.checkpoints import load_checkpoint, read_state, rename_tensors

WEIGHT, BIAS = torch.ones(2, 3), torch.zeros(2)
NAMES = {"w": "conv.weight", "b": "conv.bias"}
TARGETS = {"conv.weight": WEIGHT, "conv.bias": BIAS}


@pytest.mark.parametrize("holder", [None, "params_ema", "params", "state_dict", "model"])
def test_a_state_dict_is_found_where_training_code_keeps_it(tmp_path, holder):
    state = {"module.w": WEIGHT, "b": BIAS}
    torch.save(state if holder is None else {holder: state, "epoch": 3}, tmp_path / "a.pth")
    found = load_checkpoint(tmp_path / "a.pth", kind="it")
    assert list(found) == ["w", "b"]
    assert torch.equal(found["w"], WEIGHT)


@pytest.mark.parametrize(
    ("content", "message"),
    [([1, 2], "no state dict"), ({"w": WEIGHT, "epoch": 3}, "'epoch' is no tensor: not it")],
)
def test_what_is_no_state_dict_is_named(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=f"^a.pth: .*{message}"):
        load_checkpoint(tmp_path / "a.pth", kind="it")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"w": WEIGHT, "c": BIAS}, "unexpected tensor 'c': not it"),
        ({"w": WEIGHT, "b": WEIGHT}, r"'b' has shape \(2, 3\), expected \(2,\)"),
        ({"b": BIAS}, "1 tensors are missing, the first is 'w'"),
    ],
)
def test_every_tensor_must_have_its_place(tmp_path, state, message):
    with pytest.raises(WeightsError, match=message):
        rename_tensors(state, NAMES, TARGETS, file=tmp_path / "a.pth", kind="it")


def test_tensors_take_our_names_and_types(tmp_path):
    found = rename_tensors(
        {"w": WEIGHT.half(), "b": BIAS}, NAMES, TARGETS, file=tmp_path / "a.pth", kind="it"
    )
    assert list(found) == list(TARGETS)
    assert found["conv.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    "content", [3, None, [torch.zeros(1)], {"weight": 3}, {"model": {"weight": torch.zeros(1)}}]
)
def test_a_file_of_ours_holds_tensors_by_name_and_nothing_else(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=r"^a\.pt: not a plain state dict"):
        read_state(tmp_path / "a.pt")
    torch.save({"weight": torch.ones(2)}, tmp_path / "a.pt")
    assert read_state(tmp_path / "a.pt")["weight"].tolist() == [1, 1]
