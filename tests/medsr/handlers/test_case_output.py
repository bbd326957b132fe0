from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from medsr.engines.case_evaluator import CaseDataset, CaseEvaluator
from medsr.errors import OutputError, SettingError
from medsr.handlers.case_output import CaseOutput, RunReport, segmented_volume_facts
from medsr.handlers.qc_figure import segmentation_figure, superres_figure
from medsr.inferers.volume import VolumeInferer
from medsr.io.loading import LoadVolumed
from medsr.io.nifti import read_nifti
from medsr.io.writing import write_nifti
from medsr.networks.slice_sr import SliceSRNet
from medsr.phantoms import head
from medsr.transforms.intensity import PercentileToUnitd, RestoreIntensityd
from medsr.transforms.orientation import SliceAxisLastd
from medsr.transforms.results import SplitUncertaintyd
from medsr.transforms.through_plane import UpdateGeometryd
from monai.bundle import ConfigParser
from monai.data import DataLoader, MetaTensor
from monai.transforms import Compose, Invertd

FACTS = {"ratio": 4.0, "data_consistency_db": 41.5, "slice_profile": "slr"}
THICK = np.diag([1.0, 1.0, 4.0, 1.0])
THIN = np.diag([1.0, 1.0, 1.0, 1.0])
THIN[2, 3] = -1.5


def item(case: str = "a", *, uncertainty: bool = True, channels: int = 1) -> dict[str, Any]:
    """A postprocessed item as the evaluator leaves it."""
    volume = torch.rand(channels, 16, 16, 5)
    source = MetaTensor(
        volume,
        affine=torch.as_tensor(THICK),
        meta={
            "original_affine": torch.as_tensor(THICK),
            "spatial_shape": np.array([16, 16, 5]),
            "filename_or_obj": f"/secret/folder/{case}.nii.gz",
            "notes": "sform and qform differ\nscaled by the header",
            "intensity_scale": 10.0,
            "intensity_offset": 3.0,
            "sform_code": 2,
        },
    )
    meta = {"sform_code": 2, "qform_code": 0}
    fine = MetaTensor(volume.repeat_interleave(4, -1) * 10 + 3, affine=torch.as_tensor(THIN), meta=dict(meta))
    found = {"image": source, "case": case, "pred": fine}
    if uncertainty:
        found["uncertainty"] = MetaTensor(
            torch.rand(channels, 16, 16, 20), affine=torch.as_tensor(THIN), meta=dict(meta)
        )
    return found


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- output -------------------------------------------------------------------------------------------------------


def test_a_case_leaves_its_volumes_and_the_figure(tmp_path):
    output, one = CaseOutput(tmp_path), item()
    output.write(one, FACTS)
    assert files(tmp_path) == ["a_qc.png", "a_superres.nii.gz", "a_uncertainty.nii.gz"]
    assert sorted(output.written["a"]) == files(tmp_path)
    values, header = read_nifti(tmp_path / "a_superres.nii.gz")
    assert np.allclose(values, one["pred"][0].numpy())
    assert np.allclose(header.affine, THIN)
    # A code of 0 would make the file lose its position.
    assert (header.sform_code, header.qform_code) == (2, 1)


def test_a_file_with_the_name_of_a_figure_is_not_replaced_without_being_told_to(tmp_path):
    (tmp_path / "a_qc.png").write_bytes(b"a photograph of the user")
    items = [{"case": "a"}, {"case": "b"}]
    first, second = pending(tmp_path, items)
    assert first["error"].startswith("a_qc.png: is there already, but in no report as finished; choose")
    assert second == {"case": "b"}
    assert pending(tmp_path, items, figure=False) == items
    assert pending(tmp_path, items, overwrite=True) == items


@pytest.mark.parametrize("setting", ["overwrite", "figure"])
@pytest.mark.parametrize("word", ["no", "off", "", None])
def test_words_do_not_count_as_true(tmp_path, setting, word):
    with pytest.raises(SettingError, match=f"{setting} must be true or false, got"):
        CaseOutput(tmp_path, **{setting: word})


def test_what_a_network_does_not_give_is_not_written(tmp_path):
    CaseOutput(tmp_path, figure=False).write(item(uncertainty=False), {})
    assert files(tmp_path) == ["a_superres.nii.gz"]


def test_channels_become_the_fourth_axis(tmp_path):
    one = item(channels=3, uncertainty=False)
    CaseOutput(tmp_path, figure=False).write(one, {})
    values, _ = read_nifti(tmp_path / "a_superres.nii.gz")
    assert values.shape == (16, 16, 20, 3)
    assert np.allclose(values[..., 2], one["pred"][2].numpy())


def test_suffixes_may_be_chosen(tmp_path):
    CaseOutput(tmp_path, {"pred": "thin"}, figure=False).write(item(), {})
    assert files(tmp_path) == ["a_thin.nii.gz"]


@pytest.mark.parametrize("error", [RuntimeError, OutputError, KeyboardInterrupt])
def test_nothing_remains_of_a_case_whose_figure_fails(tmp_path, error):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error("no figure")

    output = CaseOutput(tmp_path)
    output.write(item("good"), FACTS)
    before = files(tmp_path)
    output.draw = fail
    with pytest.raises(error, match="no figure"):
        output.write(item("bad"), FACTS)
    assert files(tmp_path) == before
    assert list(output.written) == ["good"]


def test_nothing_remains_of_a_case_whose_second_volume_fails(tmp_path):
    one = item()
    one["uncertainty"] = one["uncertainty"] * float("nan")
    with pytest.raises(OutputError, match="NaN"):
        CaseOutput(tmp_path).write(one, FACTS)
    assert files(tmp_path) == []


def test_earlier_results_outlive_a_run_that_replaces_nothing(tmp_path):
    CaseOutput(tmp_path).write(item(), FACTS)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    broken = item()
    broken["pred"] = broken["pred"] * float("nan")
    again = CaseOutput(tmp_path, overwrite=True)
    with pytest.raises(OutputError, match="NaN"):
        again.write(broken, FACTS)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    # From the first file that was replaced on, the others of the case belong to nothing.
    broken = item()
    broken["uncertainty"] = broken["uncertainty"] * float("nan")
    with pytest.raises(OutputError, match="NaN"):
        again.write(broken, FACTS)
    assert files(tmp_path) == []


def test_results_that_the_new_run_does_not_make_go_once_it_is_whole(tmp_path):
    CaseOutput(tmp_path).write(item(), FACTS)
    CaseOutput(tmp_path).write(item("b"), FACTS)
    everything = files(tmp_path)
    again = CaseOutput(tmp_path, figure=False, overwrite=True)
    broken = item(uncertainty=False)
    broken["pred"] = broken["pred"] * float("nan")
    with pytest.raises(OutputError, match="NaN"):
        again.write(broken, FACTS)
    assert files(tmp_path) == everything
    again.write(item(uncertainty=False), FACTS)
    assert [name for name in files(tmp_path) if name.startswith("a")] == ["a_superres.nii.gz"]
    assert again.written["a"] == ["a_superres.nii.gz"]
    assert [name for name in files(tmp_path) if name.startswith("b")] == [
        name for name in everything if name.startswith("b")
    ]


def test_the_figure_is_drawn_from_the_item_and_the_facts_by_whom_one_chooses(tmp_path):
    from matplotlib.figure import Figure

    seen: list[Any] = []

    def draw(*given: Any) -> Figure:
        seen.append(given)
        return Figure(figsize=(1, 1))

    one = item()
    CaseOutput(tmp_path, draw=draw).write(one, FACTS)
    assert files(tmp_path) == ["a_qc.png", "a_superres.nii.gz", "a_uncertainty.nii.gz"]
    assert [(given[0] is one, given[1] is FACTS) for given in seen] == [(True, True)]
    CaseOutput(tmp_path, figure=False, draw=draw).write(item("b"), FACTS)
    assert len(seen) == 1


def test_a_config_chooses_how_a_case_is_drawn():
    settings = {
        "imports": ["$import medsr.handlers.qc_figure as qc_figure"],
        "plain": {"_target_": "medsr.handlers.case_output.CaseOutput", "output_dir": "out"},
        "masks": {
            "_target_": "medsr.handlers.case_output.CaseOutput",
            "output_dir": "out",
            "draw": "$qc_figure.segmentation_figure",
        },
    }
    parser = ConfigParser(settings)
    assert parser.get_parsed_content("masks").draw is segmentation_figure
    assert parser.get_parsed_content("plain").draw is superres_figure


# --- report -------------------------------------------------------------------------------------------------------


def engine_of(*items: dict[str, Any], failures: dict[str, str] | None = None) -> Any:
    return SimpleNamespace(
        state=SimpleNamespace(
            batch=[{"image": one["image"], "case": one["case"]} for one in items],
            output=[{"pred": one["pred"]} for one in items],
            device="cpu",
        ),
        inferer=SimpleNamespace(facts={**FACTS, "warnings": ["ratio 9 is beyond"]}),
        failures=failures or {},
    )


def reported(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def test_the_report_holds_geometry_warnings_and_hashes(tmp_path):
    config, weights = tmp_path / "inference.json", tmp_path / "model.pt"
    config.write_bytes(b"{}")
    weights.write_bytes(b"w")
    output = CaseOutput(tmp_path, figure=False)
    output.write(item(), FACTS)
    report = RunReport(tmp_path, {"width": 0.25}, [config], weights, output)
    report._record(engine_of(item()))
    report(engine_of(failures={"b": "b.nii.gz: truncated"}))
    found = reported(tmp_path)
    assert found["settings"] == {"width": 0.25}
    assert (found["succeeded"], found["failed"]) == (1, 1)
    assert found["sha256"] == {
        "inference.json": hashlib.sha256(b"{}").hexdigest(),
        "model.pt": hashlib.sha256(b"w").hexdigest(),
    }
    assert set(found["versions"]) == {"medsr", "monai", "numpy", "torch", "python"}
    assert found["cases"]["b"] == {"status": "failed", "reason": "b.nii.gz: truncated"}
    case = found["cases"]["a"]
    assert case["input"] == "a.nii.gz"
    assert (case["input_size"], case["output_size"]) == ([16, 16, 5], [16, 16, 20])
    assert (case["input_spacing_mm"], case["output_spacing_mm"]) == ([1, 1, 4], [1, 1, 1])
    assert case["files"] == ["a_superres.nii.gz", "a_uncertainty.nii.gz"]
    assert case["warnings"] == ["sform and qform differ", "scaled by the header", "ratio 9 is beyond"]
    assert case["data_consistency_db"] == 41.5
    assert case["seconds"] >= 0


def test_the_report_says_what_was_removed_per_grid_and_class(tmp_path):
    one = item()
    lost = {"pred": {1: {"islands": 3, "ml": 1.5}}, "pred_thick": {}}
    one["pred_thick"] = MetaTensor(one["image"].as_tensor(), affine=one["image"].affine)
    one["probability"] = torch.zeros(2, 16, 16, 20)
    for key, removed in lost.items():
        one[key].meta["islands_removed"] = removed
    engine = engine_of(one)
    engine.state.output = [{key: one[key] for key in ("pred", "pred_thick", "probability")}]
    report = RunReport(tmp_path, describe=segmented_volume_facts)
    report._record(engine)
    report.write()
    case, nothing = reported(tmp_path)["cases"]["a"], {"islands": 0, "ml": 0.0}
    assert case["islands_removed"] == {
        "thin_grid": {"1": {"islands": 3, "ml": 1.5}, "2": nothing},
        "input_grid": {"1": nothing, "2": nothing},
    }
    assert case["output_size"] == [16, 16, 20]


SHAPING = {"width": 0.25, "patch_size": (8, 8)}


def run_of(folder: Path, *cases: str, failed: str = "", settings: Mapping[str, Any] | None = None) -> None:
    """A run that writes these cases into the folder."""
    output = CaseOutput(folder, figure=False, overwrite=True)
    report = RunReport(folder, settings or SHAPING, output=output)
    for case in cases:
        one = {**item(), "case": case}
        output.write(one, FACTS)
        report._record(engine_of(one))
    report(engine_of(failures={failed: "reason"} if failed else {}))


def test_cases_of_earlier_runs_stay_in_the_report(tmp_path):
    run_of(tmp_path, "a", "b", failed="c")
    first = reported(tmp_path)["written"]
    run_of(tmp_path, "d")
    found = reported(tmp_path)
    assert list(found["cases"]) == ["a", "b", "d"]
    assert (found["succeeded"], found["failed"]) == (3, 0)
    assert found["cases"]["a"]["files"] == ["a_superres.nii.gz", "a_uncertainty.nii.gz"]
    # Nothing but the time was different.
    assert found["cases"]["a"]["earlier_run"] == {"written": first}
    assert "earlier_run" not in found["cases"]["d"]


def test_cases_that_are_run_again_or_whose_files_are_gone_do_not(tmp_path):
    run_of(tmp_path, "a", "b", "c", failed="d")
    (tmp_path / "b_uncertainty.nii.gz").unlink()
    run_of(tmp_path, "a", failed="c")
    found = reported(tmp_path)
    assert {case: entry["status"] for case, entry in found["cases"].items()} == {"a": "done", "c": "failed"}
    assert not any("earlier_run" in entry for entry in found["cases"].values())


def test_the_report_tells_how_cases_of_earlier_runs_were_made(tmp_path):
    run_of(tmp_path, "a", settings={"width": 0.5})
    first = reported(tmp_path)["written"]
    for case in "bc":
        run_of(tmp_path, case)
        assert reported(tmp_path)["cases"]["a"]["earlier_run"] == {
            "written": first,
            "settings": {"width": 0.5},
        }
    assert set(reported(tmp_path)["cases"]["b"]["earlier_run"]) == {"written"}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"cases": 3}', '{"cases": {"a": 1}}', '{"cases": {"a": {"files": [1]}}}']
)
def test_a_report_that_says_nothing_is_replaced(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    run_of(tmp_path, "b")
    assert list(reported(tmp_path)["cases"]) == ["b"]


def test_a_time_series_keeps_its_repetition_time(tmp_path):
    import nibabel as nib

    for channels in (1, 3):
        one = item(channels=channels)
        for key in ("pred", "uncertainty"):
            one[key].meta.update(step=torch.tensor([2.5]), step_unit="sec")
        CaseOutput(tmp_path / str(channels), figure=False).write(one, FACTS)
        found = nib.load(tmp_path / str(channels) / "a_superres.nii.gz").header
        assert found.get_xyzt_units() == ("mm", "sec" if channels == 3 else "unknown")
        assert found.get_zooms() == ((1, 1, 1, 2.5) if channels == 3 else (1, 1, 1))


def test_the_facts_of_the_inferer_are_not_used_up(tmp_path):
    engine = engine_of(item())
    RunReport(tmp_path)._record(engine)
    assert engine.inferer.facts["warnings"] == ["ratio 9 is beyond"]


def test_a_case_that_failed_ends_the_process_with_a_status(tmp_path, caplog):
    report = RunReport(tmp_path)
    report._record(engine_of(item()))
    report.finish()
    report(engine_of(failures={"b": "reason"}))
    with caplog.at_level(logging.ERROR), pytest.raises(SystemExit) as stop:
        report.finish()
    assert stop.value.code == 1
    assert "1 of 2 cases failed" in caplog.text


# --- the whole way from file to file ------------------------------------------------------------------------------


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """A good sagittal scan with thick slices along the first axis, and a damaged one."""
    folder = tmp_path / "secret-name"
    folder.mkdir()
    volume = head(16)[0].reshape(4, 4, 16, 16).mean(axis=1).repeat(2, axis=1).repeat(2, axis=2)
    write_nifti(folder / "good.nii.gz", volume[:, :18, :17], affine=np.diag([3.0, 1.0, 1.0, 1.0]))
    (folder / "bad.nii.gz").write_bytes((folder / "good.nii.gz").read_bytes()[:-100])
    return folder


def run(scans: Path, out: Path) -> tuple[CaseEvaluator, RunReport]:
    out.mkdir()
    torch.manual_seed(0)
    keys = ["pred", "uncertainty"]
    preprocessing = Compose([LoadVolumed("image"), SliceAxisLastd("image"), PercentileToUnitd("image")])
    postprocessing = Compose(
        [
            SplitUncertaintyd("pred"),
            RestoreIntensityd(keys, magnitude_keys=("uncertainty",)),
            Invertd(keys, preprocessing, orig_keys="image", nearest_interp=False),
            UpdateGeometryd(keys),
        ]
    )
    data = [{"image": str(scans / f"{case}.nii.gz"), "case": case} for case in ("bad", "good")]
    output = CaseOutput(out)
    report = RunReport(out, output=output)
    evaluator = CaseEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(CaseDataset(data, preprocessing), batch_size=1),
        network=SliceSRNet(0.125, head="uncertainty", branches=4),
        inferer=VolumeInferer(amp="float32", tile=None),
        postprocessing=postprocessing,
        val_handlers=[output, report],
    )
    evaluator.run()
    return evaluator, report


def test_from_file_to_file_with_one_bad_case(scans, tmp_path, caplog):
    with caplog.at_level(logging.CRITICAL):
        evaluator, report = run(scans, tmp_path / "out")
    assert list(evaluator.failures) == ["bad"]
    assert files(tmp_path / "out") == [
        "good_qc.png",
        "good_superres.nii.gz",
        "good_uncertainty.nii.gz",
        "report.json",
    ]
    values, header = read_nifti(tmp_path / "out" / "good_superres.nii.gz")
    assert values.shape == (12, 18, 17)
    # The slices become thinner, the field of view stays: the origin moves by one new slice.
    assert np.allclose(header.affine[:3, :3], np.eye(3))
    assert np.allclose(header.affine[:3, 3], [-1.0, 0.0, 0.0])
    # The unit is that of the input, not [0, 1].
    source, _ = read_nifti(scans / "good.nii.gz")
    assert float(values.mean()) == pytest.approx(float(source.mean()), rel=0.05)
    with caplog.at_level(logging.CRITICAL), pytest.raises(SystemExit):
        report.finish()


def test_no_folder_and_no_content_is_in_the_report(scans, tmp_path, caplog):
    with caplog.at_level(logging.CRITICAL):
        run(scans, tmp_path / "out")
    text = (tmp_path / "out" / "report.json").read_text()
    assert "good.nii.gz" in text
    assert "bad.nii.gz" in text
    assert "secret" not in text
    assert str(tmp_path) not in text
    found = json.loads(text)
    assert found["cases"]["good"]["method"] == "network"
    assert found["cases"]["bad"]["status"] == "failed"
    assert (found["succeeded"], found["failed"]) == (1, 1)


def pending(folder: Path, items: list[dict[str, str]], **settings: Any) -> list[Mapping[str, str]]:
    return RunReport(folder, SHAPING, output=CaseOutput(folder, **settings)).pending(items)


def test_what_an_interrupted_run_has_finished_is_not_done_again(tmp_path):
    items = [{"case": "a"}, {"case": "b"}, {"case": "c", "error": "c: no partner"}]
    assert pending(tmp_path, items) == items
    run_of(tmp_path, "a")
    # It drew no figure, and said so in its report.
    assert pending(tmp_path, items) == items[1:]
    assert pending(tmp_path, items, overwrite=True) == items
    run_of(tmp_path, "b")
    assert pending(tmp_path, items[:2]) == []
    # Without a report nobody knows by which settings results were made.
    (tmp_path / "report.json").unlink()
    found = pending(tmp_path, items)
    assert found[0]["error"].startswith("a_superres.nii.gz: is there already, but in no report as finished")
    assert [one["case"] for one in found] == ["a", "b", "c"]


def test_another_input_of_the_same_name_is_not_taken_for_the_finished_one(tmp_path):
    def scan(folder: str, seed: int) -> dict[str, str]:
        path = tmp_path / folder / "a.nii"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(np.random.default_rng(seed).bytes(300_000))
        return {"case": "a", "image": str(path)}

    out = tmp_path / "out"
    first = RunReport(out, SHAPING, output=CaseOutput(out, figure=False))
    assert first.pending([scan("one", 0)]) == [scan("one", 0)]
    first.output.write(item(), FACTS)
    first._record(engine_of(item()))
    first(engine_of())
    # A copy elsewhere is the same input.
    assert pending(out, [scan("one", 0)]) == pending(out, [scan("copy", 0)]) == []
    (found,) = pending(out, [scan("other", 1)])
    assert found["error"].startswith(
        "a_superres.nii.gz: is there already, made of another input of this name"
    )
    assert pending(out, [scan("other", 1)], overwrite=True) == [scan("other", 1)]
    # The run that it fails tells so, and forgets nothing of the one that has finished.
    finished = reported(out)["cases"]["a"]
    for _ in range(2):
        failed = RunReport(out, SHAPING, output=CaseOutput(out, figure=False))
        failed(engine_of(failures={"a": "made of another input"}))
        entry = reported(out)["cases"]["a"]
        assert (entry["status"], reported(out)["failed"]) == ("failed", 1)
        assert entry["kept"].items() >= finished.items()
    assert pending(out, [scan("one", 0)]) == []
    RunReport(out, SHAPING, output=CaseOutput(out, figure=False)).write()
    assert reported(out)["cases"]["a"].items() >= finished.items()


def test_a_sidecar_that_was_corrected_makes_another_input(tmp_path):
    scan, sidecar, out = tmp_path / "a.nii.gz", tmp_path / "a.json", tmp_path / "out"
    scan.write_bytes(b"scan")
    sidecar.write_text('{"SliceThickness": 4}')
    items = [{"case": "a", "image": str(scan)}]
    first = RunReport(out, SHAPING, output=CaseOutput(out, figure=False))
    assert first.pending(items) == items
    first.output.write(item(), FACTS)
    first._record(engine_of(item()))
    first(engine_of())
    assert pending(out, items) == []
    sidecar.write_text('{"SliceThickness": 2}')
    assert "made of another input" in pending(out, items)[0]["error"]


def test_what_a_report_of_an_earlier_release_does_not_say_is_taken_to_be_the_same(tmp_path):
    scan, taps, out = tmp_path / "a.nii.gz", tmp_path / "taps.txt", tmp_path / "out"
    for file in (scan, scan.with_name("a.json"), taps):
        file.write_bytes(b"1")
    items, settings = [{"case": "a", "image": str(scan)}], {"slice_profile": str(taps)}
    first = RunReport(out, settings, output=CaseOutput(out, figure=False))
    first.pending(items)
    first.output.write(item(), FACTS)
    first._record(engine_of(item()))
    first(engine_of())
    report = reported(out)
    del report["cases"]["a"]["sidecar_digest"], report["sha256"]["taps.txt"]
    (out / "report.json").write_text(json.dumps(report))
    assert RunReport(out, settings, output=CaseOutput(out, figure=False)).pending(items) == []


def test_a_profile_that_was_edited_is_another_setting(tmp_path):
    taps, out = tmp_path / "taps.txt", tmp_path / "out"
    taps.write_text("1 2 1")
    settings = {"slice_profile": str(taps), "target": "0.5"}
    run_of(out, "a", settings=settings)
    assert reported(out)["settings"]["slice_profile"] == "taps.txt"
    assert list(reported(out)["sha256"]) == ["taps.txt"]
    again = CaseOutput(out, figure=False)
    assert RunReport(out, settings, output=again).pending([{"case": "a"}]) == []
    taps.write_text("1 3 1")
    with pytest.raises(OutputError, match=r"^a: is there already, made with another taps\.txt; choose"):
        RunReport(out, settings, output=again).pending([{"case": "a"}])


def test_two_runs_at_a_time_keep_each_other_s_cases(tmp_path):
    reports = []
    for _ in range(2):
        reports.append(RunReport(tmp_path, SHAPING, output=CaseOutput(tmp_path, figure=False)))
        reports[-1].write()
    for case, report in zip(("a", "b"), reports, strict=True):
        one = {**item(), "case": case}
        report.output.write(one, FACTS)
        report._record(engine_of(one))
        report(engine_of())
    reports[0].write()
    assert sorted(reported(tmp_path)["cases"]) == ["a", "b"]
    assert pending(tmp_path, [{"case": "a"}, {"case": "b"}]) == []


def test_a_report_that_cannot_be_read_for_a_moment_loses_nothing(tmp_path, monkeypatch):
    run_of(tmp_path, "a")
    report = RunReport(tmp_path, SHAPING, output=CaseOutput(tmp_path, figure=False))
    report.write()
    real = Path.read_text

    def locked(self, *args, **settings):
        if self.name == "report.json":
            raise PermissionError
        return real(self, *args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", locked)
        report.write()
    assert list(reported(tmp_path)["cases"]) == ["a"]


def test_results_of_other_settings_or_weights_are_not_taken_for_these(tmp_path):
    run_of(tmp_path, "a")
    items = [{"case": "a"}, {"case": "b"}]
    output = CaseOutput(tmp_path)
    with pytest.raises(OutputError, match=r"^a: is there already, made with width 0\.25, not 0\.5; choose"):
        RunReport(tmp_path, {**SHAPING, "width": 0.5}, output=output).pending(items)
    weights = tmp_path / "model.pt"
    weights.write_bytes(b"weights")
    with pytest.raises(OutputError, match=r"made with another model\.pt; .* set overwrite to true$"):
        RunReport(tmp_path, SHAPING, weights=weights, output=output).pending(items)
    other = CaseOutput(tmp_path, overwrite=True)
    assert RunReport(tmp_path, {"width": 0.5}, output=other).pending(items) == items
    assert RunReport(tmp_path, {"width": 0.5}, output=output).pending(items[1:]) == items[1:]


def test_results_of_another_bundle_are_refused_in_a_short_line(tmp_path):
    run_of(tmp_path, "a")
    other = {"width": 0.5, **{f"setting_{k}": k for k in range(20)}}
    report = RunReport(tmp_path, other, output=CaseOutput(tmp_path))
    with pytest.raises(
        OutputError, match=r"made with [^;]*; [^;]*; [^;]* and 1[89] other differences;"
    ) as error:
        report.pending([{"case": "a"}])
    assert len(str(error.value)) < 250


def test_a_layout_of_folders_and_what_is_left_to_do(tmp_path):
    output = CaseOutput(
        tmp_path / "pseudo",
        {"pred": "images", "uncertainty": "uncertainty"},
        False,
        layout="{suffix}/{case}.nii.gz",
    )
    items = [{"case": "a"}, {"case": "b"}]
    report = RunReport(tmp_path / "pseudo", output=output)
    assert report.pending(items) == items
    output.write(item("a"), FACTS)
    report._record(engine_of(item("a")))
    report(engine_of())
    assert files(tmp_path / "pseudo" / "images") == ["a.nii.gz"]
    assert output.written["a"] == ["images/a.nii.gz", "uncertainty/a.nii.gz"]
    assert report.pending(items) == [{"case": "b"}]
    # Half of a case is not a case.
    (tmp_path / "pseudo" / "uncertainty" / "a.nii.gz").unlink()
    assert report.pending(items)[0]["error"].startswith("images/a.nii.gz: is there already, but in no report")


def test_whole_numbers_are_stored_as_such(tmp_path):
    found = item(uncertainty=False)
    found["pred"] = MetaTensor(torch.ones(1, 4, 4, 8, dtype=torch.uint8), affine=found["pred"].affine)
    CaseOutput(tmp_path, {"pred": "seg"}, figure=False).write(found, FACTS)
    import nibabel

    assert nibabel.load(tmp_path / "a_seg.nii.gz").get_data_dtype() == np.uint8


def test_a_report_of_another_program_is_not_replaced(tmp_path):
    report, items = tmp_path / "report.json", [{"case": "a"}]
    report.write_text('{"pages": 3}')
    with pytest.raises(OutputError, match=r"report\.json: is there already, and of another program"):
        pending(tmp_path, items)
    assert pending(tmp_path, items, overwrite=True) == items


@pytest.mark.parametrize("overwrite", [False, True])
def test_no_result_replaces_an_input(tmp_path, overwrite):
    items = [{"case": name, "image": str(tmp_path / f"{name}.nii.gz")} for name in ("t2", "t2_superres")]
    for one in items:
        Path(one["image"]).write_bytes(b"scan")
    with pytest.raises(OutputError, match=r"t2_superres\.nii\.gz: the result of t2 would replace this input"):
        pending(tmp_path, items, overwrite=overwrite)
    assert pending(tmp_path / "out", items, overwrite=overwrite) == items


def test_what_is_read_as_a_whole_holds_no_case_of_an_earlier_run(tmp_path):
    for case in ("a", "b"):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{case}.nii.gz").write_bytes(b"volume")
    layout = {"layout": "{suffix}/{case}.nii.gz", "suffixes": {"pred": "images"}, "overwrite": True}
    both = [{"case": "a"}, {"case": "b"}]
    assert pending(tmp_path, both, alone=True, **layout) == both
    assert pending(tmp_path, both[:1], **layout) == both[:1]
    with pytest.raises(OutputError, match=r"images/b\.nii\.gz: is there from an earlier run"):
        pending(tmp_path, both[:1], alone=True, **layout)
