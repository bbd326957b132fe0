from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from medsr import metrics
from medsr.engines import comparison
from medsr.engines.comparison import ThroughPlaneComparison, on_reference_grid, table
from medsr.engines.self_training import SelfTraining
from medsr.errors import SettingError
from medsr.geometry import rescaled_affine
from medsr.handlers.qc_figure import draw_qc
from medsr.io.writing import write_nifti
from medsr.networks.slice_sr import SliceSRNet
from medsr.phantoms import head
from scipy.ndimage import gaussian_filter

SETTINGS = {"amp": "float32", "tile": None}


@pytest.fixture(scope="module")
def phantom(tmp_path_factory) -> Path:
    volume, affine = head(30)
    # Smooth enough for so few voxels that the cubic interpolation has an advantage.
    volume = gaussian_filter(volume, 1.2)
    # The head lies in an oddly turned file: axes exchanged and one flipped.
    array = volume.transpose(2, 0, 1)[:, ::-1][:, :, :26]
    turned = affine[:, [2, 0, 1, 3]].copy()
    turned[:3, 3] += turned[:3, 1] * (array.shape[1] - 1)
    turned[:3, 1] *= -1
    path = tmp_path_factory.mktemp("comparison") / "head.nii.gz"
    write_nifti(path, np.ascontiguousarray(array), affine=turned)
    return path


def network(head: str = "uncertainty") -> SliceSRNet:
    torch.manual_seed(0)
    return SliceSRNet(0.125, head=head, branches=4)


def compare(phantom: Path, net: SliceSRNet | None = None, **settings) -> list[dict]:
    cases = [{"image": str(phantom), "case": "head"}]
    return ThroughPlaneComparison(cases, net, SETTINGS, **settings).run()


@pytest.fixture(scope="module")
def rows(phantom, tmp_path_factory) -> list[dict]:
    output = tmp_path_factory.mktemp("out") / "comparison.json"
    found = compare(phantom, network(), ratios=(3, 4), gaps=(0, 1), output=output)
    written = json.loads(output.read_text())
    assert written["rows"] == found
    assert "PSNR with data range 1" in written["protocol"]
    return found


@pytest.mark.parametrize(("net", "panels"), [(None, 4), ("uncertainty", 6)])
def test_pages_show_truth_and_error(phantom, tmp_path, net, panels, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        comparison,
        "draw_qc",
        lambda volumes, **words: drawn.append((volumes, words)) or draw_qc(volumes, **words),
    )
    made = compare(
        phantom,
        net and network(net),
        ratios=(3.5,),
        output=tmp_path / "new" / "comparison.json",
        figures=True,
    )
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "comparison.json",
        "head_ratio3.5_gap0_qc.png",
    ]
    ((volumes, words),) = drawn
    assert len(volumes) == panels
    last = "network" if net else "cubic"
    np.testing.assert_array_equal(
        volumes["absolute error"], np.abs(volumes[last] - volumes["reference"]), strict=True
    )
    (score,) = (row["psnr_db"] for row in made if row["method"] == last)
    assert f"{last} {score:.2f} dB" in words["footer"]


def test_a_page_that_cannot_be_drawn_costs_no_row(phantom, tmp_path):
    output = tmp_path / "comparison.json"
    (tmp_path / "head_ratio4_gap0_qc.png").mkdir()
    found = compare(phantom, output=output, figures=True)
    assert [row["method"] for row in found][:3] == ["nearest", "linear", "cubic"]
    assert "no page was drawn: head_ratio4_gap0_qc.png: cannot be written" in output.read_text()


def of(rows: list[dict], **wanted) -> list[dict]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def test_there_is_a_row_per_setting_and_method(rows):
    keys = {(row["ratio"], row["gap"], row["method"]) for row in rows}
    methods = {"nearest", "linear", "cubic", "cubic + consistency", "network"}
    assert keys == {(r, g, m) for r in (3.0, 4.0) for g in (0.0, 1.0) for m in methods}
    assert len(rows) == len(keys)


def test_the_numbers_are_plausible(rows):
    for row in rows:
        assert 8 < row["psnr_db"] < 40
        assert 0 < row["ssim"] < 1
        assert 8 < row["edge_psnr_db"] < 40
    for setting in ({"ratio": 3.0, "gap": 0.0}, {"ratio": 4.0, "gap": 0.0}):
        db = {row["method"]: row["psnr_db"] for row in of(rows, **setting)}
        assert db["cubic"] > db["nearest"] + 0.5
    cubic = {row["ratio"]: row["psnr_db"] for row in of(rows, method="cubic", gap=0.0)}
    assert cubic[3.0] > cubic[4.0]


def test_an_untrained_network_is_cubic_made_consistent(rows):
    for ratio in (3.0, 4.0):
        (cubic,) = of(rows, ratio=ratio, gap=0.0, method="cubic")
        (projected,) = of(rows, ratio=ratio, gap=0.0, method="cubic + consistency")
        (found,) = of(rows, ratio=ratio, gap=0.0, method="network")
        assert found["data_consistency_db"] > cubic["data_consistency_db"] + 5
        assert found["psnr_db"] == pytest.approx(projected["psnr_db"], abs=2e-3)
        assert projected["psnr_db"] != pytest.approx(cubic["psnr_db"], abs=0.02)


def test_only_a_method_with_uncertainty_is_judged_by_it(rows):
    for row in rows:
        assert ("spearman" in row) == ("ause" in row) == (row["method"] == "network")


def test_without_consistency_the_untrained_network_is_cubic_exactly(phantom):
    cases = [{"image": str(phantom), "case": "head"}]
    found = ThroughPlaneComparison(cases, network("plain"), {**SETTINGS, "consistency": 0.0}).run()
    db = {row["method"]: row["psnr_db"] for row in found}
    assert db["network"] == pytest.approx(db["cubic"], abs=2e-3)
    assert list(db) == ["nearest", "linear", "cubic", "network"]


def test_the_share_of_the_projection_holds_for_the_baselines_too(phantom):
    cases = [{"image": str(phantom), "case": "head"}]
    db = {}
    for share in (0.5, 1.0):
        (row,) = of(
            ThroughPlaneComparison(cases, None, {"consistency": share}).run(), method="cubic + consistency"
        )
        db[share] = row["data_consistency_db"]
    assert db[0.5] < db[1.0] - 5
    with pytest.raises(SettingError, match="consistency must be a number, got 'half'"):
        ThroughPlaneComparison(cases, None, {"consistency": "half"})


def test_what_is_a_whole_number_of_slabs_decides_no_decibel(tmp_path):
    # Waves: every length holds the same detail, so that little but a shift could make a difference.
    x, y, z = np.meshgrid(*(np.arange(float(n)) for n in (12, 12, 132)), indexing="ij")
    values = 2 + np.sin(0.5 * x) * np.cos(0.4 * y) + np.sin(0.6 * z)
    for ratio in (2.5, 2.7, 3.3, 3.5):
        db = []
        for length in (117, 120, 122, 123, 124, 127, 130):
            path = tmp_path / f"{length}.nii.gz"
            write_nifti(path, values[..., :length].astype(np.float32), affine=np.eye(4))
            rows = ThroughPlaneComparison([{"image": str(path), "case": "a"}], None, ratios=[ratio]).run()
            db += [row["psnr_db"] for row in of(rows, method="cubic")]
        assert max(db) - min(db) < 2, ratio


@pytest.mark.parametrize("ratio", [2.5, 3.3, 3.5])
def test_methods_give_the_very_grid_of_the_truth(phantom, ratio, monkeypatch):
    seen = []
    real = on_reference_grid

    def spy(values, affine, *, reference_affine, size):
        seen.append((values.shape[-1], size))
        np.testing.assert_allclose(affine, reference_affine, atol=1e-9)
        return real(values, affine, reference_affine=reference_affine, size=size)

    monkeypatch.setattr("medsr.engines.comparison.on_reference_grid", spy)
    found = compare(phantom, network(), ratios=[ratio])
    assert [row["method"] for row in found] == [
        "nearest",
        "linear",
        "cubic",
        "cubic + consistency",
        "network",
    ]
    assert all(new == size for new, size in seen)
    (network_row,), (cubic,) = (of(found, method=m) for m in ("network", "cubic + consistency"))
    assert network_row["psnr_db"] == pytest.approx(cubic["psnr_db"], abs=2e-3)


def test_a_wrong_profile_is_told_to_the_methods_only(phantom):
    right = compare(phantom, network(), profile="slr")
    wrong = compare(phantom, network(), profile="slr", assumed_profile="gaussian")
    assert {row["assumed_profile"] for row in wrong} == {"gaussian"}
    # The slices are the same, hence the interpolations; what is told changes the consistent result.
    for method in ("linear", "cubic"):
        assert of(right, method=method)[0]["psnr_db"] == of(wrong, method=method)[0]["psnr_db"]
    found = (of(rows, method="network")[0]["data_consistency_db"] for rows in (right, wrong))
    assert next(found) > next(found)


@pytest.mark.parametrize("axis", ["SI", "AP", "LR"])
def test_slices_are_simulated_along_the_anatomical_axis(phantom, axis, monkeypatch):
    shapes = []
    real = ThroughPlaneComparison._compare_at

    def spy(self, case, volume, ratio, gap):
        shapes.append(tuple(volume.shape[1:]))
        return real(self, case, volume, ratio, gap)

    monkeypatch.setattr(ThroughPlaneComparison, "_compare_at", spy)
    compare(phantom, axis=axis)
    # The front-to-back axis alone was cut to 26 slices.
    assert (shapes[0][-1] == 26) == (axis == "AP")


def test_the_methods_that_learn_from_the_scan(phantom, monkeypatch):
    # Every look at the clock takes a minute: a few iterations each.
    clock = iter(range(0, 10**9, 60))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    training = SelfTraining(None, 1, batch_size=1, block_size=(16, 16))
    net = network("plain")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = compare(phantom, net, plane_minutes=1, adapt={"training": training})
    methods = ["smore-like", "smore-like + consistency", "network", "adapted"]
    assert [row["method"] for row in found][4:] == methods
    assert all(np.isfinite(row["psnr_db"]) for row in found)
    plain, projected = (of(found, method=method)[0]["data_consistency_db"] for method in methods[:2])
    assert projected > plain + 5
    assert all(torch.equal(net.state_dict()[key], before[key]) for key in before)


def test_the_adaptation_may_run_in_both_directions_where_the_network_does_not(phantom):
    training, net = SelfTraining(None, 1, batch_size=1, block_size=(16, 16)), network("plain")
    # What has learnt nothing gives the interpolation, which has no direction.
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    found = [
        compare(phantom, net, adapt={"training": training, "both_directions": both}) for both in (False, True)
    ]
    one, both = (of(rows, method="adapted")[0]["psnr_db"] for rows in found)
    assert one != both
    one, both = (of(rows, method="network")[0]["psnr_db"] for rows in found)
    assert one == both


def test_an_adaptation_without_settings_is_refused_before_anything_is_computed(phantom):
    with pytest.raises(SettingError, match="adapt must hold settings, training among them, got SelfTraining"):
        compare(phantom, network(), adapt=SelfTraining(1))


def test_an_unreadable_case_is_left_out(phantom, tmp_path, caplog):
    (tmp_path / "bad.nii.gz").write_bytes(b"nothing")
    cases = [
        {"image": str(tmp_path / "bad.nii.gz"), "case": "bad"},
        {"image": str(phantom), "case": "head"},
    ]
    comparison = ThroughPlaneComparison(cases, None, output=tmp_path / "out.json")
    with caplog.at_level(logging.ERROR):
        found = comparison.run()
        with pytest.raises(SystemExit) as stop:
            comparison.finish()
    assert {row["case"] for row in found} == {"head"}
    assert caplog.records[0].getMessage().startswith("bad: left out: bad.nii.gz")
    assert caplog.records[-1].getMessage() == "1 of 2 volumes left out"
    assert stop.value.code == 1
    assert list(json.loads((tmp_path / "out.json").read_text())["left_out"]) == ["bad"]


def test_thick_slices_that_are_taken_as_the_truth_are_noted(tmp_path):
    volume, affine = head(30)
    cases = []
    for name, thickness in (("thin", 1.0), ("thick", 2.5)):
        write_nifti(tmp_path / f"{name}.nii.gz", volume, affine=affine @ np.diag([1, 1, thickness, 1]))
        cases.append({"image": str(tmp_path / f"{name}.nii.gz"), "case": name})
    found = ThroughPlaneComparison(cases, None, SETTINGS, ratios=(2,))
    found.run()
    assert list(found.notes) == ["thick"]
    assert "2.5 times as far apart" in found.notes["thick"]


def test_a_case_that_fails_in_the_comparison_does_not_end_it(phantom, tmp_path):
    values, affine = head(16)
    write_nifti(tmp_path / "short.nii.gz", values[..., :3], affine=affine)
    images = {"short": tmp_path / "short.nii.gz", "head": phantom}
    cases = [{"image": str(path), "case": case} for case, path in images.items()]
    comparison = ThroughPlaneComparison(cases, None, ratios=[4], output=tmp_path / "out.json")
    assert {row["case"] for row in comparison.run()} == {"head"}
    assert comparison.left_out["short"].startswith("3 slices are fewer than the 4 of a slab")
    with pytest.raises(SystemExit):
        comparison.finish()


def test_a_comparison_of_all_volumes_ends_well(phantom):
    comparison = ThroughPlaneComparison([{"image": str(phantom), "case": "head"}], None)
    comparison.run()
    comparison.finish()


def test_an_origin_that_was_not_moved_loses_decibels():
    volume, affine = head(32)
    truth = volume[None] / 1000
    thick = truth.reshape(1, 32, 32, 8, 4).mean(-1)
    result = thick.repeat(4, axis=-1)
    coarse = affine @ np.diag([1.0, 1.0, 4.0, 1.0])
    coarse[:3, 3] += affine[:3, 2] * 1.5
    right = rescaled_affine(coarse, 2, size=8, new_size=32, ratio=4)
    wrong = right.copy()
    wrong[:3, 3] = coarse[:3, 3]

    def db(matrix: np.ndarray) -> float:
        values = on_reference_grid(result, matrix, reference_affine=affine, size=32)
        return metrics.psnr_3d(values[0], truth[0], data_range=1.0, mask=truth[0] > 0.02)

    assert np.allclose(right, affine)
    assert db(right) > db(wrong) + 1.0


@pytest.mark.parametrize("shift", [0.0, 0.25, -1.5, 3.0])
def test_results_are_read_where_they_claim_to_be(shift):
    # Values are world coordinates, so whatever grid they come on, the reference must read its own.
    affine = np.diag([1.0, 1.0, 0.5, 1.0])
    affine[2, 3] = shift
    world = (np.arange(60) * 0.5 + shift).reshape(1, 1, 1, 60)
    reference = np.eye(4)
    reference[2, 3] = 5.0
    found = on_reference_grid(world, affine, reference_affine=reference, size=12)
    assert np.allclose(found.ravel(), np.arange(12) + 5.0, atol=1e-5)


def row(case: str, method: str, psnr: float, ratio: float = 4.0) -> dict:
    return {"case": case, "ratio": ratio, "gap": 0.0, "method": method, "psnr_db": psnr}


def test_the_table_shows_gains_over_cubic():
    lines = table(
        [
            row("a", "cubic", 25.0),
            row("a", "network", 26.0),
            row("b", "cubic", 20.0, 3.5),
            row("b", "network", 20.5, 3.5),
        ]
    ).splitlines()
    assert lines[0] == "| case | ratio | gap | cubic | network |"
    assert lines[2:] == [
        "| a | 4 | 0 | 25.00 | 26.00 |",
        "| b | 3.5 | 0 | 20.00 | 20.50 |",
        "| mean gain over cubic | | | +0.00 | +0.75 |",
    ]


def test_a_method_that_is_missing_for_a_case_leaves_its_cell_empty():
    lines = table([row("a", "cubic", 25.0), row("b", "cubic", 20.0), row("b", "network", 21.0)]).splitlines()
    assert lines[2] == "| a | 4 | 0 | 25.00 |  |"
    assert lines[-1].endswith("| +0.00 | +1.00 |")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ratios": 0}, "ratios must be a list of numbers > 0, got 0"),
        ({"ratios": []}, r"ratios must be a list of numbers > 0, got \[\]"),
        ({"ratios": "four"}, "ratios must be a list of numbers > 0, got 'four'"),
        ({"ratios": [1.0]}, "ratios 1 with gaps 0: the ratio of slice spacings must be >="),
        ({"gaps": [4]}, "ratios 4 with gaps 4: the relative slice thickness must be > 0"),
        ({"gaps": "no"}, "gaps must be a list of numbers, got 'no'"),
        ({"plane_minutes": "x"}, "plane_minutes must be a number, got 'x'"),
        ({"axis": "XY"}, "slice_axis must be SI, AP or LR, got 'XY'"),
    ],
)
def test_what_cannot_be_simulated_is_refused_before_the_first_case(settings, said):
    with pytest.raises(SettingError, match=f"^{said}"):
        ThroughPlaneComparison([], None, **settings)
