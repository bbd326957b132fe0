from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from medsr.errors import SettingError
from medsr.geometry import rescaled_affine, rescaled_size, spacing_of
from medsr.phantoms import ramp
from medsr.transforms.slice_profile import PROFILES
from medsr.transforms.thick_slices import (
    RandSimulateThickSlices,
    RandSimulateThickSlicesd,
    SimulateThickSlices,
    SimulateThickSlicesd,
    ThickSliceParameters,
    acquire_whole_slabs,
    thick_slice_affine,
)
from monai.data import MetaTensor
from scipy.spatial.transform import Rotation

TAPS = (0.1, 0.2, 0.4, 0.2, 0.1)
FLIPS = ((1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, 1), (1, 1, -1), (-1, 1, -1))
# Six ways to lay the axes, every one flipped differently; then two oblique ones.
STACKS = [
    *(
        pytest.param(p, s, (0, 0, 0), id=f"{p}{s}")
        for p, s in zip(permutations(range(3)), FLIPS, strict=True)
    ),
    pytest.param((0, 1, 2), (-1, -1, 1), (20, -35, 50), id="oblique"),
    pytest.param((2, 0, 1), (1, 1, -1), (-8, 12, 5), id="oblique sagittal"),
]


def affine_of(order, signs, angles, spacing=(1.0, 1.0, 1.0)) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = 0
    for axis, (world, sign) in enumerate(zip(order, signs, strict=True)):
        matrix[world, axis] = sign * spacing[axis]
    matrix[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ matrix[:3, :3]
    matrix[:3, 3] = (-31.5, 12.25, 60.0)
    return matrix


def image_of(values: np.ndarray, affine: np.ndarray | None = None, **meta) -> MetaTensor:
    affine = np.eye(4) if affine is None else affine
    return MetaTensor(
        torch.as_tensor(values, dtype=torch.float32)[None], affine=torch.as_tensor(affine), meta=meta
    )


def acquired_ramp(axis, affine, transform, direction):
    """A ramp through a stack of 60 slices, acquired, and the ramp that should have come out."""
    shape = [4, 5]
    shape.insert(axis, 60)
    # Around zero, so that float32 stays out of the comparison.
    offset = ramp(shape, affine=affine, direction=direction).mean()
    thick = transform(image_of(ramp(shape, affine=affine, direction=direction) - offset, affine))
    expected = ramp(thick.shape[1:], affine=thick.affine.numpy(), direction=direction) - offset
    return np.moveaxis(thick.numpy()[0] - expected, axis, -1), thick


@pytest.mark.parametrize(("order", "signs", "angles"), STACKS)
@pytest.mark.parametrize("profile", [*PROFILES, TAPS], ids=str)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_ramp_keeps_its_world_coordinates(axis, profile, order, signs, angles):
    affine = affine_of(order, signs, angles, spacing=(0.9, 0.9, 0.9))
    normal = affine[:3, axis]
    for ratio, thickness in ((3.5, 1.0), (4.0, 1.0), (4.0, 0.7), (5.0, 1.1)):
        transform = SimulateThickSlices(0.9 * ratio, 0.9 * ratio * thickness, profile, axis=axis)
        for direction in (normal, (0.3, -0.5, 0.8)):
            error, thick = acquired_ramp(axis, affine, transform, direction)
            inner = error[..., 3:-3] / 0.9
            assert inner.shape[-1] >= 5
            assert np.abs(inner).max() < 0.05
            assert abs(inner.mean()) < 0.005
        spacing = np.full(3, 0.9)
        spacing[axis] *= ratio
        np.testing.assert_allclose(spacing_of(thick.affine), spacing)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("phase", [-1.3, 0.5, 2.0])
def test_the_affine_follows_the_phase(profile, phase):
    parameters = ThickSliceParameters(4.0, 1.0, profile, phase)
    error, thick = acquired_ramp(
        2,
        affine_of((1, 2, 0), (1, -1, -1), (10, 20, 30)),
        lambda image: RandSimulateThickSlices()(image, parameters),
        (0.3, -0.5, 0.8),
    )
    assert thick.shape[-1] == 15
    assert np.abs(error[..., 3:-3]).max() < 0.05
    assert abs(error[..., 3:-3].mean()) < 0.05


@pytest.mark.parametrize("size", [24, 25, 26, 27])
def test_the_field_of_view_is_centred_on_the_old_one(size):
    parameters = ThickSliceParameters(4.0)
    affine = affine_of((0, 1, 2), (1, 1, 1), (20, -35, 50))
    thick = thick_slice_affine(affine, parameters, size=size)
    count = parameters.thick_size(size)
    assert count == 6
    old, new = affine @ [0, 0, (size - 1) / 2, 1], thick @ [0, 0, (count - 1) / 2, 1]
    np.testing.assert_allclose(new, old, atol=1e-9)


@pytest.mark.parametrize(
    ("size", "ratio", "count"), [(60, 4, 15), (60, 3.5, 17), (60, 0.3 / 0.1, 20), (3, 4, 1)]
)
def test_as_many_slices_as_fit(size, ratio, count):
    assert ThickSliceParameters(ratio).thick_size(size) == count
    assert ThickSliceParameters(ratio).matrix(size).shape == (count, size)
    assert ThickSliceParameters(ratio).label_matrix(size).shape == (count, size)


WHOLE_SLABS = pytest.mark.parametrize("ratio", [2.5, 2.7, 3.3, 3.5, 4.0])


@WHOLE_SLABS
@pytest.mark.parametrize("is_label", [False, True])
def test_whole_slabs_and_what_is_left_of_the_volume_share_one_centre(ratio, is_label):
    affine = affine_of((1, 2, 0), (1, -1, -1), (10, 20, 30), spacing=(0.8, 0.9, 1.1))
    parameters = ThickSliceParameters(ratio, 0.8)
    for size in range(117, 133):
        values = ramp([3, 4, size], affine=affine, direction=(0.3, -0.5, 0.8))
        values -= values.mean()
        thin, thick, matrix = acquire_whole_slabs(image_of(values, affine), parameters, is_label=is_label)
        count = thick.shape[-1]
        assert count == parameters.thick_size(size)
        assert thin.shape[-1] == rescaled_size(count, ratio)
        assert matrix.shape == (count, thin.shape[-1])
        # What a method makes of the thick slices lies on the thin ones.
        again = rescaled_affine(thick.affine.numpy(), 2, size=count, new_size=thin.shape[-1], ratio=ratio)
        np.testing.assert_allclose(again, thin.affine, atol=1e-9)
        start = (size - thin.shape[-1]) // 2
        np.testing.assert_allclose(thin.numpy()[0], values[..., start : start + thin.shape[-1]], atol=1e-4)
        # A ramp shows where the slices claim to be, and where they are.
        for found in (thin, thick):
            offset = ramp([3, 4, size], affine=affine, direction=(0.3, -0.5, 0.8)).mean()
            expected = ramp(found.shape[1:], affine=found.affine.numpy(), direction=(0.3, -0.5, 0.8)) - offset
            assert np.abs(found.numpy()[0] - expected)[..., 2:-2].max() < 0.05


def test_the_sizes_of_whole_slabs_round_halves_up():
    # round() takes 122.5 for 122; no method makes 122 slices of 49.
    found = acquire_whole_slabs(torch.ones(1, 3, 3, 123), ThickSliceParameters(2.5))
    assert (found.thin.shape[-1], found.thick.shape[-1]) == (123, 49)


def test_a_volume_shorter_than_a_slab_is_refused():
    with pytest.raises(SettingError, match="3 slices are fewer than the 4 of a slab at ratio 4; lower"):
        acquire_whole_slabs(torch.ones(1, 3, 3, 3), ThickSliceParameters(4.0))


def test_whole_slabs_leave_the_volume_as_it_was():
    image = image_of(np.random.default_rng(0).random((4, 4, 24)), np.diag([2, 2, 1.5, 1]))
    before = image.clone()
    thin, thick, _ = acquire_whole_slabs(image, ThickSliceParameters(5.0, 0.6))
    assert thick.meta["slice_thickness_mm"] == pytest.approx(4.5)
    assert torch.equal(image.as_tensor(), before.as_tensor())
    assert torch.equal(image.affine, before.affine)
    assert thin.affine[2, 3] == pytest.approx(2 * 1.5)


@pytest.mark.parametrize("profile", [*PROFILES, TAPS], ids=str)
@pytest.mark.parametrize("thickness", [2.0, 3.5, 4.0])
def test_a_constant_stays_constant(profile, thickness):
    image = image_of(np.full((3, 30, 4), 7.5))
    thick = SimulateThickSlices(4.0, thickness, profile, axis=1)(image)
    assert thick.shape == (1, 3, 7, 4)
    np.testing.assert_allclose(thick.numpy(), 7.5, rtol=1e-5)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_mean_of_an_object_inside_is_preserved(profile):
    values = np.zeros((4, 4, 64))
    values[1:3, 1:3, 16:48] = np.random.default_rng(0).random((2, 2, 32)) + 1
    values = 0.25 * np.roll(values, 1, 2) + 0.5 * values + 0.25 * np.roll(values, -1, 2)
    thick = SimulateThickSlices(4.0, profile=profile)(image_of(values))
    # Sampling with point-sampled taps weighs slices unevenly; integrated profiles do not.
    assert thick.mean().item() == pytest.approx(values.mean(), rel=0.02)
    np.testing.assert_allclose(thick.numpy()[0, 0], 0)


@pytest.mark.parametrize("profile", ["slr", "gaussian", "box"])
def test_a_point_source_shows_the_profile_when_slices_move_over_it(profile):
    # Slice 4 of 8 is centred at 19.5 + 0.5 * 5 = 22, where the point is.
    image = image_of(np.eye(1, 40, 22)[None])
    phases = np.arange(-4, 5)
    parameters = [ThickSliceParameters(5.0, 1.0, profile, float(phase)) for phase in phases]
    seen = np.array([RandSimulateThickSlices()(image, one)[0, 0, 0, 4].item() for one in parameters])
    np.testing.assert_allclose(seen, seen[::-1], atol=1e-6)
    assert seen.sum() == pytest.approx(1, abs=0.05)
    assert seen[phases == 0] == seen.max()
    # sqrt(5 ** 2 - 1) = 4.9 voxels wide: the third neighbour lies beyond half the height, the second does not.
    assert (seen[np.abs(phases) <= 2] > 0.5 * seen.max()).all()
    assert (seen[np.abs(phases) >= 3] < 0.5 * seen.max()).all()


def test_only_the_slice_axis_is_blurred():
    values = np.random.default_rng(0).random((5, 6, 20))
    thick = SimulateThickSlices(4.0)(image_of(values)).numpy()[0]
    alone = SimulateThickSlices(4.0)(image_of(values[2:3, 3:4])).numpy()[0]
    np.testing.assert_allclose(thick[2:3, 3:4], alone, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_labels_are_averaged_over_the_slab_of_one_spacing(axis):
    rng = np.random.default_rng(0)
    labels = torch.as_tensor(rng.random((3, 16, 16, 16)) > 0.7).float()
    image = MetaTensor(labels, affine=torch.eye(4))
    # Neither thickness nor profile may matter for a label.
    thick = SimulateThickSlices(4.0, 2.0, "gaussian", axis=axis, is_label=True)(image)
    blocks = torch.moveaxis(labels, 1 + axis, -1).unflatten(-1, (4, 4)).mean(-1)
    np.testing.assert_allclose(thick.numpy(), torch.moveaxis(blocks, -1, 1 + axis).numpy(), atol=1e-6)
    assert 4 * thick.sum().item() == pytest.approx(labels.sum().item(), rel=1e-5)


def test_one_hot_labels_stay_a_partition_for_any_ratio():
    index = torch.randint(0, 3, (6, 6, 40))
    one_hot = torch.nn.functional.one_hot(index, 3).permute(3, 0, 1, 2).float()
    thick = SimulateThickSlices(3.7, is_label=True)(MetaTensor(one_hot))
    np.testing.assert_allclose(thick.sum(0).numpy(), 1, atol=1e-5)
    assert thick.min() >= 0


def test_metadata_say_the_thickness_and_the_input_is_untouched():
    image = image_of(np.random.default_rng(0).random((4, 4, 24)), np.diag([2, 2, 1.5, 1]), name="a")
    before, meta = image.clone(), dict(image.meta)
    thick = SimulateThickSlices(6.0, 4.5)(image)
    assert thick.meta["slice_thickness_mm"] == pytest.approx(4.5)
    assert thick.meta["name"] == "a"
    assert list(thick.meta["spatial_shape"]) == [4, 4, 6]
    assert thick.affine.dtype == torch.float64
    assert thick.dtype == torch.float32
    assert "slice_thickness_mm" not in image.meta
    assert meta.keys() == image.meta.keys()
    assert torch.equal(image.as_tensor(), before.as_tensor())
    np.testing.assert_array_equal(image.affine, np.diag([2, 2, 1.5, 1]))


def test_a_plain_tensor_counts_as_one_millimetre():
    thick = SimulateThickSlices(4.0)(torch.rand(1, 3, 3, 8))
    assert thick.shape == (1, 3, 3, 2)
    assert thick.affine[2].tolist() == [0, 0, 4, 1.5]


def test_integer_voxels_are_averaged_not_truncated():
    values = torch.arange(8, dtype=torch.int16).reshape(1, 1, 1, 8)
    assert SimulateThickSlices(4.0, is_label=True)(values).ravel().tolist() == pytest.approx([1.5, 5.5])


def test_slices_that_are_not_thick_are_refused():
    with pytest.raises(SettingError, match=r">= 1\.2, got 1\.1"):
        SimulateThickSlices(1.1)(torch.rand(1, 3, 3, 8))
    with pytest.raises(SettingError, match="thickness must be > 0"):
        SimulateThickSlices(4.0, -1.0)(torch.rand(1, 3, 3, 8))
    # Only what is not given is the spacing.
    with pytest.raises(SettingError, match="thickness must be > 0, got 0"):
        SimulateThickSlices(4.0, 0.0)(torch.rand(1, 3, 3, 8))
    with pytest.raises(SettingError, match="got 'none'"):
        SimulateThickSlices(4.0, profile="none")(torch.rand(1, 3, 3, 8))
    with pytest.raises(SettingError, match="got 'none'"):
        RandSimulateThickSlices(profiles={"slr": 1, "none": 1})


def test_replayed_parameters_give_the_same_result():
    image = image_of(np.random.default_rng(0).random((4, 4, 50)))
    rand = RandSimulateThickSlices(phase=0.5).set_random_state(seed=3)
    parameters = rand.make_parameters()
    first = rand(image, parameters)
    rand.make_parameters()
    second = RandSimulateThickSlices()(image, parameters)
    assert torch.equal(first.as_tensor(), second.as_tensor())
    assert torch.equal(first.affine, second.affine)


def test_the_seed_decides_and_draws_differ():
    def draws(seed):
        rand = RandSimulateThickSlices(phase=0.5).set_random_state(seed=seed)
        return [rand.make_parameters() for _ in range(5)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert len(set(draws(1))) == 5


def test_draws_cover_their_ranges_and_stay_inside():
    rand = RandSimulateThickSlices((2, 5), (0.7, 1.0), {"slr": 3, "box": 1}, phase=0.25).set_random_state(
        seed=0
    )
    draws = [rand.make_parameters() for _ in range(400)]
    ratios = np.array([d.ratio for d in draws])
    thickness = np.array([d.thickness for d in draws])
    phases = np.array([d.phase / d.ratio for d in draws])
    for values, low, high in ((ratios, 2, 5), (thickness, 0.7, 1.0), (phases, -0.25, 0.25)):
        assert low <= values.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < values.max() <= high
    share = np.mean([d.profile == "slr" for d in draws])
    assert {d.profile for d in draws} == {"slr", "box"}
    assert share == pytest.approx(0.75, abs=0.07)


def test_measured_taps_are_a_profile_like_any_other(tmp_path):
    image = image_of(np.random.default_rng(0).random((4, 4, 24)))
    file = tmp_path / "taps.txt"
    file.write_text(" ".join(str(100 * tap) for tap in TAPS), encoding="utf-8")
    by_file = SimulateThickSlices(4.0, profile=str(file))(image)
    by_hand = SimulateThickSlices(4.0, profile=TAPS)(image)
    np.testing.assert_allclose(by_file.numpy(), by_hand.numpy(), atol=1e-6)
    assert not np.allclose(by_hand.numpy(), SimulateThickSlices(4.0)(image).numpy(), atol=1e-3)
    rand = RandSimulateThickSlices((4, 4), profiles={TAPS: 1.0})
    np.testing.assert_allclose(rand(image).numpy(), by_hand.numpy(), atol=1e-6)


def test_dictionary_form_treats_images_and_labels_each_their_way():
    image = image_of(np.random.default_rng(0).random((4, 4, 24)))
    item = {"image": image, "label": image, "name": "a"}
    found = SimulateThickSlicesd(("image", "label"), 4.0, 3.0, label_keys=["label"])(item)
    assert torch.equal(found["image"].as_tensor(), SimulateThickSlices(4.0, 3.0)(image).as_tensor())
    assert torch.equal(found["label"].as_tensor(), SimulateThickSlices(4.0, is_label=True)(image).as_tensor())
    assert found["name"] == "a"
    assert item["image"] is image


@pytest.mark.parametrize("label_keys", ["label", ("label",)])
@pytest.mark.parametrize("form", [SimulateThickSlicesd, RandSimulateThickSlicesd])
def test_one_label_key_may_be_a_plain_word(form, label_keys):
    image = image_of(np.random.default_rng(0).random((4, 4, 24)))
    settings = {"slice_spacing_mm": 4.0} if form is SimulateThickSlicesd else {"ratio": (4, 4)}
    found = form(("image", "label"), label_keys=label_keys, **settings)({"image": image, "label": image})
    expected = image.as_tensor().unflatten(-1, (6, 4)).mean(-1)
    np.testing.assert_allclose(found["label"].numpy(), expected.numpy(), atol=1e-6)
    assert not torch.allclose(found["image"].as_tensor(), expected, atol=1e-4)


def test_missing_keys_are_an_error_unless_allowed():
    image = image_of(np.ones((4, 4, 8)))
    with pytest.raises(KeyError):
        SimulateThickSlicesd(("image", "label"), 4.0)({"image": image})
    found = SimulateThickSlicesd(("image", "label"), 4.0, allow_missing_keys=True)({"image": image})
    assert set(found) == {"image"}


def test_one_draw_serves_all_keys():
    image = image_of(np.random.default_rng(0).random((4, 4, 60)))
    transform = RandSimulateThickSlicesd(("image", "other", "label"), label_keys=("label",), phase=0.5)
    transform.set_random_state(seed=5)
    sizes = set()
    for _ in range(6):
        found = transform({"image": image, "other": image.clone(), "label": image})
        assert torch.equal(found["image"].as_tensor(), found["other"].as_tensor())
        assert torch.equal(found["image"].affine, found["label"].affine)
        assert found["image"].shape == found["label"].shape
        sizes.add(found["image"].shape)
    assert len(sizes) > 2


def test_the_dictionary_form_obeys_its_seed():
    image = image_of(np.random.default_rng(0).random((4, 4, 60)))

    def run(seed):
        return RandSimulateThickSlicesd("image").set_random_state(seed=seed)({"image": image})["image"]

    assert torch.equal(run(1).affine, run(1).affine)
    assert torch.equal(run(1).as_tensor(), run(1).as_tensor())
    assert not torch.equal(run(1).affine, run(2).affine)
