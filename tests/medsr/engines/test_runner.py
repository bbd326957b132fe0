from __future__ import annotations

import gzip
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from medsr.engines import runner
from medsr.engines.runner import (
    check_settings,
    check_weights,
    compared_weights,
    load_weights,
    named_networks,
    one_line_errors,
    preflight,
    preflight_images,
    preflight_pairs,
)
from medsr.errors import DataError, GeometryError, MedsrError, OutputError, SettingError, WeightsError
from medsr.handlers.case_output import CaseOutput, RunReport
from medsr.handlers.training import save_weights
from medsr.io.cases import find_labelled_cases
from medsr.io.writing import write_nifti
from PIL import Image
from torch import nn

THICK = np.diag([1.0, 1.0, 4.0, 1.0])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b"):
        write_nifti(folder / f"{name}.nii.gz", np.random.rand(8, 8, 5), affine=THICK)  # noqa: NPY002
    return folder


def network(width: int = 3) -> nn.Module:
    return nn.Linear(2, width)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A weight file in the layout of a bundle, with its listed digest."""
    path = tmp_path / "bundle" / "models" / "model.pt"
    path.parent.mkdir(parents=True)
    save_weights(network().state_dict(), path)
    return path


def failure(capsys: pytest.CaptureFixture[str], function, *args, **kwargs) -> tuple[int, str]:
    """Exit status and the one line on stderr."""
    with pytest.raises(SystemExit) as stop:
        function(*args, **kwargs)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("medsr: error: ")
    return stop.value.code, lines[0]


# --- errors in one line -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [MedsrError, DataError, GeometryError, WeightsError, SettingError, OutputError]
)
def test_errors_of_ours_become_one_line_and_a_status(kind, capsys):
    @one_line_errors
    def fails() -> None:
        raise kind("first\n   second")

    assert failure(capsys, fails) == (kind.exit_code, "medsr: error: first second")


def test_other_errors_pass_and_results_come_back(capsys):
    @one_line_errors
    def divide(a: float, *, by: float) -> float:
        """Divides."""
        return a / by

    assert divide(1, by=2) == 0.5
    assert divide.__doc__ == "Divides."
    with pytest.raises(ZeroDivisionError):
        divide(1, by=0)
    assert capsys.readouterr().err == ""


def test_a_misspelt_setting_ends_the_run(capsys, tmp_path, monkeypatch):
    config = tmp_path / "inference.json"
    config.write_text('{"output_dir": "out", "run": []}')
    monkeypatch.setattr(runner.sys, "excepthook", runner.sys.excepthook)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(runner.sys, "unraisablehook", runner.sys.unraisablehook)
    command = ["-m", "run", "--config_file", str(config), "--output_dri", "x"]
    monkeypatch.setattr("sys.argv", ["monai.bundle", *command[1:]])
    monkeypatch.setattr("sys.orig_argv", ["python", "-m", "monai.bundle", *command[1:]])
    code, line = failure(capsys, check_settings)
    assert code == SettingError.exit_code
    assert "output_dri" in line


SWALLOWED = """
import os, signal, sys, time
sys.argv = ["medsr"]
# Whoever runs these tests may ignore them: nohup does, and a shell for what it puts behind.
signal.signal(signal.SIGHUP, signal.{hang_up})
signal.signal(signal.SIGINT, signal.default_int_handler)
from medsr.engines import runner
runner.check_settings()

class Released:
    def __del__(self):
        os.kill(os.getpid(), signal.{signal})
        time.sleep(0.2)

Released()
try:
    time.sleep({seconds})
    print("went on")
finally:
    print("cleaned up")
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has neither these signals nor a timer")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", -2)])
def test_a_stop_that_python_drops_is_not_lost(name, code):
    ended = swallowed(name, hang_up="SIG_DFL", seconds=20)
    assert (ended.returncode, ended.stdout) == (code, "cleaned up\n"), ended.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
def test_under_nohup_a_closed_terminal_stops_nothing():
    ended = swallowed("SIGHUP", hang_up="SIG_IGN", seconds=0.1)
    assert (ended.returncode, ended.stdout) == (0, "went on\ncleaned up\n"), ended.stderr


def swallowed(name, *, hang_up, seconds):
    program = SWALLOWED
    for key, value in (("signal", name), ("hang_up", hang_up), ("seconds", seconds)):
        program = program.replace(f"{{{key}}}", str(value))
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_process_without_a_config_has_nothing_to_check():
    check_settings()
    check_settings("cpu")
    check_settings(torch.device("cpu"))


@pytest.mark.parametrize(
    ("device", "line"),
    [
        ("gpu", "device must be cpu, cuda or cuda:<number>, got 'gpu'"),
        (["cpu"], "device must be cpu, cuda or cuda:<number>, got ['cpu']"),
        ("cuda:99", "device cuda:99 cannot be used here ("),
        ("meta", "device meta cannot be used here ("),
    ],
)
def test_a_device_that_is_not_here_is_refused(capsys, device, line):
    code, text = failure(capsys, check_settings, device)
    assert code == SettingError.exit_code
    assert line in text


def test_no_weights_at_all_are_refused(capsys, data, tmp_path):
    for weights in (None, ""):
        code, line = failure(
            capsys, preflight, str(data), tmp_path / "out", weights=weights, network=network()
        )
        assert code == WeightsError.exit_code
        assert "no weights: set --weights" in line


def usable(items):
    return [item["case"] for item in items if "error" not in item]


# --- preflight ----------------------------------------------------------------------------------------------------


def test_what_lies_in_the_output_folder_and_in_no_report_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "b_superres.nii.gz").touch()
    report = RunReport(out, output=CaseOutput(out, figure=False))
    assert usable(preflight(str(data), out, report=report)) == ["a"]
    code, line = failure(capsys, preflight, str(data / "b.nii.gz"), out, report=report)
    assert code == OutputError.exit_code
    assert "b_superres.nii.gz: is there already, but in no report as finished" in line
    overwriting = RunReport(out, output=CaseOutput(out, overwrite=True))
    assert len(usable(preflight(str(data), out, report=overwriting))) == 2


def test_finished_cases_are_passed_over(data, tmp_path, caplog):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a_superres.nii.gz").touch()
    done = {"cases": {"a": {"status": "done", "files": ["a_superres.nii.gz"]}}}
    (out / "report.json").write_text(json.dumps(done))
    with caplog.at_level(logging.INFO):
        left = preflight(str(data), out, report=RunReport(out, output=CaseOutput(out, figure=False)))
    assert usable(left) == ["b"]
    assert "1 of 2 cases are in out already and stay as they are" in caplog.text


def test_good_inputs_are_listed(data, tmp_path, weights):
    assert (
        len(usable(preflight(str(data), tmp_path / "new" / "out", weights=weights, network=network()))) == 2
    )
    assert not (tmp_path / "new").exists()
    assert len(usable(preflight([str(data / "a.nii.gz")], tmp_path / "out"))) == 1


@pytest.mark.parametrize("nothing", ["", []])
def test_no_input_says_what_to_set(nothing, tmp_path, capsys):
    code, line = failure(capsys, preflight, nothing, tmp_path / "out")
    assert code == DataError.exit_code
    assert "--dataset_dir" in line
    assert not (tmp_path / "out").exists()


def test_links_are_followed_on_request(data, tmp_path, capsys):
    folder = tmp_path / "links"
    folder.mkdir()
    (folder / "a.nii.gz").symlink_to(data / "a.nii.gz")
    assert failure(capsys, preflight, str(folder), tmp_path / "out")[0] == DataError.exit_code
    assert len(usable(preflight(str(folder), tmp_path / "out", follow_links=True))) == 1


def test_the_disk_must_have_room_for_the_results(data, tmp_path, monkeypatch, capsys, caplog):
    # Two cases of 8 x 8 x 20 thin voxels, two volumes each.
    needed = 2 * 2 * 4 * 8 * 8 * 20
    room, asked = 0, []

    def usage(folder):
        asked.append(folder)
        return SimpleNamespace(free=room)

    monkeypatch.setattr("shutil.disk_usage", usage)
    out = tmp_path / "not" / "yet"
    for room in (needed, needed - 1, needed // 10):
        assert len(usable(preflight(str(data), out, thin_volumes=2))) == 2
        assert (": the results need up to 0.0 MiB" in caplog.text) == (room < needed)
    room = needed // 10 - 1
    code, line = failure(capsys, preflight, str(data), out, thin_volumes=2)
    assert code == OutputError.exit_code
    assert "yet: the results need up to 0.0 MiB, the disk has 0.0 MiB; free some, or choose another" in line
    assert set(asked) == {tmp_path}
    # Half of the spacing is twice the voxels.
    room = needed // 5 - 1
    failure(capsys, preflight, str(data), out, thin_volumes=2, spacing_mm=0.5)
    assert len(usable(preflight(str(data), out))) == 2


def test_a_time_series_is_refused_where_one_volume_is_meant(tmp_path, capsys):
    for name, volumes in (("one.nii.gz", 1), ("two.nii.gz", 2)):
        values = np.random.default_rng(0).random((8, 8, 5, volumes), dtype=np.float32)
        write_nifti(tmp_path / name, values, affine=np.diag([1.0, 1.0, 4.0, 1.0]))
    one, two = (str(tmp_path / f"{name}.nii.gz") for name in ("one", "two"))
    assert len(usable(preflight([one, two], tmp_path / "out"))) == 2
    assert len(usable(preflight(one, tmp_path / "out", time_series=False))) == 1
    code, line = failure(capsys, preflight, two, tmp_path / "out", time_series=False)
    assert code == DataError.exit_code
    assert "two.nii.gz: 2 volumes in one file; split it first" in line


def test_results_that_do_not_fit_into_memory_are_refused(data, tmp_path, monkeypatch, capsys):
    # Of 8 x 8 x 20 thin voxels, two volumes.
    monkeypatch.setattr("medsr.io.nifti._free_memory", lambda: 2 * 4 * 8 * 8 * 20)
    assert len(usable(preflight(str(data), tmp_path / "out", thin_volumes=2))) == 2
    monkeypatch.setattr("medsr.io.nifti._free_memory", lambda: 2 * 4 * 8 * 8 * 20 - 1)
    assert len(usable(preflight(str(data), tmp_path / "out"))) == 2
    code, line = failure(capsys, preflight, str(data / "a.nii.gz"), tmp_path / "out", thin_volumes=2)
    assert code == DataError.exit_code
    assert "a.nii.gz on thin slices: needs 0.0 GiB as float32" in line


@pytest.mark.parametrize(("spacing", "words"), [("abc", "must be a number > 0"), (1e9, "1e+09 is coarser")])
def test_the_spacing_of_the_results_is_checked_with_the_headers(data, tmp_path, capsys, spacing, words):
    code, line = failure(capsys, preflight, str(data / "a.nii.gz"), tmp_path / "out", spacing_mm=spacing)
    assert code == SettingError.exit_code
    assert f"target_spacing_mm {words}" in line


def test_no_output_is_not_the_current_folder(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, line = failure(capsys, preflight, str(data), "")
    assert code == OutputError.exit_code
    assert "--output_dir" in line


def test_results_do_not_lie_among_the_inputs(data, capsys):
    before = sorted(data.iterdir())
    with pytest.raises(SystemExit):
        preflight(str(data), data / ".." / data.name)
    assert "would lie among the inputs" in capsys.readouterr().err
    assert sorted(data.iterdir()) == before


def test_labels_are_not_overwritten_by_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "a.nii.gz").touch()
    for out in (tmp_path, tmp_path / "labels"):
        code, line = failure(capsys, preflight, str(tmp_path), out, find=find_labelled_cases)
        assert code == OutputError.exit_code
        assert "would lie among the inputs" in line


def test_a_file_may_get_its_result_beside_it(data: Path) -> None:
    assert usable(preflight(str(data / "a.nii.gz"), data)) == ["a"]


def test_a_missing_input_is_named(tmp_path, capsys):
    code, line = failure(capsys, preflight, str(tmp_path / "absent"), tmp_path / "out")
    assert code == DataError.exit_code
    assert "absent: no such file or folder" in line
    assert str(tmp_path) not in line
    code, line = failure(capsys, preflight, "n" * 300, tmp_path / "out")
    assert code == DataError.exit_code
    assert "cannot be read (File name too long)" in line


def test_an_output_folder_that_cannot_be_used_ends_the_run(data, tmp_path, capsys):
    (tmp_path / "file").touch()
    code, line = failure(capsys, preflight, str(data), tmp_path / "file")
    assert code == OutputError.exit_code
    assert "file" in line


def test_weights_are_checked_before_the_inputs(data, tmp_path, capsys):
    settings = {"weights": tmp_path / "none.pt", "network": network()}
    code, line = failure(capsys, preflight, str(data), tmp_path / "out", **settings)
    assert code == WeightsError.exit_code
    assert "none.pt: no such weight file" in line


def test_an_isotropic_scan_is_refused_unless_forced(tmp_path, capsys):
    write_nifti(tmp_path / "iso.nii.gz", np.random.rand(8, 8, 8), affine=np.eye(4))  # noqa: NPY002
    code, line = failure(capsys, preflight, str(tmp_path / "iso.nii.gz"), tmp_path / "out")
    assert code == GeometryError.exit_code
    assert "iso.nii.gz: already near-isotropic" in line
    assert len(usable(preflight(str(tmp_path / "iso.nii.gz"), tmp_path / "out", force=True))) == 1


def test_one_bad_case_among_good_ones_does_not_end_the_run(data, tmp_path, capsys):
    (data / "c.nii.gz").write_bytes(gzip.compress(b"too short"))
    found = preflight(str(data), tmp_path / "out")
    assert usable(found) == ["a", "b"]
    assert found[2]["error"].startswith("c.nii.gz: ")
    assert capsys.readouterr().err == ""


def test_if_no_case_is_usable_all_reasons_are_told(tmp_path, capsys, caplog):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("x", "y"):
        (folder / f"{name}.nii.gz").write_bytes(b"nothing")
    with caplog.at_level(logging.ERROR):
        code, line = failure(capsys, preflight, str(folder), tmp_path / "out")
    assert code == DataError.exit_code
    assert "none of the 2 cases can be used; the first reason: x.nii.gz" in line
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["x.nii.gz", "y.nii.gz"]


# --- weights ------------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], path: Path, net: nn.Module | None = None) -> str:
    code, line = failure(capsys, check_weights, path, net or network())
    assert code == WeightsError.exit_code
    assert str(path.parent) not in line
    return line


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


def test_one_flipped_bit_in_a_bundle_is_noticed(weights, capsys):
    flip(weights)
    # PyTorch loads it without a complaint.
    torch.load(weights, weights_only=True)
    assert "not the listed file (SHA-256" in refused(capsys, weights)


@pytest.mark.parametrize("place", ["models/variant", "runs/plain"])
def test_one_flipped_bit_elsewhere_is_noticed_too(tmp_path, capsys, place):
    path = tmp_path / "bundle" / place / "model.pt"
    path.parent.mkdir(parents=True)
    save_weights(network().state_dict(), path)
    flip(path)
    refused(capsys, path)


def test_weights_without_a_list_of_digests_are_accepted(tmp_path):
    torch.save(network().state_dict(), tmp_path / "own.pt")
    check_weights(tmp_path / "own.pt", network())


def test_no_weight_file_says_what_to_set(capsys):
    code, line = failure(capsys, check_weights, "", network())
    assert code == WeightsError.exit_code
    assert "--weights" in line


def test_a_weight_file_that_is_missing(tmp_path, capsys):
    assert "model.pt: no such weight file; give the path" in refused(capsys, tmp_path / "model.pt")


@pytest.mark.parametrize("content", [b"", b"not weights", None])
def test_a_damaged_weight_file(tmp_path, capsys, content):
    path = tmp_path / "model.pt"
    save_weights(network().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-300] if content is None else content)
    (tmp_path / "SHA256SUMS").unlink()
    assert "model.pt: damaged or not plain weights" in refused(capsys, path)


def test_a_whole_pickled_network_is_not_loaded(tmp_path, capsys):
    torch.save(network(), tmp_path / "model.pt")
    assert "damaged or not plain weights" in refused(capsys, tmp_path / "model.pt")


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"weight": torch.zeros(3, 2)},
        {"weight": torch.zeros(3, 2), "bias": torch.zeros(3), "more": torch.zeros(1)},
    ],
)
def test_weights_of_another_network(tmp_path, capsys, content):
    torch.save(content, tmp_path / "model.pt")
    assert "model.pt: made for another network" in refused(capsys, tmp_path / "model.pt")


@pytest.mark.parametrize("content", [[1], {"model": {"weight": torch.zeros(3, 2)}}])
def test_what_is_no_state_dict(tmp_path, capsys, content):
    torch.save(content, tmp_path / "model.pt")
    assert "model.pt: not a plain state dict" in refused(capsys, tmp_path / "model.pt")


def test_weights_of_another_width_name_the_tensor(weights, capsys):
    line = refused(capsys, weights, network(4))
    assert "'weight' has shape (3, 2), this network needs (4, 2)" in line


def test_refused_weights_leave_the_network_alone(weights, capsys):
    net = network()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    flip(weights)
    failure(capsys, load_weights, weights, net)
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


def test_labels_count_as_inputs_of_a_run(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
        write_nifti(folder / part / "a.nii.gz", np.eye(8)[..., None].repeat(5, -1), affine=THICK)
    first = RunReport(out, output=CaseOutput(out, figure=False))
    (found,) = preflight(str(folder), out, find=find_labelled_cases, report=first)
    assert set(found) == {"image", "label", "case"}
    digest = first._digests["a"]
    write_nifti(folder / "labels" / "a.nii.gz", np.ones((8, 8, 5)), affine=THICK)
    second = RunReport(out, output=CaseOutput(out, figure=False))
    preflight(str(folder), out, find=find_labelled_cases, report=second)
    assert second._digests["a"] != digest


def test_images_are_checked_as_images(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("RGB", (8, 6)).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"no image")
    assert usable(preflight_images(str(folder), tmp_path / "out")) == ["a"]
    Image.new("CMYK", (8, 6)).save(folder / "a.jpg")
    (folder / "a.png").unlink()
    assert failure(capsys, preflight_images, str(folder), tmp_path / "out")[0] != 0


def test_colour_is_refused_by_a_network_for_grey_before_it_runs(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("RGB", (8, 6)).save(folder / "a.png")
    Image.new("L", (8, 6)).save(folder / "b.png")
    grey = network()
    grey.in_channels = 1
    found = preflight_images(str(folder), tmp_path / "out", network=grey, weights=weights)
    assert usable(found) == ["b"]
    assert found[0]["error"].startswith("a.png: a colour image")
    grey.in_channels = 3
    assert usable(preflight_images(str(folder), tmp_path / "out", network=grey, weights=weights)) == [
        "a",
        "b",
    ]


def test_pairs_are_checked_as_pairs(tmp_path, capsys):
    folder = tmp_path / "pairs"
    folder.mkdir()
    for name, size in (("a_left", (6, 5)), ("a_right", (6, 5)), ("b_left", (6, 5)), ("b_right", (7, 5))):
        Image.new("RGB", size).save(folder / f"{name}.png")
    Image.new("RGB", (6, 5)).save(folder / "c_left.png")
    Image.new("L", (6, 5)).save(folder / "mono.png")
    assert usable(preflight_pairs(str(folder), tmp_path / "out")) == ["a", "mono"]
    for name in ("a_left", "a_right", "mono"):
        (folder / f"{name}.png").unlink()
    status, line = failure(capsys, preflight_pairs, str(folder), tmp_path / "out")
    assert status == DataError.exit_code
    assert "b_left.png: the left view is 3 x 5 x 6, the right one 3 x 5 x 7" in line
    (folder / "b_left.png").unlink()
    (folder / "b_right.png").unlink()
    assert "c: there is no right view" in failure(capsys, preflight_pairs, str(folder), tmp_path / "out")[1]


def test_results_do_not_lie_inside_a_series(tmp_path, capsys):
    (tmp_path / "study" / "series").mkdir(parents=True)
    series = tmp_path / "study" / "series"

    def find(_: str) -> list[dict[str, str]]:
        return [{"case": "series", "image": str(series)}]

    code, line = failure(capsys, preflight, str(tmp_path / "study"), series, find=find)
    assert code == OutputError.exit_code
    assert "would lie among the inputs" in line


def test_a_network_does_not_take_the_name_of_a_method(capsys):
    code, line = failure(capsys, named_networks, nn.Linear(1, 1), {"bicubic": "model.pt"})
    assert code == SettingError.exit_code
    assert "'bicubic' is the name of what networks are compared with" in line
    _, line = failure(capsys, compared_weights, "model.pt", {"network": "other.pt"})
    assert "compare: 'network' is the name of weights" in line
