from __future__ import annotations

import numpy as np
import pytest
import torch
from medsr.engines.prepare_batch import PreparePair, PreparePasted, PrepareThickSlices
from medsr.errors import SettingError
from medsr.geometry import slice_positions
from medsr.transforms.thick_slices import MIN_RATIO, ThickSliceParameters
from torch import Tensor


def plain(**settings) -> PrepareThickSlices:
    """Without noise and change of contrast."""
    return PrepareThickSlices(**{"noise": 0, "gamma": (1, 1), **settings})


def blocks(length: int = 64, *, channels: int = 1, count: int = 2) -> Tensor:
    return torch.rand(count, channels, 6, 5, length)


@pytest.mark.parametrize("ratio", [2.0, 2.5, 4.0, 5.3, 8.0])
@pytest.mark.parametrize("profile", ["slr", "gaussian", "box"])
def test_the_input_is_what_the_acquisition_makes_of_the_target(ratio, profile):
    prepare = plain(ratio=(ratio, ratio), thickness=(0.8, 0.8), profiles={profile: 1.0})
    inputs, targets, args, facts = prepare({"image": blocks(96)})
    assert args == ()
    count, size = inputs.shape[-1], targets.shape[-1]
    assert facts["scale"] == pytest.approx(size / count)
    assert facts["thickness"] == 0.8
    again = (
        targets
        @ torch.as_tensor(
            ThickSliceParameters(facts["scale"], 0.8, profile).matrix(size, count), dtype=torch.float32
        ).T
    )
    # The end slices were acquired from neighbours that the target does not hold.
    assert torch.allclose(inputs[..., 1:-1], again[..., 1:-1], atol=1e-3)


def test_the_end_slices_are_acquired_from_real_neighbours():
    image = torch.zeros(1, 1, 4, 4, 64)
    prepare = plain(ratio=(4, 4), thickness=(1.1, 1.1), profiles={"gaussian": 1.0})
    start = (64 - 48) // 2
    image[..., :start] = 1.0
    inputs, targets, _, _ = prepare({"image": image})
    assert not targets.any()
    assert float(inputs[..., 0].min()) > 0.05
    assert float(inputs[..., 3:].abs().max()) < 1e-6


@pytest.mark.parametrize("length", [64, 65, 70, 97])
@pytest.mark.parametrize("ratio", [2.0, 3.0, 3.7, 6.0])
def test_slices_and_target_share_one_centre(length, ratio):
    # On a ramp a smooth symmetric profile measures its own centre.
    image = torch.arange(float(length)).expand(1, 1, 3, 3, length) / length
    prepare = plain(ratio=(ratio, ratio), thickness=(0.7, 0.7), profiles={"gaussian": 1.0})
    inputs, targets, _, facts = prepare({"image": image})
    count, size = inputs.shape[-1], targets.shape[-1]
    positions = slice_positions(size, count, 1 / facts["scale"])
    first = float(targets[0, 0, 0, 0, 0]) * length
    measured = inputs[0, 0, 0, 0].double().numpy() * length - first
    assert np.allclose(measured, positions, atol=0.02)


def test_the_ratio_is_drawn_over_its_range_and_rounded_to_whole_voxels():
    prepare = plain(ratio=(2.0, 8.0))
    image = {"image": blocks(64, count=1)}
    found = []
    for _ in range(60):
        inputs, targets, _, facts = prepare(image)
        assert 4 <= inputs.shape[-1] <= 12
        assert targets.shape[-1] == round(inputs.shape[-1] * facts["scale"])
        assert targets.shape[-1] + 2 * facts["scale"] <= 64 + 2
        found.append(facts["scale"])
    assert 1.9 < min(found) < 2.5
    assert 6.5 < max(found) < 8.2
    # Uniform in the logarithm: the median is the geometric mean of the ends.
    assert 3.2 < float(np.median(found)) < 5.0


@pytest.mark.parametrize("length", [17, 18, 20, 24])
def test_the_smallest_ratio_is_told_as_it_was_acquired(length):
    image = torch.arange(float(length)).expand(1, 1, 3, 3, length) / length
    prepare = plain(ratio=(1.2, 1.22), thickness=(0.9, 0.9), profiles={"gaussian": 1.0})
    for _ in range(20):
        inputs, targets, _, facts = prepare({"image": image})
        count, size = inputs.shape[-1], targets.shape[-1]
        assert facts["scale"] == size / count >= MIN_RATIO
        # On a ramp slices are as far apart as they were acquired.
        first, last = inputs[0, 0, 0, 0, [2, -3]] * length
        assert float(last - first) / (count - 5) == pytest.approx(facts["scale"], abs=0.01)


def test_the_number_of_slices_is_limited():
    inputs, targets, _, _ = plain(ratio=(2, 2), max_slices=5)({"image": blocks(64)})
    assert (inputs.shape[-1], targets.shape[-1]) == (5, 10)


def test_a_thick_label_is_what_fills_most_of_the_slice():
    image = blocks(64, channels=3)
    image[:, 1:] = (image[:, 1:] > 0.5).float()
    image[:, 2] *= 1 - image[:, 1]
    inputs, targets, _, _ = plain(ratio=(4, 4), thickness=(0.6, 0.6), label_classes=2)({"image": image})
    assert inputs.shape[1] == targets.shape[1] == 3
    # Whatever the thickness of the excited slab, a label fills its slice.
    share = targets[:, 1:].unflatten(-1, (-1, 4)).mean(-1)
    share = torch.cat([1 - share.sum(1, keepdim=True), share], dim=1)
    mask = torch.cat([1 - inputs[:, 1:].sum(1, keepdim=True), inputs[:, 1:]], dim=1)
    assert torch.equal(mask.unique(), torch.tensor([0.0, 1.0]))
    assert torch.allclose((mask * share).sum(1), share.amax(1), atol=1e-3)


def test_noise_is_added_to_the_image_of_the_input_alone():
    image = torch.full((16, 2, 8, 8, 64), 0.5)
    prepare = PrepareThickSlices(ratio=(4, 4), noise=0.1, gamma=(1, 1), label_classes=1)
    inputs, targets, _, _ = prepare({"image": image})
    assert torch.equal(targets, torch.full_like(targets, 0.5))
    assert torch.equal(inputs[:, 1], torch.ones_like(inputs[:, 1]))
    spread = inputs[:, 0].flatten(1).std(dim=1)
    silent = int((spread < 1e-4).sum())
    # Half of the stacks stay clean, and none gets more than the limit.
    assert 3 <= silent <= 13
    assert 0.01 < float(spread.max()) < 0.12


def test_gamma_changes_both_sides_of_a_pair_and_no_label():
    image = blocks(64, channels=2)
    image[:, 0] = image[:, 0] * 1.4 - 0.2
    prepare = PrepareThickSlices(ratio=(4, 4), noise=0, gamma=(2, 2), label_classes=1, profiles={"box": 1.0})
    inputs, targets, _, _ = prepare({"image": image})
    same, unchanged, _, _ = plain(ratio=(4, 4), label_classes=1, profiles={"box": 1.0})({"image": image})
    before = unchanged[:, 0]
    expected = before.clamp(0, 1) ** 2 + (before - before.clamp(0, 1))
    assert torch.allclose(targets[:, 0], expected, atol=1e-6)
    assert torch.equal(targets[:, 1], unchanged[:, 1])
    assert torch.allclose(inputs[:, 1], same[:, 1])
    assert not torch.allclose(inputs[:, 0], same[:, 0], atol=1e-2)


def test_one_seed_gives_one_sequence():
    def sequence(seed: int) -> list[Tensor]:
        torch.manual_seed(0)
        prepare, image = PrepareThickSlices(seed=seed), {"image": torch.rand(1, 1, 4, 4, 64)}
        return [prepare(image)[0] for _ in range(3)]

    first, again, other = sequence(1), sequence(1), sequence(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_batch_itself_is_not_changed():
    image = blocks()
    before = image.clone()
    PrepareThickSlices(noise=0.1)({"image": image})
    assert torch.equal(image, before)


def test_a_block_too_short_is_a_setting_error():
    with pytest.raises(SettingError, match=r"block of 30 voxels is too short for 4 slices at ratio 8\.00"):
        plain(ratio=(8, 8))({"image": blocks(30)})


def test_an_unknown_profile_is_named_at_once():
    with pytest.raises(SettingError, match="triangle"):
        PrepareThickSlices(profiles={"triangle": 1.0})


def test_a_curve_changes_the_contrast_of_a_share_of_the_blocks():
    sharp = torch.rand(200, 1, 2, 2, 40, generator=torch.Generator().manual_seed(0))
    sharp[:, :, 0] = 0
    prepare = PrepareThickSlices((4, 4), (1, 1), noise=0, gamma=(1, 1), contrast=0.4, profiles={"box": 1})
    inputs, target, _, _ = prepare({"image": sharp})
    start = (40 - target.shape[-1]) // 2
    kept = (target - sharp[..., start : start + target.shape[-1]]).abs().amax((1, 2, 3, 4)) < 1e-5
    assert 0.5 < float(kept.float().mean()) < 0.7
    # The background stays dark, nothing leaves the range, and input and target remain a pair.
    assert float(target[:, :, 0].abs().max()) == 0
    assert 0 <= float(target.min()) <= float(target.max()) <= 1
    inner = target[..., 4:-4].unflatten(-1, (-1, 4)).mean(-1)
    assert torch.allclose(inputs[..., 1:-1], inner, atol=0.02)


@pytest.mark.parametrize("parallax", ["maps", "none"])
def test_a_pair_comes_with_what_the_network_is_asked_for(parallax):
    pair = {"image": torch.rand(2, 6, 4, 6), "label": torch.rand(2, 6, 8, 12), "case": ["a", "b"]}
    image, label, args, settings = PreparePair(parallax)(pair, torch.device("cpu"))
    assert torch.equal(image, pair["image"])
    assert torch.equal(label, pair["label"])
    assert (args, settings) == ((), {"parallax": parallax})


def frames(count: int = 6) -> dict[str, Tensor]:
    """Frame k has the grey k / 10 everywhere, and an instrument of class 1 or 2 in its own row."""
    image = (torch.arange(count) / 10).view(-1, 1, 1, 1).expand(count, 3, 8, 5).clone()
    label = torch.zeros(count, 1, 8, 5, dtype=torch.long)
    for k in range(count):
        label[k, 0, k] = 1 + k % 2
    label[:, :, 7] = 255
    return {"image": image, "label": label}


def test_an_instrument_comes_with_its_pixels_its_class_and_its_place():
    batch = frames()
    image, label = PreparePasted(share=1.0, seed=4)(batch)
    new = (label != batch["label"]).squeeze(1)
    assert new.any()
    for k, row, column in new.nonzero().tolist():
        # Row n is where frame n has its instrument, and its grey says where the pixel is from.
        assert label[k, 0, row, column] == 1 + row % 2
        assert image[k, :, row, column].tolist() == pytest.approx([row / 10] * 3)
    own = ~new.unsqueeze(1).expand_as(image)
    assert torch.equal(image[own], batch["image"][own]), "all else stays as it was"
    assert torch.equal(label[:, :, 7], batch["label"][:, :, 7]), "what nobody labelled is not pasted"


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 0), (0.5, 40, 110)])
def test_as_many_frames_get_something_pasted_in_as_are_asked_for(share, least, most):
    prepare, batch = PreparePasted(share=share), frames()
    changed = sum(int((prepare(batch)[1] != batch["label"]).flatten(1).any(1).sum()) for _ in range(30))
    assert least <= changed <= most


def test_pasting_leaves_the_batch_as_it_was():
    batch, again = frames(), frames()
    PreparePasted(share=1.0)(batch)
    assert torch.equal(batch["image"], again["image"])
    assert torch.equal(batch["label"], again["label"])


def test_more_than_all_frames_are_refused():
    with pytest.raises(SettingError, match=r"share of frames to paste into must lie in \[0, 1\], got 1.5"):
        PreparePasted(share=1.5)
