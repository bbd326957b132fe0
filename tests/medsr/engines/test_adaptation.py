from __future__ import annotations

import copy

import pytest
import torch
from medsr.engines.adaptation import AdaptingInferer
from medsr.engines.self_training import SelfTraining
from medsr.errors import OutputError, SettingError
from medsr.inferers.volume import VolumeInferer
from medsr.networks.slice_sr import SliceSRNet
from medsr.phantoms import head
from monai.data import MetaTensor

SETTINGS = {"amp": "float32", "tile": None, "slice_profile": "box"}


@pytest.fixture(scope="module")
def scan() -> MetaTensor:
    volume = torch.as_tensor(head(20)[0])[None, None] / 1000
    affine = torch.diag(torch.tensor([1.0, 1.0, 4.0, 1.0], dtype=torch.float64))[None]
    # As a loader makes it of the volumes of a batch.
    meta = {"filename_or_obj": ["/scans/T1 left.nii.gz"]}
    return MetaTensor(volume.unflatten(-1, (5, 4)).mean(-1), affine=affine, meta=meta)


def network(*, prior: bool = False) -> SliceSRNet:
    torch.manual_seed(0)
    return SliceSRNet(0.125, head="uncertainty", branches=4, prior=prior)


def short() -> SelfTraining:
    return SelfTraining(None, 2, 5e-3, batch_size=1, block_size=(16, 16), average_momentum=0.5)


@pytest.mark.parametrize("prior", [False, True], ids=["whole network", "prior"])
def test_the_result_is_that_of_adapted_weights_and_the_facts_say_so(scan, tmp_path, prior):
    shipped = network(prior=prior)
    before = copy.deepcopy(shipped.state_dict())
    run = AdaptingInferer(short(), tmp_path / "weights", **SETTINGS)
    # An evaluator calls its inferer without gradients.
    with torch.no_grad():
        found = run(scan, shipped)
    assert found.shape == (1, 2, 20, 20, 20)
    assert found.isfinite().all()
    assert run.facts["adaptation"]["iterations"] == 2
    assert run.facts["adaptation"]["minutes"] >= 0
    assert run.facts["ratio"] == 4.0

    assert all(torch.equal(shipped.state_dict()[key], before[key]) for key in before)
    saved = torch.load(tmp_path / "weights" / "T1_left_adapted.pt", weights_only=True)
    assert any(not torch.equal(saved[key], before[key]) for key in before)
    # The saved weights serve further scans: they give the same result without another training.
    again = network(prior=prior)
    again.load_state_dict(saved)
    assert torch.allclose(VolumeInferer(**SETTINGS)(scan, again), found, atol=1e-5)
    assert not torch.allclose(VolumeInferer(**SETTINGS)(scan, shipped), found, atol=1e-5)


def test_only_the_prior_adapts_where_there_is_one(scan, tmp_path):
    shipped = network(prior=True)
    before = copy.deepcopy(shipped.state_dict())
    AdaptingInferer(short(), tmp_path, **SETTINGS)(scan, shipped)
    saved = torch.load(tmp_path / "T1_left_adapted.pt", weights_only=True)
    changed = {key for key in saved if not torch.equal(saved[key], before[key])}
    assert changed
    assert all(key.startswith("prior.") for key in changed)


@pytest.mark.parametrize("prior", [False, True], ids=["whole network", "prior"])
def test_the_weights_lie_between_those_shipped_and_those_trained(scan, tmp_path, prior):
    shipped = network(prior=prior)
    for share in (1.0, 0.25):
        AdaptingInferer(short(), tmp_path / str(share), share=share, **SETTINGS)(scan, shipped)
    trained, between = (
        torch.load(tmp_path / str(share) / "T1_left_adapted.pt", weights_only=True) for share in (1.0, 0.25)
    )
    assert any(not torch.equal(trained[key], value) for key, value in shipped.state_dict().items())
    for key, value in shipped.state_dict().items():
        torch.testing.assert_close(between[key], 0.75 * value + 0.25 * trained[key])


@pytest.mark.parametrize("share", [0, 1.01, -1, "half", float("nan")])
def test_weights_beyond_those_trained_are_refused(share):
    with pytest.raises(SettingError, match="adapt_share must"):
        AdaptingInferer(short(), share=share, **SETTINGS)


def test_every_scan_starts_from_the_shipped_weights(scan, tmp_path):
    run, shipped = AdaptingInferer(short(), tmp_path, **SETTINGS), network()
    other = scan.clone()
    other.meta["filename_or_obj"] = "/scans/other.nii"
    first, second = run(scan, shipped), run(other, shipped)
    assert torch.allclose(first, second, atol=1e-6)
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["T1_left_adapted.pt", "other_adapted.pt"]


def test_weights_of_an_earlier_run_are_replaced_and_the_warnings_say_so(scan, tmp_path):
    shipped, saved = network(), tmp_path / "T1_left_adapted.pt"
    run = AdaptingInferer(short(), tmp_path, **SETTINGS)
    run(scan, shipped)
    before = saved.read_bytes()
    assert run.facts["warnings"] == []
    run.training.learning_rate *= 2
    run(scan, shipped)
    assert saved.read_bytes() != before
    assert run.facts["warnings"] == ["T1_left_adapted.pt of an earlier run was replaced"]


def test_a_folder_for_weights_that_cannot_be_written_to_is_named_before_the_training(scan, tmp_path):
    place = tmp_path / "weights"
    place.write_text("a file")
    run = AdaptingInferer(short(), place, **SETTINGS)
    with pytest.raises(OutputError, match=r"^weights: cannot write to this folder"):
        run(scan, network())
    assert run.training.done == {}


def test_a_volume_without_a_file_is_a_scan(scan, tmp_path):
    nameless = MetaTensor(scan.as_tensor(), affine=scan.affine)
    AdaptingInferer(short(), tmp_path, **SETTINGS)(nameless, network())
    assert (tmp_path / "scan_adapted.pt").exists()


def test_the_report_tells_of_a_training_that_was_cut_short(scan, monkeypatch):
    monkeypatch.setattr(
        "medsr.engines.self_training.TimeLimit", lambda limit: lambda engine: engine.terminate()
    )
    run = AdaptingInferer(SelfTraining(1, 3, batch_size=1, block_size=(16, 16)), **SETTINGS)
    run(scan, network())
    assert run.facts["adaptation"]["iterations"] == 1
    assert run.facts["warnings"] == ["training stopped after 1 minutes: 1 of 3 iterations"]


def test_nothing_is_saved_unless_wanted(scan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    AdaptingInferer(short(), **SETTINGS)(scan, network())
    assert list(tmp_path.iterdir()) == []


def test_too_few_slices_are_not_worth_a_training(scan):
    training = short()
    run = AdaptingInferer(training, **SETTINGS)
    found = run(scan[..., :3], network())
    assert found.shape[-1] == 12
    assert training.done == {}
    assert "adaptation" not in run.facts
    assert run.facts["method"] == "cubic interpolation"


def test_a_measured_profile_adapts_as_well(scan, tmp_path):
    taps = tmp_path / "profile.txt"
    taps.write_text("1 2 2 2 1\n")
    run = AdaptingInferer(short(), **{**SETTINGS, "slice_profile": str(taps)})
    run(scan, network())
    assert run.facts["adaptation"]["iterations"] == 2
