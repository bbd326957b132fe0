from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from medsr.engines.weight_files import check_weights, compared_weights, load_weights, named_networks
from medsr.errors import SettingError, WeightsError
from medsr.handlers.training import save_weights
from torch import nn


def network(width: int = 3) -> nn.Module:
    return nn.Linear(2, width)


@pytest.fixture
def refused(failure: Callable[..., tuple[int, str]]) -> Callable[..., str]:
    """The line with which weights are refused."""

    def line_of(path: Path, net: nn.Module | None = None) -> str:
        code, line = failure(check_weights, path, net or network())
        assert code == WeightsError.exit_code
        assert str(path.parent) not in line
        return line

    return line_of


def flip(path: Path) -> None:
    """Change one bit of a weight, far from all headers."""
    content = bytearray(path.read_bytes())
    values = network().state_dict()
    place = content.find(torch.load(path, weights_only=True)["bias"].numpy().tobytes())
    assert place > 0
    assert values
    content[place] ^= 1
    path.write_bytes(bytes(content))


def test_good_weights_are_loaded(weights):
    net = network()
    assert load_weights(weights, net) is net
    saved = torch.load(weights, weights_only=True)
    assert all(torch.equal(net.state_dict()[key], saved[key]) for key in saved)


def test_one_flipped_bit_in_a_bundle_is_noticed(weights, refused):
    flip(weights)
    # PyTorch loads it without a complaint.
    torch.load(weights, weights_only=True)
    assert "not the listed file (SHA-256" in refused(weights)


@pytest.mark.parametrize("place", ["models/variant", "runs/plain"])
def test_one_flipped_bit_elsewhere_is_noticed_too(tmp_path, place, refused):
    path = tmp_path / "bundle" / place / "model.pt"
    path.parent.mkdir(parents=True)
    save_weights(network().state_dict(), path)
    flip(path)
    refused(path)


def test_weights_without_a_list_of_digests_are_accepted(tmp_path):
    torch.save(network().state_dict(), tmp_path / "own.pt")
    check_weights(tmp_path / "own.pt", network())


class Told(nn.Linear):
    """Says what it was trained for."""

    told_tensors = ("trained_scale",)

    def __init__(self, scale: int) -> None:
        super().__init__(2, 3)
        self.register_buffer("trained_scale", torch.tensor(scale))


def test_weights_that_tell_another_scale_are_refused(tmp_path, refused):
    torch.save(Told(4).state_dict(), tmp_path / "own.pt")
    check_weights(tmp_path / "own.pt", Told(4))
    assert "own.pt: trained for scale 4, and this network has 2; give" in refused(
        tmp_path / "own.pt", Told(2)
    )


def test_weights_that_do_not_tell_are_taken_at_the_word_of_the_settings(tmp_path, caplog):
    torch.save(nn.Linear(2, 3).state_dict(), tmp_path / "own.pt")
    net = load_weights(tmp_path / "own.pt", Told(2))
    assert net.trained_scale == 2
    assert "own.pt does not tell its scale: taken for 2" in caplog.text


def test_no_weight_file_says_what_to_set(failure):
    code, line = failure(check_weights, "", network())
    assert code == WeightsError.exit_code
    assert "--weights" in line


def test_a_weight_file_that_is_missing(tmp_path, refused):
    assert "model.pt: no such weight file; give the path" in refused(tmp_path / "model.pt")
    (tmp_path / "models").mkdir()
    assert "models: a folder, no weight file; give the path" in refused(tmp_path / "models")


@pytest.mark.parametrize("content", [b"", b"not weights", None])
def test_a_damaged_weight_file(tmp_path, content, refused):
    path = tmp_path / "model.pt"
    save_weights(network().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-300] if content is None else content)
    (tmp_path / "SHA256SUMS").unlink()
    assert "model.pt: damaged or not plain weights" in refused(path)


def test_a_whole_pickled_network_is_not_loaded(tmp_path, refused):
    torch.save(network(), tmp_path / "model.pt")
    assert "damaged or not plain weights" in refused(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"weight": torch.zeros(3, 2)},
        {"weight": torch.zeros(3, 2), "bias": torch.zeros(3), "more": torch.zeros(1)},
    ],
)
def test_weights_of_another_network(tmp_path, content, refused):
    torch.save(content, tmp_path / "model.pt")
    assert "model.pt: made for another network" in refused(tmp_path / "model.pt")


@pytest.mark.parametrize("content", [[1], {"model": {"weight": torch.zeros(3, 2)}}])
def test_what_is_no_state_dict(tmp_path, content, refused):
    torch.save(content, tmp_path / "model.pt")
    assert "model.pt: not a plain state dict" in refused(tmp_path / "model.pt")


def test_weights_of_another_width_name_the_tensor(weights, refused):
    line = refused(weights, network(4))
    assert "'weight' has shape (3, 2), this network needs (4, 2)" in line


def test_refused_weights_leave_the_network_alone(weights, failure):
    net = network()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    flip(weights)
    failure(load_weights, weights, net)
    assert all(torch.equal(net.state_dict()[key], before[key]) for key in before)


def test_named_networks_are_copies_with_weights_of_their_own(tmp_path):
    torch.manual_seed(0)
    original = network()
    for name in ("first", "second"):
        save_weights(network().state_dict(), tmp_path / f"{name}.pt")
    found = named_networks(original, {name: tmp_path / f"{name}.pt" for name in ("first", "second")})
    weights = [n.weight for n in (original, *found.values())]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_a_network_does_not_take_the_name_of_a_method(failure):
    code, line = failure(named_networks, nn.Linear(1, 1), {"bicubic": "model.pt"})
    assert code == SettingError.exit_code
    assert "'bicubic' is the name of what networks are compared with" in line
    _, line = failure(compared_weights, "model.pt", {"network": "other.pt"})
    assert "compare: 'network' is the name of weights" in line
