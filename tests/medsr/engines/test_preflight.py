from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from medsr.engines import preflight
from medsr.errors import DataError, GeometryError, OutputError, SettingError, WeightsError
from medsr.handlers.case_output import CaseOutput, RunReport
from medsr.io.cases import find_labelled_cases
from medsr.io.writing import write_nifti
from PIL import Image
from torch import nn

THICK = np.diag([1.0, 1.0, 4.0, 1.0])

Failure = Callable[..., tuple[int, str]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b"):
        write_nifti(folder / f"{name}.nii.gz", np.random.rand(8, 8, 5), affine=THICK)  # noqa: NPY002
    return folder


def network() -> nn.Module:
    return nn.Linear(2, 3)


def usable(items):
    return [item["case"] for item in items if "error" not in item]


def test_no_weights_at_all_are_refused(data, tmp_path, failure):
    for weights in (None, ""):
        code, line = failure(
            preflight.volumes, str(data), tmp_path / "out", weights=weights, network=network()
        )
        assert code == WeightsError.exit_code
        assert "no weights: set --weights" in line


def test_what_lies_in_the_output_folder_and_in_no_report_is_refused(
    data: Path, tmp_path: Path, failure: Failure
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "b_superres.nii.gz").touch()
    report = RunReport(out, output=CaseOutput(out, figure=False))
    assert usable(preflight.volumes(str(data), out, report=report)) == ["a"]
    code, line = failure(preflight.volumes, str(data / "b.nii.gz"), out, report=report)
    assert code == OutputError.exit_code
    assert "b_superres.nii.gz: is there already, but in no report as finished" in line
    overwriting = RunReport(out, output=CaseOutput(out, overwrite=True))
    assert len(usable(preflight.volumes(str(data), out, report=overwriting))) == 2


def test_finished_cases_are_passed_over(data, tmp_path, caplog):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a_superres.nii.gz").touch()
    done = {"cases": {"a": {"status": "done", "files": ["a_superres.nii.gz"]}}}
    (out / "report.json").write_text(json.dumps(done))
    with caplog.at_level(logging.INFO):
        left = preflight.volumes(str(data), out, report=RunReport(out, output=CaseOutput(out, figure=False)))
    assert usable(left) == ["b"]
    assert "1 of 2 cases are in out already and stay as they are" in caplog.text


def test_good_inputs_are_listed(data, tmp_path, weights):
    assert (
        len(
            usable(preflight.volumes(str(data), tmp_path / "new" / "out", weights=weights, network=network()))
        )
        == 2
    )
    assert not (tmp_path / "new").exists()
    assert len(usable(preflight.volumes([str(data / "a.nii.gz")], tmp_path / "out"))) == 1


@pytest.mark.parametrize("nothing", ["", []])
def test_no_input_says_what_to_set(nothing, tmp_path, failure):
    code, line = failure(preflight.volumes, nothing, tmp_path / "out")
    assert code == DataError.exit_code
    assert "--dataset_dir" in line
    assert not (tmp_path / "out").exists()


def test_links_are_followed_on_request(data, tmp_path, failure):
    folder = tmp_path / "links"
    folder.mkdir()
    (folder / "a.nii.gz").symlink_to(data / "a.nii.gz")
    assert failure(preflight.volumes, str(folder), tmp_path / "out")[0] == DataError.exit_code
    assert len(usable(preflight.volumes(str(folder), tmp_path / "out", follow_links=True))) == 1


def test_the_disk_must_have_room_for_the_results(data, tmp_path, monkeypatch, caplog, failure):
    # Two cases of 8 x 8 x 20 thin voxels, two volumes each.
    needed = 2 * 2 * 4 * 8 * 8 * 20
    room, asked = 0, []

    def usage(folder):
        asked.append(folder)
        return SimpleNamespace(free=room)

    monkeypatch.setattr("shutil.disk_usage", usage)
    out = tmp_path / "not" / "yet"
    for room in (needed, needed - 1, needed // 10):
        assert len(usable(preflight.volumes(str(data), out, thin_volumes=2))) == 2
        assert (": the results need up to 0.0 MiB" in caplog.text) == (room < needed)
    room = needed // 10 - 1
    code, line = failure(preflight.volumes, str(data), out, thin_volumes=2)
    assert code == OutputError.exit_code
    assert "yet: the results need up to 0.0 MiB, the disk has 0.0 MiB; free some, or choose another" in line
    assert set(asked) == {tmp_path}
    # Half of the spacing is twice the voxels.
    room = needed // 5 - 1
    failure(preflight.volumes, str(data), out, thin_volumes=2, spacing_mm=0.5)
    assert len(usable(preflight.volumes(str(data), out))) == 2


def test_a_time_series_is_refused_where_one_volume_is_meant(tmp_path, failure):
    for name, volumes in (("one.nii.gz", 1), ("two.nii.gz", 2)):
        values = np.random.default_rng(0).random((8, 8, 5, volumes), dtype=np.float32)
        write_nifti(tmp_path / name, values, affine=np.diag([1.0, 1.0, 4.0, 1.0]))
    one, two = (str(tmp_path / f"{name}.nii.gz") for name in ("one", "two"))
    assert len(usable(preflight.volumes([one, two], tmp_path / "out"))) == 2
    assert len(usable(preflight.volumes(one, tmp_path / "out", time_series=False))) == 1
    code, line = failure(preflight.volumes, two, tmp_path / "out", time_series=False)
    assert code == DataError.exit_code
    assert "two.nii.gz: 2 volumes in one file; split it first" in line


def test_results_that_do_not_fit_into_memory_are_refused(data, tmp_path, monkeypatch, failure):
    # Of 8 x 8 x 20 thin voxels, two volumes.
    monkeypatch.setattr("medsr.io.nifti._free_memory", lambda: 2 * 4 * 8 * 8 * 20)
    assert len(usable(preflight.volumes(str(data), tmp_path / "out", thin_volumes=2))) == 2
    monkeypatch.setattr("medsr.io.nifti._free_memory", lambda: 2 * 4 * 8 * 8 * 20 - 1)
    assert len(usable(preflight.volumes(str(data), tmp_path / "out"))) == 2
    code, line = failure(preflight.volumes, str(data / "a.nii.gz"), tmp_path / "out", thin_volumes=2)
    assert code == DataError.exit_code
    assert "a.nii.gz on thin slices: needs 0.0 GiB as float32" in line


@pytest.mark.parametrize(("spacing", "words"), [("abc", "must be a number > 0"), (1e9, "1e+09 is coarser")])
def test_the_spacing_of_the_results_is_checked_with_the_headers(data, tmp_path, spacing, words, failure):
    code, line = failure(preflight.volumes, str(data / "a.nii.gz"), tmp_path / "out", spacing_mm=spacing)
    assert code == SettingError.exit_code
    assert f"target_spacing_mm {words}" in line


def test_no_output_is_not_the_current_folder(data, tmp_path, monkeypatch, failure):
    monkeypatch.chdir(tmp_path)
    code, line = failure(preflight.volumes, str(data), "")
    assert code == OutputError.exit_code
    assert "--output_dir" in line


def test_results_do_not_lie_among_the_inputs(data, capsys):
    before = sorted(data.iterdir())
    with pytest.raises(SystemExit):
        preflight.volumes(str(data), data / ".." / data.name)
    assert "would lie among the inputs" in capsys.readouterr().err
    assert sorted(data.iterdir()) == before


def test_labels_are_not_overwritten_by_results(tmp_path: Path, failure: Failure) -> None:
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "a.nii.gz").touch()
    for out in (tmp_path, tmp_path / "labels"):
        code, line = failure(preflight.volumes, str(tmp_path), out, find=find_labelled_cases)
        assert code == OutputError.exit_code
        assert "would lie among the inputs" in line


def test_a_file_may_get_its_result_beside_it(data: Path) -> None:
    assert usable(preflight.volumes(str(data / "a.nii.gz"), data)) == ["a"]


def test_a_missing_input_is_named(tmp_path, failure):
    code, line = failure(preflight.volumes, str(tmp_path / "absent"), tmp_path / "out")
    assert code == DataError.exit_code
    assert "absent: no such file or folder" in line
    assert str(tmp_path) not in line
    code, line = failure(preflight.volumes, "n" * 300, tmp_path / "out")
    assert code == DataError.exit_code
    assert "cannot be read (File name too long)" in line


def test_an_output_folder_that_cannot_be_used_ends_the_run(data, tmp_path, failure):
    (tmp_path / "file").touch()
    code, line = failure(preflight.volumes, str(data), tmp_path / "file")
    assert code == OutputError.exit_code
    assert "file" in line


def test_weights_are_checked_before_the_inputs(data, tmp_path, failure):
    settings = {"weights": tmp_path / "none.pt", "network": network()}
    code, line = failure(preflight.volumes, str(data), tmp_path / "out", **settings)
    assert code == WeightsError.exit_code
    assert "none.pt: no such weight file" in line


def test_an_isotropic_scan_is_refused_unless_forced(tmp_path, failure):
    write_nifti(tmp_path / "iso.nii.gz", np.random.rand(8, 8, 8), affine=np.eye(4))  # noqa: NPY002
    code, line = failure(preflight.volumes, str(tmp_path / "iso.nii.gz"), tmp_path / "out")
    assert code == GeometryError.exit_code
    assert "iso.nii.gz: already near-isotropic" in line
    assert len(usable(preflight.volumes(str(tmp_path / "iso.nii.gz"), tmp_path / "out", force=True))) == 1


def test_one_bad_case_among_good_ones_does_not_end_the_run(data, tmp_path, capsys):
    (data / "c.nii.gz").write_bytes(gzip.compress(b"too short"))
    found = preflight.volumes(str(data), tmp_path / "out")
    assert usable(found) == ["a", "b"]
    assert found[2]["error"].startswith("c.nii.gz: ")
    assert capsys.readouterr().err == ""


def test_if_no_case_is_usable_all_reasons_are_told(tmp_path, caplog, failure):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("x", "y"):
        (folder / f"{name}.nii.gz").write_bytes(b"nothing")
    with caplog.at_level(logging.ERROR):
        code, line = failure(preflight.volumes, str(folder), tmp_path / "out")
    assert code == DataError.exit_code
    assert "none of the 2 cases can be used; the first reason: x.nii.gz" in line
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["x.nii.gz", "y.nii.gz"]


def test_labels_count_as_inputs_of_a_run(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
        write_nifti(folder / part / "a.nii.gz", np.eye(8)[..., None].repeat(5, -1), affine=THICK)
    first = RunReport(out, output=CaseOutput(out, figure=False))
    (found,) = preflight.volumes(str(folder), out, find=find_labelled_cases, report=first)
    assert set(found) == {"image", "label", "case"}
    digest = first._digests["a"]
    write_nifti(folder / "labels" / "a.nii.gz", np.ones((8, 8, 5)), affine=THICK)
    second = RunReport(out, output=CaseOutput(out, figure=False))
    preflight.volumes(str(folder), out, find=find_labelled_cases, report=second)
    assert second._digests["a"] != digest


def test_images_are_checked_as_images(tmp_path, failure):
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("RGB", (8, 6)).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"no image")
    assert usable(preflight.images(str(folder), tmp_path / "out")) == ["a"]
    Image.new("CMYK", (8, 6)).save(folder / "a.jpg")
    (folder / "a.png").unlink()
    assert failure(preflight.images, str(folder), tmp_path / "out")[0] != 0


def test_colour_is_refused_by_a_network_for_grey_before_it_runs(tmp_path: Path, weights: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("RGB", (8, 6)).save(folder / "a.png")
    Image.new("L", (8, 6)).save(folder / "b.png")
    grey = network()
    grey.in_channels = 1
    found = preflight.images(str(folder), tmp_path / "out", network=grey, weights=weights)
    assert usable(found) == ["b"]
    assert found[0]["error"].startswith("a.png: a colour image")
    grey.in_channels = 3
    assert usable(preflight.images(str(folder), tmp_path / "out", network=grey, weights=weights)) == [
        "a",
        "b",
    ]


def test_pairs_are_checked_as_pairs(tmp_path, failure):
    folder = tmp_path / "pairs"
    folder.mkdir()
    for name, size in (("a_left", (6, 5)), ("a_right", (6, 5)), ("b_left", (6, 5)), ("b_right", (7, 5))):
        Image.new("RGB", size).save(folder / f"{name}.png")
    Image.new("RGB", (6, 5)).save(folder / "c_left.png")
    Image.new("L", (6, 5)).save(folder / "mono.png")
    assert usable(preflight.pairs(str(folder), tmp_path / "out")) == ["a", "mono"]
    for name in ("a_left", "a_right", "mono"):
        (folder / f"{name}.png").unlink()
    status, line = failure(preflight.pairs, str(folder), tmp_path / "out")
    assert status == DataError.exit_code
    assert "b_left.png: the left view is 3 x 5 x 6, the right one 3 x 5 x 7" in line
    (folder / "b_left.png").unlink()
    (folder / "b_right.png").unlink()
    assert "c: there is no right view" in failure(preflight.pairs, str(folder), tmp_path / "out")[1]


def test_results_do_not_lie_inside_a_series(tmp_path, failure):
    (tmp_path / "study" / "series").mkdir(parents=True)
    series = tmp_path / "study" / "series"

    def find(_: str) -> list[dict[str, str]]:
        return [{"case": "series", "image": str(series)}]

    code, line = failure(preflight.volumes, str(tmp_path / "study"), series, find=find)
    assert code == OutputError.exit_code
    assert "would lie among the inputs" in line
