from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from medsr.handlers.training import save_weights
from medsr.io.writing import write_nifti
from medsr.networks.plane_fusion import JoinedPlanes
from medsr.networks.plane_prior import HIDDEN, PlanePrior
from medsr.phantoms import head
from monai.bundle import ConfigParser

from tools import prune_planes

WIDE = [64] * len(HIDDEN)


@pytest.mark.parametrize(
    ("wide", "small"),
    [
        (PlanePrior(hidden=WIDE), PlanePrior()),
        (JoinedPlanes(channels=4, hidden=WIDE), JoinedPlanes(channels=4)),
    ],
    ids=["prior", "joined planes"],
)
def test_pruned_weights_fit_the_shipped_network_and_keep_the_rest(
    wide: torch.nn.Module, small: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prune_planes, "examples", lambda data, count: [(torch.rand(2, 1, 8, 4), 4.0, 1.0)])
    save_weights(wide.state_dict(), tmp_path / "wide.pt")
    prune_planes.prune(tmp_path / "wide.pt", tmp_path / "small.pt", data=tmp_path, batches=1)
    small.load_state_dict(torch.load(tmp_path / "small.pt", weights_only=True))
    found, before = small.state_dict(), wide.state_dict()
    assert all(torch.equal(found[name], before[name]) for name in found if ".blocks." not in f".{name}")


def test_what_is_measured_are_planes_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    data.mkdir()
    volume, affine = head(100)
    write_nifti(data / "head.nii.gz", volume, affine=affine)
    read = ConfigParser.read_config

    def read_ours(parser: ConfigParser, files: Sequence[Path]) -> None:
        read(parser, files)
        parser["train_files"] = ["*.nii.gz"]

    monkeypatch.setattr(ConfigParser, "read_config", read_ours)
    found = list(prune_planes.examples(data, 2))
    assert len(found) == 2
    for planes, scale, thickness in found:
        assert planes.ndim == 4
        assert planes.shape[1] == 1
        assert scale > 1
        assert thickness > 0
