from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from medsr.errors import DataError, SettingError
from medsr.geometry import rescaled_size, slice_positions
from medsr.inferers import slice_group
from medsr.inferers.volume import MIN_SLICES, VolumeInferer, make_consistent, projection_matrix
from medsr.networks.slice_sr import SliceSRNet
from medsr.resampling import interpolation_matrix
from medsr.transforms.thick_slices import ThickSliceParameters
from monai.data import MetaTensor
from torch import Tensor, nn


class Recorder(nn.Module):
    """Nearest slices, and a note of what it was told."""

    branches = 0

    def __init__(self, error: float = 0.0) -> None:
        super().__init__()
        self.error = error
        self.given: list[tuple[float, float]] = []

    def forward(self, image: Tensor, *, positions: Sequence[float], scale: float, thickness: float) -> Tensor:
        self.given.append((scale, thickness))
        matrix = interpolation_matrix(image.shape[-1], positions, kind="nearest")
        return image @ torch.as_tensor(matrix, dtype=torch.float32).T + self.error


def scan(
    depth: int = 6,
    *,
    spacing: Sequence[float] = (1.0, 1.0, 4.0),
    channels: int = 1,
    thickness: Any = None,
) -> MetaTensor:
    meta = {} if thickness is None else {"slice_thickness_mm": thickness}
    values = torch.rand(1, channels, 16, 12, depth, generator=torch.Generator().manual_seed(0))
    # A batch of a loader holds its affine with a batch axis.
    affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))[None]
    return MetaTensor(values, affine=affine, meta=meta)


def inferer(**settings: Any) -> VolumeInferer:
    return VolumeInferer(**{"amp": "float32", "tile": None, "slice_profile": "box", **settings})


@pytest.mark.parametrize(
    ("spacing", "wanted", "ratio"),
    [
        ((1.0, 1.0, 4.0), None, 4.0),
        ((0.9, 0.9, 3.000016), None, 3.333),
        ((0.5, 1.0, 5.0), None, 5.0),
        ((1.0, 1.0, 4.0), 2.0, 2.0),
        ((1.0, 1.0, 4.0), 0.8, 5.0),
    ],
)
def test_the_ratio_comes_from_the_affine(spacing, wanted, ratio):
    run, network = inferer(spacing_mm=wanted), Recorder()
    found = run(scan(spacing=spacing), network)
    assert found.shape == (1, 1, 16, 12, rescaled_size(6, ratio))
    assert network.given[0][0] == run.facts["ratio"] == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("setting", "meta", "expected"),
    [
        (None, None, 1.0),
        (None, 3.0, 0.75),
        (None, torch.tensor([3.0]), 0.75),
        (None, [3.0], 0.75),
        (2.0, 3.0, 0.5),
        (2.0, None, 0.5),
    ],
)
def test_the_thickness_is_set_or_read_or_the_spacing(setting, meta, expected):
    run, network = inferer(slice_thickness_mm=setting), Recorder()
    run(scan(thickness=meta), network)
    assert network.given[0][1] == pytest.approx(expected)
    assert run.facts["slice_thickness_per_spacing"] == pytest.approx(expected)
    assert run.facts["warnings"] == []


@pytest.mark.parametrize("branches", [0, 1])
def test_the_network_sees_the_head_and_air_is_interpolated(branches):
    image = torch.zeros(1, 1, 70, 60, 6)
    image[:, :, 50:66, 4:20] = torch.rand(1, 1, 16, 16, 6) + 0.5
    seen = []

    class Network(Recorder):
        def forward(self, image: Tensor, **settings: Any) -> Tensor:
            seen.append(tuple(image.shape[2:4]))
            found = super().forward(image, **settings) + 10
            return torch.cat([found, found[:, :1]], dim=1) if branches else found

    network = Network()
    network.branches = branches
    run = inferer(consistency=0)
    found = run(MetaTensor(image, affine=torch.diag(torch.tensor([1.0, 1, 4, 1]))[None]), network)
    assert seen == [(36, 36)]
    assert found.shape == (1, 1 + branches, 70, 60, 24)
    # Sixteen voxels of air around the head are the network's too.
    assert float(found[:, 0, 34:, :36].min()) > 9
    for air in (found[:, :, :34], found[:, :, :, 36:]):
        assert not air[:, 0].any()
        assert not branches or bool((air[:, 1] == found[:, 1].min()).all())


def test_the_acquisition_is_the_one_that_makes_thick_slices():
    run = inferer(slice_profile="slr")
    expected = ThickSliceParameters(4.0, 0.75, "slr").matrix(24, 6)
    assert np.allclose(run.acquisition(24, 6, 4.0, 0.75).numpy(), expected, atol=1e-6)


def test_every_channel_is_processed_alone():
    torch.manual_seed(0)
    network = SliceSRNet(0.125, head="uncertainty", branches=4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    image = scan(channels=3)
    found = inferer()(image, network)
    # All images first, then all uncertainties.
    assert found.shape == (1, 6, 16, 12, 24)
    for channel in range(3):
        alone = inferer()(image[:, channel : channel + 1], network)
        assert torch.allclose(found[:, [channel, 3 + channel]], alone, atol=1e-5)
    assert float(found[:, 3:].min()) >= 0.999e-3


@pytest.mark.parametrize("depth", range(1, MIN_SLICES))
def test_too_few_slices_are_interpolated_with_a_warning(depth):
    image = scan(depth)
    run, network = inferer(consistency=0.0), Recorder()
    found = run(image, network)
    assert network.given == []
    positions = slice_positions(depth, 4 * depth, 4.0)
    exact = image.as_tensor() @ torch.as_tensor(interpolation_matrix(depth, positions).T, dtype=torch.float32)
    assert torch.allclose(found, exact, atol=1e-5)
    assert run.facts["method"] == "cubic interpolation"
    assert f"only {depth} slices" in run.facts["warnings"][0]


def test_enough_slices_go_through_the_network():
    run, network = inferer(), Recorder()
    run(scan(MIN_SLICES), network)
    assert network.given
    assert run.facts["method"] == "network"


def test_too_few_slices_still_have_an_uncertainty():
    found = inferer()(scan(2), SliceSRNet(0.125, head="uncertainty", branches=4))
    assert found.shape == (1, 2, 16, 12, 8)
    assert float(found[:, 1].min()) >= 0
    assert float(found[:, 1].max()) > 0


@pytest.mark.parametrize("profile", ["box", "gaussian", "slr"])
def test_consistency_explains_the_measured_slices(profile):
    image = scan()
    plain = inferer(consistency=0.0, slice_profile=profile)
    full = inferer(consistency=1.0, slice_profile=profile)
    half = inferer(consistency=0.5, slice_profile=profile)
    results = [run(image, Recorder(error=0.1)) for run in (plain, half, full)]
    levels = [run.facts["data_consistency_db"] for run in (plain, half, full)]
    assert levels[0] + 5 < levels[1] < levels[2] - 5
    assert levels[2] > 30
    again = results[2] @ full.acquisition(24, 6, 4.0, 1.0).T
    assert torch.allclose(again, image.as_tensor(), atol=0.1)
    # Half the share is half the way.
    assert torch.allclose(results[1], (results[0] + results[2]) / 2, atol=1e-5)


@pytest.mark.parametrize("ratio", [2.0, 2.5, 4.0, 7.0])
def test_consistency_keeps_what_is_consistent_already(ratio):
    size = rescaled_size(6, ratio)
    acquire = inferer().acquisition(size, 6, ratio, 0.8)
    for image, tolerance in ((torch.full((2, size), 0.6), 1e-6), (torch.rand(2, size), 1e-5)):
        found = image.clone()
        make_consistent(found, image @ acquire.T, acquire)
        assert torch.allclose(found, image, atol=tolerance)


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_consistency_in_parts_is_that_of_the_whole(rows, share):
    acquire = inferer().acquisition(24, 6, 4.0, 0.8)
    image, measured = torch.rand(rows, 5, 24), torch.rand(rows, 5, 6)
    difference = measured - image @ acquire.T
    expected = image + share * difference @ projection_matrix(acquire).T
    make_consistent(image, measured, acquire, share=share)
    assert torch.allclose(image, expected, atol=1e-6)


@pytest.mark.parametrize("height", [5, 16, 35])
def test_the_consistency_level_is_that_of_the_whole_volume(height):
    values = torch.rand(1, 1, height, 7, 6)
    run = inferer(consistency=0.0)
    found = run(MetaTensor(values, affine=torch.diag(torch.tensor([1.0, 1.0, 4.0, 1.0]))), Recorder(0.1))
    again = found @ run.acquisition(24, 6, 4.0, 1.0).T
    expected = -10 * np.log10(float((again - values).double().square().mean()))
    assert run.facts["data_consistency_db"] == pytest.approx(expected, abs=0.006)


def test_a_constant_scan_stays_constant():
    image = scan()
    image[:] = 0.4
    found = inferer(consistency=1.0)(image, SliceSRNet(0.125))
    assert torch.allclose(found, torch.tensor(0.4), atol=1e-5)


def test_the_projection_is_a_right_inverse():
    acquire = torch.as_tensor(ThickSliceParameters(4.0).matrix(24), dtype=torch.float32)
    exact = acquire @ projection_matrix(acquire, damping=0.0)
    assert torch.allclose(exact, torch.eye(6), atol=1e-4)
    # Damped, it never adds more than is missing.
    damped = acquire @ projection_matrix(acquire)
    assert float(torch.linalg.eigvals(damped).abs().max()) <= 1 + 1e-6


@pytest.mark.parametrize(("thickness", "warned"), [(0.5, True), (3.0, False), (6.0, False), (7.0, True)])
def test_an_unusual_thickness_is_reported(thickness, warned):
    run = inferer()
    run(scan(thickness=thickness), Recorder())
    assert any("thickness" in one for one in run.facts["warnings"]) == warned


@pytest.mark.parametrize("thickness", [6.5, 40.0, 5000.0])
def test_a_thickness_beyond_belief_is_not_used(thickness):
    run, network = inferer(), Recorder()
    found = run(scan(thickness=thickness), network)
    assert network.given[0][1] == run.facts["slice_thickness_per_spacing"] == 1.5
    assert "; 6 mm was assumed" in run.facts["warnings"][0]
    assert float(found.abs().max()) < 3


def test_a_ratio_beyond_the_training_is_reported():
    run = inferer(spacing_mm=0.4)
    run(scan(), Recorder())
    assert "ratio 10" in run.facts["warnings"][0]


def test_the_warnings_of_one_scan_do_not_stay_for_the_next():
    run = inferer()
    run(scan(2), Recorder())
    run(scan(), Recorder())
    assert run.facts["warnings"] == []


def test_the_facts_tell_of_planes_in_fewer_bits_of_this_scan_only(monkeypatch):
    torch.manual_seed(0)
    network, run = SliceSRNet(0.125, prior=True).eval(), inferer(amp="auto")
    monkeypatch.setattr(slice_group, "choose_precision", lambda *_, **__: torch.float32)
    monkeypatch.setattr(slice_group, "choose_planes", lambda prior, *_, **__: copy.deepcopy(prior))
    run(scan(), network)
    assert run.facts["convolutions"] == "float32, those of the planes int8"
    run(scan(2), network)
    assert run.facts["convolutions"] == "float32"


@pytest.mark.parametrize(("wanted", "text"), [(5, "5"), (1e9, "1e[+]09")])
def test_a_target_coarser_than_the_slices_is_refused(wanted, text):
    with pytest.raises(SettingError, match=f"target_spacing_mm {text} is coarser than the slices of 4 mm"):
        inferer(spacing_mm=wanted)(scan(), Recorder())


def test_scans_of_different_geometry_do_not_share_a_batch():
    image = MetaTensor(torch.rand(2, 1, 8, 8, 5), affine=torch.eye(4))
    with pytest.raises(SettingError, match="batch size 1, got 2"):
        inferer()(image, Recorder())


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"spacing_mm": 0.0}, "target_spacing_mm"),
        ({"spacing_mm": float("nan")}, "target_spacing_mm"),
        ({"slice_thickness_mm": -1.0}, "slice_thickness_mm"),
        ({"consistency": 1.5}, "consistency"),
        ({"consistency": -0.1}, "consistency"),
        ({"spacing_mm": "abc"}, "target_spacing_mm must be a number > 0, got 'abc'"),
        ({"slice_thickness_mm": "abc"}, "slice_thickness_mm must be a number > 0, got 'abc'"),
        ({"slice_thickness_mm": True}, "slice_thickness_mm must be a number > 0, got True"),
        ({"consistency": "x"}, "consistency must be a number, got 'x'"),
        ({"group": "x"}, "group must be a whole number >= 1, got 'x'"),
        ({"tile": "abc"}, "tile must be a whole number >= 8, got 'abc'"),
        ({"both_directions": "no"}, "both_directions must be true or false, got 'no'"),
    ],
)
def test_settings_out_of_range_are_named(settings, name):
    with pytest.raises(SettingError, match=name):
        VolumeInferer(**settings)


def test_a_measured_profile_is_read_from_a_file(tmp_path):
    taps = tmp_path / "profile.txt"
    taps.write_text("1 2 4 2 1\n")
    run = inferer(slice_profile=str(taps))
    assert torch.allclose(
        run.acquisition(24, 6, 4.0, 1.0),
        torch.as_tensor(
            ThickSliceParameters(4.0, 1.0, (0.1, 0.2, 0.4, 0.2, 0.1)).matrix(24, 6), dtype=torch.float32
        ),
    )
    run(scan(), Recorder())
    assert run.facts["data_consistency_db"] > 20


@pytest.mark.parametrize("content", ["1 2\n", "1 x 1\n", None])
def test_a_profile_that_cannot_be_read_is_refused_at_once(tmp_path, content):
    taps = tmp_path / "profile.txt"
    if content is not None:
        taps.write_text(content)
    with pytest.raises(DataError, match=r"^profile\.txt"):
        VolumeInferer(slice_profile=str(taps))


def test_the_facts_name_the_profile_without_its_folder(tmp_path):
    taps = tmp_path / "profile.txt"
    taps.write_text("1 2 1\n")
    run = inferer(slice_profile=str(taps))
    run(scan(), Recorder())
    assert "profile.txt" in run.facts["slice_profile"]
    assert str(tmp_path) not in run.facts["slice_profile"]


@pytest.mark.parametrize("depth", [MIN_SLICES - 1, 6])
def test_labels_pass_together_with_their_image(depth):
    network = SliceSRNet(0.125, label_classes=2, head="uncertainty").eval()
    volume = scan(depth, channels=3)
    volume[:, 1:] = (volume[:, 1:] > 0.5).float()
    found = inferer(label_channels=2)(volume, network)
    assert found.shape == (1, 4, 16, 12, depth * 4)
    labels = found[:, 1:3]
    assert float(labels.min()) >= 0
    assert float(labels.max()) <= 1
    # Untrained, each thick slice's mean stays near the mask that was drawn on it.
    assert float((labels.unflatten(-1, (depth, 4)).mean(-1) - volume[:, 1:].as_tensor()).abs().mean()) < 0.25
    alone = inferer()(scan(depth), SliceSRNet(0.125, head="uncertainty").eval())
    assert alone.shape[1] == 2


def test_labels_that_are_missing_are_asked_for():
    with pytest.raises(SettingError, match="one image and 2 label channels are needed, got 1"):
        inferer(label_channels=2)(scan(), SliceSRNet(0.125, label_classes=2))
