from __future__ import annotations

import numpy as np
import pytest
import torch
from medsr.engines.pseudo_thick import PreparePseudoThick, block_size, block_step
from medsr.errors import SettingError


def plain(**settings) -> PreparePseudoThick:
    """Without any change of the image."""
    return PreparePseudoThick(
        **{"gamma": (1, 1), "brightness": 0, "noise": 0, "profile": "box", "slices": 5, **settings}
    )


def batch(length: int = 40, classes: int = 1, **more) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    label = (torch.rand(2, classes, 6, 5, length, generator=generator) > 0.5).float()
    label[:, 1:] *= 1 - label[:, :1]
    return {"image": torch.rand(2, 1, 6, 5, length, generator=generator), "label": label, **more}


def test_without_phase_the_middle_of_the_block_is_acquired():
    given = batch(20, uncertainty=torch.rand(2, 1, 6, 5, 20))
    inputs, targets, args, facts = plain(phase=0)(given)
    assert (args, facts) == ((), {"scale": 4.0, "thickness": 1.0, "thin": True})
    # The box is a little narrower than the slice: a voxel has a width of its own.
    assert torch.allclose(inputs, given["image"].unflatten(-1, (5, 4)).mean(-1), atol=0.06)
    assert torch.equal(targets["thin"][:, 1:], given["label"])
    assert torch.allclose(
        targets["uncertainty"], given["uncertainty"].unflatten(-1, (5, 4)).mean(-1), atol=1e-5
    )


def test_a_network_of_the_thick_slices_alone_is_asked_for_nothing_thin():
    both, alone = (plain(thin=thin)(batch()) for thin in (True, False))
    assert torch.equal(both[0], alone[0])
    assert both[1].keys() - alone[1].keys() == {"thin"}
    assert all(torch.equal(both[1][key], value) for key, value in alone[1].items())
    assert alone[3]["thin"] is False


@pytest.mark.parametrize("phase", [0, 0.25, 0.5])
@pytest.mark.parametrize("ratio", [1.5, 3.3, 4.0, (2.1, 4.4)])
def test_a_block_has_room_for_the_slices_wherever_they_are_taken(ratio, phase):
    length = block_size((6, 5, 5), ratio, phase)[-1]
    prepare = plain(ratio=ratio, phase=phase)
    for _ in range(20):
        assert prepare(batch(length))[0].shape[-1] == 5


def test_blocks_of_a_scans_own_slices_start_at_whole_slices():
    assert block_step(3.3, phase=0.5) == 1
    assert block_step(3.3, phase=0) == block_step((3.3, 3.3), phase=0) == 3.3
    with pytest.raises(SettingError, match="one ratio, got the range 3 to 4"):
        block_step((3, 4), phase=0)


def test_the_mask_of_a_slice_is_what_fills_most_of_it():
    given = batch(20, classes=2)
    _, targets, _, _ = plain(phase=0)(given)
    shares = given["label"].unflatten(-1, (5, 4)).mean(-1)
    shares = torch.cat([1 - shares.sum(1, keepdim=True), shares], dim=1)
    best = shares.amax(1, keepdim=True)
    assert torch.equal((targets["thick"] * shares).sum(1, keepdim=True), best)
    assert torch.equal(targets["thick"].sum(1), torch.ones(2, 6, 5, 5))


def test_the_phase_moves_slices_and_target_together():
    # A ramp holds its own position: slice means must agree with the target's, wherever they were taken.
    ramp = torch.arange(60.0).expand(1, 1, 8, 8, 60) / 60
    prepare = plain(phase=0.5)
    starts = set()
    for _ in range(40):
        inputs, targets, _, _ = prepare({"image": ramp, "label": ramp})
        thin = targets["thin"][0, 1, 0, 0]
        assert torch.allclose(inputs[0, 0, 0, 0], thin.unflatten(-1, (5, 4)).mean(-1), atol=1e-3)
        starts.add(round(float(thin[0]) * 60))
    assert starts == {18, 19, 20, 21, 22}


def test_a_ratio_between_whole_numbers():
    prepare = plain(ratio=(3.2, 4.4), slices=5)
    for _ in range(10):
        inputs, targets, _, facts = prepare(batch())
        assert inputs.shape[-1] == 5
        assert targets["thin"].shape[-1] == round(5 * facts["scale"])


def test_probabilities_add_up_to_one():
    given = batch()
    given["label"] = torch.cat([given["label"] * 1.2, given["label"] * 0.7], dim=1)
    _, targets, _, _ = plain()(given)
    for grid in ("thick", "thin"):
        assert torch.allclose(targets[grid].sum(1), torch.ones_like(targets[grid][:, 0]), atol=1e-6)
        assert float(targets[grid].min()) >= 0


def test_the_teacher_sees_the_clean_slices_and_their_mask():
    prepare = PreparePseudoThick(slices=5, noise=0.5, seed=3)
    inputs, targets, _, _ = prepare(batch())
    teacher = targets["teacher_image"]
    assert torch.equal(teacher[:, 1:], targets["thick"][:, 1:])
    noise = inputs - teacher[:, :1]
    assert float(noise.std()) > 0.01
    assert abs(float(noise.mean())) < 0.1


def test_labels_do_not_change_with_the_contrast():
    changed, targets, _, _ = plain(phase=0, gamma=(2, 2), brightness=0.2)(batch())
    same, unchanged, _, _ = plain(phase=0)(batch())
    assert not torch.allclose(changed, same, atol=0.05)
    assert torch.equal(targets["thin"], unchanged["thin"])


def test_one_seed_gives_one_sequence():
    first, again, other = (
        np.asarray(PreparePseudoThick(slices=5, noise=0, seed=seed)(batch())[0]) for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_short_block_is_refused():
    with pytest.raises(
        SettingError, match=r"a block of 20 voxels is too short for 5 slices of 4 voxels .* 24"
    ):
        plain()(batch(20))


def test_the_smallest_ratios_are_not_rounded_below_what_counts_as_thick():
    prepare = plain(ratio=(1.2, 1.3), slices=12, phase=0)
    assert {round(prepare(batch(20))[3]["scale"], 3) for _ in range(30)} <= {1.25, 1.333}
