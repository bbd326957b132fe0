"""The first bundle: good and bad inputs, bad settings, interruption, adaptation, comparison and training."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from medsr import catalog

NAME = "mri_rehrseg_superres"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:parsing config_file"),
    pytest.mark.filterwarnings("ignore:.*NvImgCodec"),
]

# Small enough for a test on the CPU; the ratio fits the short blocks.
TINY = ("block_size=[24,24,40]", "batch_size=2", "ratio=[2,4]", "iterations=3")


@pytest.fixture(scope="module")
def root() -> Path:
    return catalog.bundle_root(NAME)


@pytest.fixture
def thick(tmp_path: Path, phantom: Callable[..., Path]) -> Path:
    return phantom(tmp_path / "data" / "head.nii.gz")


@pytest.fixture
def sharp(tmp_path: Path, phantom: Callable[..., Path]) -> Path:
    return phantom(tmp_path / "data" / "sharp.nii.gz", spacing_mm=1)


@pytest.fixture
def medsr(medsr_here: Callable[..., Any]) -> Callable[..., tuple[int, list[str]]]:
    return partial(medsr_here, NAME)


def load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import nibabel as nib

    image = nib.load(path)
    return np.asarray(image.dataobj), image.affine


def report_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


# --- One folder with everything that a folder may hold ---------------------------------------------------------


def write_series(folder: Path, edit: Callable[[int, Any], object] = lambda index, dataset: None) -> None:
    """Six axial slices, 4 mm thick every 5 mm; ``edit`` changes a slice in place."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 1000, size=(6, 24, 20), dtype=np.uint16)
    for index in range(6):
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.SOPClassUID = MRImageStorage
        dataset.SOPInstanceUID = f"1.2.3.1.{index + 1}"
        dataset.SeriesInstanceUID = "1.2.3.1"
        dataset.Modality = "MR"
        dataset.ImagePositionPatient = [0, 0, 5 * index]
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.PixelSpacing = [1, 1]
        dataset.SliceThickness = 4
        dataset.SamplesPerPixel = 1
        dataset.PhotometricInterpretation = "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
        dataset.PixelRepresentation = 0
        dataset.Rows, dataset.Columns = 24, 20
        dataset.PixelData = pixels[index].tobytes()
        edit(index, dataset)
        dataset.save_as(folder / f"{index}.dcm", enforce_file_format=True)


def without_position(index: int, dataset: Any) -> None:
    if index == 2:
        del dataset.ImagePositionPatient


def with_repeated_position(index: int, dataset: Any) -> None:
    if index == 3:
        dataset.ImagePositionPatient = [0, 0, 10]


def with_second_series(index: int, dataset: Any) -> None:
    if index > 2:
        dataset.SeriesInstanceUID = "1.2.3.2"


def with_other_orientation(index: int, dataset: Any) -> None:
    if index == 4:
        dataset.ImageOrientationPatient = [0, 1, 0, -1, 0, 0]


def set_header(path: Path, offset: int, value: float) -> None:
    """Change one float of an uncompressed NIfTI-1 header."""
    content = bytearray(path.read_bytes())
    content[offset : offset + 4] = np.float32(value).tobytes()
    path.write_bytes(bytes(content))


BAD = {
    "junk": "not gzip-compressed",
    "truncated": "truncated",
    "flat": "2D image",
    "isotropic": "already near-isotropic",
    "holes": "NaN",
    "constant": "constant image",
    "zero": "pixdim",
    "dicom_no_position": "ImagePositionPatient is missing in 1 of 6",
    "dicom_repeated": "two different images at one position",
    "dicom_two_series": "2 series in one folder",
    "dicom_turned": "another orientation",
}
GOOD = ("axial", "sagittal", "fractional", "three", "series4d", "disagree", "dicom")


@dataclass(frozen=True)
class Mixed:
    data: Path
    out: Path
    process: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def mixed(
    root: Path,
    tmp_path_factory: pytest.TempPathFactory,
    head_phantom: Callable[..., tuple[np.ndarray, np.ndarray]],
    nifti: Callable[[Path, np.ndarray, np.ndarray], Path],
    monai_run: Callable[..., Any],
) -> Mixed:
    """One run over good and bad cases side by side: starting a process costs more than ten cases."""
    data = tmp_path_factory.mktemp("mixed")
    array, affine = head_phantom()
    path = nifti(data / "axial.nii.gz", array, affine)
    (data / "truncated.nii.gz").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (data / "junk.nii.gz").write_bytes(b"this is no image " * 100)
    nifti(data / "sagittal.nii.gz", array.transpose(2, 0, 1), affine[:, [2, 0, 1, 3]])
    nifti(data / "fractional.nii.gz", *head_phantom(3.3))
    nifti(data / "three.nii.gz", array[..., :3], affine)
    nifti(data / "series4d.nii.gz", np.stack([array, array[..., ::-1]], axis=-1), affine)
    set_header(nifti(data / "disagree.nii", array, affine), 268, 30.0)
    nifti(data / "flat.nii.gz", array[..., :1], affine)
    nifti(data / "isotropic.nii.gz", *head_phantom(1))
    holes = array.copy()
    holes[3, 4, 5] = np.nan
    nifti(data / "holes.nii.gz", holes, affine)
    nifti(data / "constant.nii.gz", np.full_like(array, 7), affine)
    set_header(nifti(data / "zero.nii", array, affine), 76 + 4 * 3, 0.0)
    write_series(data / "dicom")
    write_series(data / "dicom_no_position", without_position)
    write_series(data / "dicom_repeated", with_repeated_position)
    write_series(data / "dicom_two_series", with_second_series)
    write_series(data / "dicom_turned", with_other_orientation)
    out = tmp_path_factory.mktemp("mixed_out")
    process = monai_run(
        root / "configs" / "inference.json", dataset_dir=data, output_dir=out, figure=False, amp="float32"
    )
    return Mixed(data, out, process)


def test_bad_cases_are_left_out_and_the_others_go_on(mixed: Mixed) -> None:
    assert mixed.process.returncode == 1, mixed.process.stderr
    assert "Traceback" not in mixed.process.stderr
    report = report_of(mixed.out)
    assert {name for name, case in report["cases"].items() if case["status"] == "done"} == set(GOOD)
    assert (report["succeeded"], report["failed"]) == (len(GOOD), len(BAD))
    expected = {f"{name}_{kind}.nii.gz" for name in GOOD for kind in ("superres", "uncertainty")}
    assert {path.name for path in mixed.out.iterdir()} == {*expected, "report.json"}


@pytest.mark.parametrize(("case", "reason"), BAD.items())
def test_each_bad_case_has_one_clear_line(mixed: Mixed, case: str, reason: str) -> None:
    lines = [line.partition(" - ERROR - ")[2] for line in mixed.process.stderr.splitlines()]
    (line,) = [line for line in lines if line.startswith((f"{case}.nii", f"{case}:"))]
    assert reason in line
    assert report_of(mixed.out)["cases"][case] == {"status": "failed", "reason": line}


def test_a_sagittal_stack_gives_the_same_voxels_in_its_own_axes(mixed: Mixed) -> None:
    axial, affine = load(mixed.out / "axial_superres.nii.gz")
    sagittal, turned = load(mixed.out / "sagittal_superres.nii.gz")
    assert axial.shape == (40, 36, 40)
    np.testing.assert_array_equal(sagittal, axial.transpose(2, 0, 1))
    np.testing.assert_allclose(turned, affine[:, [2, 0, 1, 3]], atol=1e-5)
    axial, sagittal = (load(mixed.out / f"{name}_uncertainty.nii.gz")[0] for name in ("axial", "sagittal"))
    np.testing.assert_array_equal(sagittal, axial.transpose(2, 0, 1))


def test_result_is_the_head_and_not_only_a_grid(mixed: Mixed, head_phantom: Callable[..., Any]) -> None:
    truth, _ = head_phantom(1)
    found, affine = load(mixed.out / "axial_superres.nii.gz")
    np.testing.assert_allclose(affine, head_phantom(1)[1], atol=1e-4)
    shifted = np.roll(found, 4, axis=2)
    assert np.corrcoef(found.ravel(), truth.ravel())[0, 1] > 0.85
    assert np.abs(found - truth).mean() < np.abs(shifted - truth).mean()
    uncertainty, same = load(mixed.out / "axial_uncertainty.nii.gz")
    assert uncertainty.shape == found.shape
    assert uncertainty.min() >= 0
    np.testing.assert_array_equal(same, affine)


def test_a_ratio_need_not_be_whole(mixed: Mixed, head_phantom: Callable[..., Any]) -> None:
    array, affine = head_phantom(3.3)
    found, fine = load(mixed.out / "fractional_superres.nii.gz")
    count = round(array.shape[2] * 3.3)
    assert found.shape == (40, 36, count)
    assert np.linalg.norm(fine[:3, 2]) == pytest.approx(1, abs=1e-4)
    middle, fine_middle = [0, 0, (array.shape[2] - 1) / 2, 1], [0, 0, (count - 1) / 2, 1]
    np.testing.assert_allclose(fine @ fine_middle, affine @ middle, atol=1e-3)


def test_what_is_unusual_stands_in_the_report(mixed: Mixed) -> None:
    cases = report_of(mixed.out)["cases"]
    assert cases["axial"]["warnings"] == []
    assert cases["axial"]["method"] == "network"
    assert cases["three"]["method"] == "cubic interpolation"
    assert "only 3 slices" in " ".join(cases["three"]["warnings"])
    assert "sform" in " ".join(cases["disagree"]["warnings"])
    # Slices of 4 mm every 5 mm: the profile follows the thickness.
    assert cases["dicom"]["slice_thickness_per_spacing"] == 0.8
    assert "gap of 1 mm" in " ".join(cases["dicom"]["warnings"])


def test_where_sform_and_qform_disagree_the_sform_counts(mixed: Mixed) -> None:
    np.testing.assert_array_equal(
        load(mixed.out / "disagree_superres.nii.gz")[1], load(mixed.out / "axial_superres.nii.gz")[1]
    )


def test_time_points_are_processed_alone(mixed: Mixed) -> None:
    found, affine = load(mixed.out / "series4d_superres.nii.gz")
    single, expected = load(mixed.out / "axial_superres.nii.gz")
    assert found.shape == (40, 36, 40, 2)
    # Both volumes make the scale, hence a trace of a difference.
    np.testing.assert_allclose(found[..., 0], single, atol=0.1)
    assert not np.allclose(found[..., 1], single, atol=10)
    np.testing.assert_array_equal(affine, expected)


# --- Settings ---------------------------------------------------------------------------------------------------


def test_an_isotropic_volume_runs_with_force(sharp: Path, tmp_path: Path, medsr: Callable[..., Any]) -> None:
    out = tmp_path / "out"
    status, lines = medsr(sharp, out=out)
    assert status == 2
    assert "already near-isotropic" in lines[0]
    assert len(lines) == 1
    assert medsr(sharp, out=out, settings=("force=true", "figure=false"))[0] == 0
    found, affine = load(out / "sharp_superres.nii.gz")
    expected, same = load(sharp)
    assert found.shape == expected.shape
    np.testing.assert_allclose(affine, same, atol=1e-5)


def test_target_spacing_is_what_comes_out(thick: Path, tmp_path: Path, medsr: Callable[..., Any]) -> None:
    out = tmp_path / "out"
    assert medsr(thick, out=out, settings=("target_spacing_mm=2", "figure=false"))[0] == 0
    found, affine = load(out / "head_superres.nii.gz")
    before = load(thick)[1]
    assert found.shape == (40, 36, 20)
    np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), (1, 1, 2), atol=1e-5)
    # The new slices of a slab surround its centre.
    np.testing.assert_allclose(affine @ [0, 0, 0.5, 1], before @ [0, 0, 0, 1], atol=1e-4)


@pytest.mark.parametrize(
    ("setting", "status", "reason"),
    [
        ("slice_profile=foo", 4, "foo"),
        ("slice_thickness_mm=-1", 4, "slice_thickness_mm must be a number > 0"),
        ("slice_thickness_mm=abc", 4, "slice_thickness_mm must be a number > 0, got 'abc'"),
        ("target_spacing_mm=0", 4, "target_spacing_mm must be a number > 0"),
        ("target_spacing_mm=1e9", 4, "target_spacing_mm 1e+09 is coarser than the slices"),
        ("weights=null", 3, "no weights"),
        ("device=cuda:99", 4, "device cuda:99 cannot be used here"),
        ("consistency=2", 4, "consistency"),
        ("tile=1", 4, "tile"),
        ("width=0.001", 4, "width"),
        ("width=0.5", 3, "width"),
        ("slice_profil=box", 4, "did you mean slice_profile?"),
        ("weights=nowhere.pt", 3, "nowhere.pt: no such weight file"),
    ],
)
def test_a_bad_setting_is_one_line_and_nothing_is_written(
    thick: Path, tmp_path: Path, medsr: Callable[..., Any], setting: str, status: int, reason: str
) -> None:
    out = tmp_path / "out"
    found, lines = medsr(thick, out=out, settings=(setting,))
    assert (found, len(lines)) == (status, 1), lines
    assert reason in lines[0]
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize(
    ("damage", "reason"),
    [("flipped", "not the listed file"), ("truncated", "damaged"), ("other", "made for another network")],
)
def test_unusable_weights_are_refused(
    root: Path, thick: Path, tmp_path: Path, medsr: Callable[..., Any], damage: str, reason: str
) -> None:
    import torch

    # A digest is demanded in a bundle; weights of one's own have none.
    folder = tmp_path / ("models" if damage == "flipped" else "mine")
    shutil.copytree(root / "models", folder)
    weights = folder / "model.pt"
    content = bytearray(weights.read_bytes())
    if damage == "flipped":
        # In the middle of some kernel: it would load without a complaint.
        content[len(content) // 2] ^= 64
        weights.write_bytes(bytes(content))
    else:
        (folder / "SHA256SUMS").unlink()
        weights.write_bytes(bytes(content[: len(content) // 2]))
    if damage == "other":
        torch.save({"layer.weight": torch.zeros(2)}, weights)
    out = tmp_path / "out"
    status, lines = medsr(thick, out=out, settings=(f"weights={weights}",))
    assert (status, len(lines)) == (3, 1), lines
    assert reason in lines[0]
    assert not out.exists()


def test_unusable_inputs_and_outputs_are_one_line(
    thick: Path, tmp_path: Path, medsr: Callable[..., Any]
) -> None:
    empty, out, taken = tmp_path / "empty", tmp_path / "out", tmp_path / "taken"
    empty.mkdir()
    taken.write_text("a file")
    twin = tmp_path / "twin" / "head.nii.gz"
    twin.parent.mkdir()
    shutil.copy(thick, twin)
    for inputs, target, expected, reason in (
        ([empty], out, 2, "no .nii or .nii.gz file"),
        ([tmp_path / "missing"], out, 2, "no such file or folder"),
        ([thick, twin], out, 2, "same case name head"),
        ([thick], taken, 5, "taken"),
        ([thick], taken / "below", 5, "below"),
    ):
        status, lines = medsr(*inputs, out=target)
        assert (status, len(lines)) == (expected, 1), lines
        assert reason in lines[0]
        assert not out.exists()
    assert taken.read_text() == "a file"


@pytest.mark.parametrize(
    ("settings", "status"), [({"slice_thickness_mm": "-1"}, 4), ({"weights": "nowhere.pt"}, 3)]
)
def test_monai_reports_bad_settings_in_one_line_too(
    root: Path,
    thick: Path,
    tmp_path: Path,
    monai_run: Callable[..., Any],
    one_error: Callable[[Any], str],
    settings: dict[str, Any],
    status: int,
) -> None:
    config = root / "configs" / "inference.json"
    process = monai_run(config, dataset_dir=thick, output_dir=tmp_path / "out", **settings)
    assert next(iter(settings.values())) in one_error(process)
    assert process.returncode == status


# --- Interruption -----------------------------------------------------------------------------------------------


def test_a_stopped_run_leaves_whole_cases_only(root: Path, thick: Path, tmp_path: Path) -> None:
    from medsr.io.nifti import read_nifti

    data, out = thick.parent, tmp_path / "out"
    for number in range(30):
        shutil.copy(thick, data / f"copy{number:02d}.nii.gz")
    command = [
        sys.executable,
        "-m",
        "monai.bundle",
        "run",
        "--config_file",
        root / "configs" / "inference.json",
    ]
    command += ["--dataset_dir", data, "--output_dir", out]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        # A volume without its case being complete: the most delicate moment that can be seen from outside.
        deadline = time.monotonic() + 120
        while not list(out.glob("*_superres.nii.gz")) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=60)[1].decode()
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "Traceback" not in errors
    files = {path.name for path in out.iterdir()} - {"report.json"}
    done = {name.partition("_")[0] for name in files}
    assert len(done) < 30
    kinds = ("superres.nii.gz", "uncertainty.nii.gz", "qc.png")
    assert files == {f"{case}_{kind}" for case in done for kind in kinds}
    for name in files:
        if name.endswith(".nii.gz"):
            read_nifti(out / name)
    if (out / "report.json").exists():
        assert set(report_of(out)["cases"]) <= done


# --- Overlays ---------------------------------------------------------------------------------------------------


def test_adaptation_changes_the_result_and_not_the_bundle(
    root: Path, thick: Path, tmp_path: Path, medsr: Callable[..., Any]
) -> None:
    import torch

    digest = catalog.weights_digest(root)
    out, plain, weights = tmp_path / "out", tmp_path / "plain", tmp_path / "weights"
    settings = ("adapt_minutes=0.02", f"adapted_weights_dir={weights}", "figure=false")
    assert medsr(thick, out=out, config=("inference.json", "adapt.json"), settings=settings)[0] == 0
    case = report_of(out)["cases"]["head"]
    assert case["adaptation"]["iterations"] >= 1
    assert catalog.weights_digest(root) == digest
    (saved,) = weights.glob("*.pt")
    adapted = torch.load(saved, weights_only=True)
    shipped = torch.load(root / "models" / "model.pt", weights_only=True)
    assert {key: value.shape for key, value in adapted.items()} == {k: v.shape for k, v in shipped.items()}
    assert any(not torch.equal(adapted[key], shipped[key]) for key in shipped)
    # The saved weights serve the next scan of the protocol, and give what the adapted network gave.
    again = (f"weights={saved}", "both_directions=true", "figure=false")
    assert medsr(thick, out=plain, settings=again)[0] == 0
    np.testing.assert_allclose(
        load(plain / "head_superres.nii.gz")[0], load(out / "head_superres.nii.gz")[0], atol=1e-2
    )


def test_results_of_an_earlier_run_are_replaced_only_when_asked(
    thick: Path, tmp_path: Path, medsr: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    assert medsr(thick, out=out, settings=("figure=false",))[0] == 0
    before = {path.name: path.read_bytes() for path in out.glob("*.nii.gz")}
    # There is nothing left to do.
    assert medsr(thick, out=out, settings=("figure=false",)) == (0, [])
    status, lines = medsr(thick, out=out, settings=("figure=false", "consistency=0"))
    assert status != 0
    assert len(lines) == 1
    assert "head: is there already, made with consistency 1.0, not 0" in lines[0]
    assert "overwrite" in lines[0]
    assert {path.name: path.read_bytes() for path in out.glob("*.nii.gz")} == before
    assert medsr(thick, out=out, settings=("figure=false", "consistency=0", "overwrite=true"))[0] == 0
    assert (out / "head_superres.nii.gz").read_bytes() != before["head_superres.nii.gz"]


def test_comparison_has_one_row_per_method(
    sharp: Path, tmp_path: Path, medsr: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    (sharp.parent / "junk.nii.gz").write_bytes(b"this is no image " * 100)
    out = tmp_path / "out"
    settings = ("plane_minutes=0.01", "adapt_minutes=0.01", "gaps=[0,1]")
    status, lines = medsr(
        sharp.parent, out=out, config=("inference.json", "evaluate.json"), settings=settings
    )
    # The others are compared, but a script must not take the table for complete.
    assert status == 1, lines
    errors = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert errors[0].startswith("junk: left out: junk.nii.gz")
    assert errors[1:] == ["1 of 2 volumes left out"]
    content = json.loads((out / "comparison.json").read_text())
    assert "psnr-head-v1" in content["protocol"]
    baselines = ("cubic", "smore-like")
    learned = [method for name in baselines for method in (name, f"{name} + consistency")]
    methods = ["nearest", "linear", *learned, "network", "adapted"]
    assert [(row["case"], row["gap"], row["method"]) for row in content["rows"]] == [
        ("sharp", gap, method) for gap in (0.0, 1.0) for method in methods
    ]
    for row in content["rows"]:
        assert 5 < row["psnr_db"] < 60
        assert 0 < row["ssim"] <= 1
    found = {row["method"]: row for row in content["rows"] if row["gap"] == 0}
    assert found["cubic"]["psnr_db"] > found["nearest"]["psnr_db"]
    assert -1 <= found["network"]["spearman"] <= 1
    pages = {f"sharp_ratio4_gap{gap}_qc.png" for gap in (0, 1)}
    assert {path.name for path in out.iterdir()} == {"comparison.json", *pages}


def test_a_comparison_needs_no_setting(sharp: Path, tmp_path: Path, medsr: Callable[..., Any]) -> None:
    out = tmp_path / "out"
    status, lines = medsr(sharp, out=out, config=("inference.json", "evaluate.json"))
    assert status == 0, lines
    found = json.loads((out / "comparison.json").read_text())
    assert {row["method"] for row in found["rows"]} >= {"nearest", "cubic", "network"}
    made_by = found["run"]
    assert made_by["settings"]["ratios"] == [4.0]
    assert {"evaluate.json", "inference.json", "model.pt"} <= set(made_by["sha256"])


def test_a_comparison_follows_links_and_runs_in_both_directions_when_asked(
    sharp: Path, tmp_path: Path, medsr: Callable[..., Any]
) -> None:
    study, out = tmp_path / "study", tmp_path / "out"
    study.mkdir()
    (study / "linked.nii.gz").symlink_to(sharp)

    def compared(name: str, *settings: str) -> tuple[int, list[str]]:
        return medsr(study, out=out / name, config=("inference.json", "evaluate.json"), settings=settings)

    status, lines = compared("refused")
    assert status != 0
    assert "linked.nii.gz" in lines[0]
    assert "set follow_links to true" in lines[0]
    assert not (out / "refused").exists()
    psnr = {}
    for name, both in (("one", "false"), ("both", "true")):
        status, lines = compared(name, "follow_links=true", f"both_directions={both}")
        assert status == 0, lines
        rows = json.loads((out / name / "comparison.json").read_text())["rows"]
        assert {row["case"] for row in rows} == {"linked"}
        psnr[name] = {row["method"]: row["psnr_db"] for row in rows}
    assert psnr["one"]["cubic"] == psnr["both"]["cubic"]
    assert psnr["one"]["network"] != psnr["both"]["network"]


def shared_distance(first: Path, second: Path) -> float:
    """Largest difference between the tensors that two weight files share."""
    import torch

    one, other = (torch.load(path, weights_only=True) for path in (first, second))
    shared = set(one) & set(other)
    assert len(shared) > 50
    return max(float((one[key] - other[key]).abs().max()) for key in shared)


def test_training_in_two_stages_gives_usable_weights(
    sharp: Path, thick: Path, tmp_path: Path, medsr: Callable[..., Any]
) -> None:
    plain, again, full = (tmp_path / name for name in ("plain", "again", "full"))
    for out in (plain, again):
        status, lines = medsr(sharp.parent, out=out, config=("train.json",), settings=TINY)
        assert status == 0, lines
        assert {path.name for path in out.iterdir()} == {"model.pt", "SHA256SUMS", "train_record.json"}
    record = json.loads((plain / "train_record.json").read_text())
    assert record["iterations"] == 3
    assert record["settings"]["stage"] == "plain"
    assert np.isfinite(record["history"][-1]["l1"])
    # The seed decides: orders, blocks, acquisitions and initial weights.
    assert (plain / "SHA256SUMS").read_text() == (again / "SHA256SUMS").read_text()

    settings = (*TINY, "stage=uncertainty", "seed=1", f"initial_weights={plain / 'model.pt'}")
    status, lines = medsr(sharp.parent, out=full, config=("train.json",), settings=settings)
    assert status == 0, lines
    # Another seed, yet three steps away from where it began: neither network nor average start at random weights.
    assert 0 < shared_distance(plain / "model.pt", full / "model.pt") < 1e-2

    out = tmp_path / "out"
    settings = (f"weights={full / 'model.pt'}", "figure=false")
    assert medsr(thick, out=out, settings=settings)[0] == 0
    assert report_of(out)["cases"]["head"]["method"] == "network"


def test_planes_then_their_fusion_then_the_volume_network(
    sharp: Path, tmp_path: Path, medsr: Callable[..., Any]
) -> None:
    planes, fusion, volumes = (tmp_path / name for name in ("planes", "fusion", "volumes"))
    stages = (
        (planes, ("train.json", "train_planes.json"), ()),
        (fusion, ("train.json", "train_fusion.json"), (f"prior_weights={planes / 'model.pt'}",)),
        (volumes, ("train.json",), ("stage=uncertainty", f"prior_weights={fusion / 'model.pt'}")),
    )
    for out, config, settings in stages:
        status, lines = medsr(sharp.parent, out=out, config=config, settings=(*TINY, *settings))
        assert status == 0, lines
    # What a later stage starts from is kept, but for the rounding of its average.
    assert shared_distance(fusion / "model.pt", volumes / "model.pt") < 1e-6


@pytest.mark.parametrize(
    ("settings", "status", "reason"),
    [
        (('train_files=["nothing.nii"]',), 2, "no volume matches 'nothing.nii'"),
        (("initial_weights=nowhere.pt",), 3, "nowhere.pt"),
        (("stage=uncertain",), 4, "uncertain"),
    ],
)
def test_training_says_in_one_line_what_is_wrong(
    sharp: Path,
    tmp_path: Path,
    medsr: Callable[..., Any],
    settings: tuple[str, ...],
    status: int,
    reason: str,
) -> None:
    out = tmp_path / "out"
    found, lines = medsr(sharp.parent, out=out, config=("train.json",), settings=(*TINY, *settings))
    assert (found, len(lines)) == (status, 1), lines
    assert reason in lines[0]
    assert not out.exists()


def test_paper_overlay_is_the_published_size(root: Path, tmp_path: Path, sharp: Path) -> None:
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config([str(root / "configs" / name) for name in ("train.json", "paper.json")])
    network = parser.get_parsed_content("network_def")
    assert 40e6 < sum(parameter.numel() for parameter in network.parameters()) < 45e6


def test_two_processes_train_one_network(
    root: Path, sharp: Path, tmp_path: Path, call: Callable[..., Any], medsr: Callable[..., Any]
) -> None:
    import torch

    plain, out = tmp_path / "plain", tmp_path / "out"
    assert medsr(sharp.parent, out=plain, config=("train.json",), settings=TINY)[0] == 0
    files = [str(root / "configs" / name) for name in ("train.json", "multi_gpu_train.json")]
    words = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "monai.bundle", "run"]
    words += ["--config_file", str(files), "--dataset_dir", sharp.parent, "--output_dir", out]
    words += [part for setting in TINY for part in f"--{setting}".split("=")]
    words += ["--stage", "uncertainty", "--seed", 1, "--initial_weights", plain / "model.pt"]
    process = call(words)
    assert process.returncode == 0, process.stderr
    assert {path.name for path in out.iterdir()} == {"model.pt", "SHA256SUMS", "train_record.json"}
    state = torch.load(out / "model.pt", weights_only=True)
    assert not [key for key in state if key.startswith("module.")]
    expected = torch.load(root / "models" / "model.pt", weights_only=True)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in expected.items()}
    assert 0 < shared_distance(plain / "model.pt", out / "model.pt") < 1e-2
    # Only one process speaks for all.
    record = json.loads((out / "train_record.json").read_text())
    assert record["iterations"] == 3
