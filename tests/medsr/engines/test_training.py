from __future__ import annotations

import copy
import os
import random
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from medsr.engines import training
from medsr.engines.training import (
    CachedDataset,
    blur_widths,
    pair_items,
    seed_everything,
    start_from,
    training_items,
    with_prior,
)
from medsr.errors import DataError, WeightsError
from medsr.networks.fmen import FMEN
from medsr.networks.plane_fusion import JoinedPlanes
from medsr.networks.se_gan import SEGenerator
from medsr.networks.segsrnet import SEGSRNet
from medsr.networks.slice_sr import SliceSRNet
from medsr.networks.spp_linknet import SPPLinkNet
from medsr.networks.srgan import SRResNet
from medsr.networks.vdsr import VDSR
from monai.bundle import ConfigParser
from monai.transforms import Transform


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a/scan.nii.gz", "b/scan.nii.gz", "b/deep/other.nii", "notes.txt"):
        path = tmp_path / "volumes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "volumes"


@pytest.fixture
def dicom(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sub-folder that counts as a DICOM series; the reader of headers has its own tests."""
    series = folder / "series"
    series.mkdir()
    (series / "im0.dcm").touch()
    monkeypatch.setattr(training, "is_dicom_series", lambda path: Path(path) == series)
    monkeypatch.setattr("medsr.io.cases.is_dicom_series", lambda path: Path(path) == series)
    return series


def names(items: list[dict], folder: Path) -> list[str]:
    return [Path(item["image"]).relative_to(folder).as_posix() for item in items]


def test_items_are_cached_once_and_by_no_other_thread():
    class Where(Transform):
        threads: ClassVar[list[threading.Thread]] = []

        def __call__(self, number: int) -> int:
            self.threads.append(threading.current_thread())
            if number < 0:
                raise DataError("negative")
            return number + 1

    dataset = CachedDataset([1, 2, 3], Where(), progress=False)
    assert [dataset[index] for index in (0, 1, 2, 0)] == [2, 3, 4, 2]
    assert Where.threads == [threading.main_thread()] * 3
    before = threading.active_count()
    with pytest.raises(RuntimeError) as caught:
        CachedDataset([1, -1, 2], Where(), progress=False)
    assert isinstance(caught.value.__cause__, DataError)
    assert threading.active_count() == before


def test_all_volumes_below_a_folder_are_found(folder):
    items = training_items(folder)
    # Unlike the cases of an inference, two of them may share a name.
    assert sorted(names(items, folder)) == ["a/scan.nii.gz", "b/deep/other.nii", "b/scan.nii.gz"]
    assert {item["weight"] for item in items} == {1.0}
    assert all(Path(item["image"]).is_absolute() for item in items)


def test_patterns_choose_and_weights_follow(folder):
    items = training_items(folder, {"a/*.nii.gz": 3, "b/**/*.nii*": 1})
    assert dict(zip(names(items, folder), (i["weight"] for i in items), strict=True)) == {
        "a/scan.nii.gz": 3.0,
        "b/deep/other.nii": 1.0,
        "b/scan.nii.gz": 1.0,
    }


def test_a_volume_that_two_patterns_name_is_listed_once(folder):
    items = training_items(folder, {"**/*.nii.gz": 1, "a/scan.nii.gz": 5})
    assert sorted(i["weight"] for i in items) == [1.0, 5.0]


def test_the_order_is_that_of_the_names(folder):
    assert names(training_items(folder, ["**/*.nii.gz"]), folder) == ["a/scan.nii.gz", "b/scan.nii.gz"]


@pytest.mark.parametrize("patterns", [["a/scna.nii.gz"], ["a/scan.nii.gz", "c/scan.nii.gz"], ["c/*.nii"]])
def test_a_misspelt_name_does_not_shrink_the_training_set_in_silence(folder, patterns):
    with pytest.raises(DataError, match=r"^volumes: no volume matches '(a/scna|c/)") as error:
        training_items(folder, patterns)
    assert str(folder.parent) not in str(error.value)


def test_a_misspelt_name_beside_an_empty_wildcard_is_not_excused(folder):
    # The default patterns hold wildcards of which one is often empty: that is no reason to stop ...
    (folder / "b" / "deep" / "other.nii").unlink()
    assert len(training_items(folder)) == 2
    # ... but it must not excuse a name.
    with pytest.raises(DataError, match=r"'a/scna\.nii\.gz'"):
        training_items(folder, ["**/*.nii", "**/*.nii.gz", "a/scna.nii.gz"])


def test_a_dicom_series_is_a_volume(folder, dicom):
    assert names(training_items(folder, ["series", "a/*.nii.gz"]), folder) == ["series", "a/scan.nii.gz"]
    assert training_items(dicom) == [{"image": str(dicom), "weight": 1.0}]


def test_other_folders_are_no_volumes(folder):
    with pytest.raises(DataError, match="'b/deep'"):
        training_items(folder, ["b/deep"])


def test_one_file_is_a_training_set(folder):
    path = folder / "a" / "scan.nii.gz"
    assert training_items(path) == [{"image": str(path), "weight": 1.0}]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"^absent: no such training folder; set --dataset_dir$"):
        training_items(tmp_path / "absent")


def test_one_seed_rules_all_generators():
    def draw(seed: int) -> tuple[float, float, float]:
        assert seed_everything(seed) == seed
        return random.random(), float(np.random.random()), float(torch.rand(()))  # noqa: NPY002

    first, again, other = draw(1), draw(1), draw(2)
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_a_copy_made_after_the_start_holds_the_initial_weights(tmp_path):
    source, network = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    torch.save({"weight": source.weight.detach()}, tmp_path / "start.pt")
    bias = network.bias.detach().clone()
    average = copy.deepcopy(start_from(tmp_path / "start.pt", network))
    assert torch.equal(average.weight, source.weight)
    assert torch.equal(average.bias, bias)


def two_heads() -> torch.nn.ModuleDict:
    return torch.nn.ModuleDict({"trunk": torch.nn.Linear(2, 3), "head": torch.nn.Linear(3, 1)})


def test_tensors_of_another_head_may_be_absent(tmp_path):
    source, target = two_heads(), two_heads()
    torch.save({k: v for k, v in source.state_dict().items() if k.startswith("trunk")}, tmp_path / "trunk.pt")
    before = target["head"].weight.clone()
    assert start_from(tmp_path / "trunk.pt", target) is target
    assert torch.equal(target["trunk"].weight, source["trunk"].weight)
    assert torch.equal(target["head"].weight, before)


class WithPrior(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.prior, self.trunk = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)


def test_a_prior_with_weights_of_its_own_is_not_trained(tmp_path):
    source, network = torch.nn.Linear(2, 3), WithPrior()
    torch.save(source.state_dict(), tmp_path / "prior.pt")
    start_from(None, network, tmp_path / "prior.pt")
    assert torch.equal(network.prior.weight, source.weight)
    assert {name for name, p in network.named_parameters() if p.requires_grad} == {
        "trunk.weight",
        "trunk.bias",
    }


def test_joined_planes_bring_prior_and_fusion_and_both_are_kept(tmp_path):
    joined = JoinedPlanes()
    torch.save({key: tensor + 1 for key, tensor in joined.state_dict().items()}, tmp_path / "joined.pt")
    network = SliceSRNet(width=0.0625, prior=True)
    start_from(None, network, tmp_path / "joined.pt")
    for name, part in (("prior", joined.prior), ("fusion", joined.fusion)):
        state = getattr(network, name).state_dict()
        assert all(torch.equal(state[key], tensor + 1) for key, tensor in part.state_dict().items())
        assert not any(p.requires_grad for p in getattr(network, name).parameters())
    assert network.fuse.weight.requires_grad


def test_joined_planes_need_a_network_that_joins(tmp_path, capsys):
    torch.save(JoinedPlanes(channels=2, hidden=[8]).state_dict(), tmp_path / "joined.pt")
    with pytest.raises(SystemExit):
        start_from(None, WithPrior(), tmp_path / "joined.pt")
    assert "does not join planes" in capsys.readouterr().err


def test_weights_of_a_prior_need_a_network_with_one(tmp_path, capsys):
    torch.save(torch.nn.Linear(2, 3).state_dict(), tmp_path / "prior.pt")
    with pytest.raises(SystemExit):
        start_from(None, two_heads(), tmp_path / "prior.pt")
    assert "remove --prior_weights" in capsys.readouterr().err


def test_the_complete_network_is_saved_with_the_prior_that_was_trained():
    network, prior = WithPrior(), torch.nn.Linear(2, 3)
    state = with_prior(network, prior).state_dict()
    assert torch.equal(state["prior.weight"], prior.weight)
    assert torch.equal(state["trunk.weight"], network.trunk.weight)


@pytest.mark.parametrize("head", ["plain", "uncertainty"])
def test_a_network_with_labels_starts_as_the_one_without(tmp_path, head):
    torch.manual_seed(0)
    source = SliceSRNet(0.125, head=head, prior=True)
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    network = SliceSRNet(0.125, 2, head, prior=True)
    torch.save(source.state_dict(), tmp_path / "start.pt")
    start_from(tmp_path / "start.pt", network)
    stack = torch.rand(1, 3, 16, 16, 4)
    with torch.no_grad():
        before, after = source(stack[:, :1]), network(stack)
    rounding = 1e-6 * float(before.abs().max())
    assert torch.allclose(after[:, :1], before[:, :1], atol=rounding)
    assert torch.allclose(after[:, 3:], before[:, 1:], atol=rounding)
    # The labels start as their linear interpolation.
    assert torch.allclose(
        after[:, 1:3].sigmoid().mean(-1), stack[:, 1:].clamp(0.01, 0.99).mean(-1), atol=0.02
    )


def test_blur_is_refused_where_it_means_nothing(capsys):
    assert blur_widths(0.5) == (0.0, 0.5)
    with pytest.raises(SystemExit):
        blur_widths(-1)
    assert "blur must be >= 0, got -1" in capsys.readouterr().err


def test_no_path_means_no_weights():
    network = two_heads()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    for nothing in (None, ""):
        start_from(nothing, network)
    assert all(torch.equal(network.state_dict()[key], before[key]) for key in before)


def test_weights_of_another_task_start_all_but_its_tensors(tmp_path: Path, capsys):
    size = {"features": 8, "growth": 4, "blocks": 2}
    x2, x4 = SEGSRNet(2, **size), SEGSRNet(4, **size)
    torch.save(x2.state_dict(), tmp_path / "x2.pt")
    before = x4.spread.weight.detach().clone()
    started = start_from(tmp_path / "x2.pt", x4).state_dict()
    assert torch.equal(started["spread.weight"], before)
    same = [key for key, value in x2.state_dict().items() if torch.equal(value, started[key])]
    assert {key for key in started if key not in same} <= set(SEGSRNet.task_tensors)
    with pytest.raises(SystemExit):
        start_from(tmp_path / "x2.pt", SEGSRNet(4, **(size | {"growth": 5})))
    assert "has another shape" in capsys.readouterr().err

    binary, parts = (SPPLinkNet(classes, encoder="resnet18", width=8) for classes in (1, 4))
    torch.save(binary.state_dict(), tmp_path / "binary.pt")
    started = start_from(tmp_path / "binary.pt", parts).state_dict()
    assert torch.equal(started["encoder.conv1.weight"], binary.encoder.conv1.weight)


def test_a_start_from_another_scale_keeps_the_word_of_its_own(tmp_path):
    torch.save(VDSR(2, layers=3, features=8).state_dict(), tmp_path / "x2.pt")
    network = start_from(tmp_path / "x2.pt", VDSR(4, layers=3, features=8))
    assert network.trained_scale == 4
    assert torch.equal(
        network.body[0].weight, torch.load(tmp_path / "x2.pt", weights_only=True)["body.0.weight"]
    )


@torch.inference_mode()
def test_weights_of_one_scale_start_another_as_the_same_image(tmp_path: Path) -> None:
    build = partial(FMEN, features=8, mid_features=6, down_blocks=1, up_blocks=(1, 1), fused=True)
    x2, image = build(2).eval(), torch.rand(1, 3, 9, 7)
    torch.save(x2.state_dict(), tmp_path / "x2.pt")
    x4 = start_from(tmp_path / "x2.pt", build(4)).eval()
    repeated = x2(image).repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(x4(image), repeated, atol=1e-6, rtol=1e-5)

    torch.nn.init.normal_(x4.tail.weight)
    torch.save(x4.state_dict(), tmp_path / "x4.pt")
    back = start_from(tmp_path / "x4.pt", build(2)).eval()
    mean = torch.nn.functional.avg_pool2d(x4(image), 2)
    torch.testing.assert_close(back(image), mean, atol=1e-5, rtol=1e-4)

    # No multiple: the last layer starts anew, and the others from the weights.
    x3 = build(3)
    before = x3.tail.weight.clone()
    start_from(tmp_path / "x2.pt", x3)
    assert torch.equal(x3.tail.weight, before)
    assert torch.equal(x3.head.weight, x2.head.weight)


@pytest.mark.parametrize(
    "build",
    [
        partial(FMEN, features=8, mid_features=6, down_blocks=1, up_blocks=(1, 1), fused=True),
        partial(FMEN, features=8, mid_features=6, down_blocks=1, up_blocks=(1, 1)),
        partial(VDSR, layers=3, features=8),
        partial(SRResNet, blocks=1, features=8),
        partial(SEGenerator, blocks=1, features=8, reduction=4),
    ],
    ids=["FMEN, plain", "FMEN", "VDSR", "SRResNet", "SE-GAN"],
)
def test_a_grey_network_starts_as_the_mean_of_a_colour_one(build, tmp_path: Path) -> None:
    torch.manual_seed(0)
    colour, grey = build(channels=3).eval(), build(channels=1).eval()
    for parameter in colour.parameters():
        # Last layers start with zeros.
        torch.nn.init.normal_(parameter, std=0.1)
    torch.save(colour.state_dict(), tmp_path / "colour.pt")
    start_from(tmp_path / "colour.pt", grey)
    image = torch.rand(1, 1, 9, 7)
    with torch.no_grad():
        expected = colour(image.expand(-1, 3, -1, -1)).mean(1, keepdim=True)
        torch.testing.assert_close(grey(image), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "no such weight file; give the path of one"),
        (b"not weights", "damaged or not plain weights"),
        ({"more": torch.zeros(1)}, "unknown tensor 'more'; made for another network"),
        ({"trunk.weight": torch.zeros(2, 2)}, "'trunk.weight' has another shape"),
    ],
    ids=["missing", "damaged", "unknown", "wrong shape"],
)
def test_initial_weights_that_cannot_be_used_end_the_run_in_one_line(tmp_path, capsys, content, word):
    path = tmp_path / "start.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(SystemExit) as stop:
        start_from(path, two_heads())
    assert stop.value.code == WeightsError.exit_code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert f"start.pt: {word}" in lines[0]
    assert str(tmp_path) not in lines[0]


def test_a_module_without_gradients_needs_no_processes():
    frozen = torch.nn.Linear(1, 1).requires_grad_(False)
    assert training.distributed(frozen, torch.device("cpu")) is frozen
    assert training.distributed(torch.nn.ReLU(), torch.device("cpu"))


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_pairs_of_several_folders_are_listed_with_single_images(tmp_path):
    for name in ("one/a_left", "one/a_right", "two/a_left", "two/a_right", "two/alone"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    items = pair_items([tmp_path / "one", tmp_path / "two"])
    assert [{key: Path(path).name for key, path in item.items()} for item in items] == [
        {"label": "a_left.png", "label_right": "a_right.png"},
        {"label": "a_left.png", "label_right": "a_right.png"},
        {"label": "alone.png"},
    ]
    assert set(pair_items(tmp_path / "one", "image")[0]) == {"image", "image_right"}


def test_a_training_view_without_partner_ends_the_run(tmp_path, capsys):
    (tmp_path / "b_left.png").touch()
    with pytest.raises(SystemExit):
        pair_items(str(tmp_path))
    assert "b: there is no right view" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        pair_items("")
    assert "set --dataset_dir" in capsys.readouterr().err


def test_a_config_gives_what_it_was_made_into(tmp_path):
    config = {
        "imports": ["$import medsr.engines.training as training"],
        "zoom": [0.5, 2],
        "double": "$2 * @zoom[1]",
        "unused": 1,
        "part": {"_target_": "dict", "config": "$training.resolved_config()", "double": "@double"},
    }
    found = ConfigParser(config).get_parsed_content("part")["config"]
    assert (found["zoom"], found["double"]) == ([0.5, 2], 4)
    assert "unused" not in found


def test_an_error_is_told_in_one_line_by_several_processes_too():
    """PyTorch's hook for a process group would keep the line for itself."""
    code = (
        "import sys, torch.distributed as group\n"
        "from medsr.engines import runner, training\n"
        "from medsr.errors import DataError\n"
        "sys.excepthook = runner._in_one_line\n"
        "training.start_process_group()\n"
        "assert group.is_initialized()\n"
        "raise DataError('nope: no such file or folder')\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **alone}, check=False
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        "medsr: error: nope: no such file or folder",
    )
