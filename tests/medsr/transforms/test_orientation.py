from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from medsr.errors import GeometryError, SettingError
from medsr.geometry import spacing_of
from medsr.transforms.orientation import RandSharpAxisLastd, SliceAxisLast, SliceAxisLastd, permute_spatial
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.transforms import Compose, Invertd
from scipy.spatial.transform import Rotation

SHAPE = (5, 6, 7)
STACKS = [
    (axis, order, angles)
    for axis in range(3)
    for order in permutations(range(3))
    for angles in ((0, 0, 0), (20, -35, 50))
]


def stack(slice_axis: int, order=(0, 1, 2), angles=(0, 0, 0), *, spacing_mm=4.0, channels=2) -> MetaTensor:
    """Distinct voxels; the slice axis anywhere in the array, the array anywhere in the world."""
    spacing = np.array([0.9, 1.1, 1.0])
    spacing[slice_axis] = spacing_mm
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, order] * np.array([-1, 1, -1]) * spacing
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ affine[:3, :3]
    affine[:3, 3] = (-30.5, 12.25, 60)
    values = torch.arange(channels * int(np.prod(SHAPE)), dtype=torch.float32).reshape(channels, *SHAPE)
    return MetaTensor(values, affine=torch.as_tensor(affine), meta={"filename_or_obj": "folder/a.nii"})


def world_of_values(image: MetaTensor) -> dict[float, np.ndarray]:
    """Where each (distinct) value of the first channel is."""
    affine = image.affine.numpy()
    places = {}
    for index in np.random.default_rng(0).integers(0, image.shape[1:], (20, 3)):
        places[float(image[(0, *index)])] = affine[:3, :3] @ index + affine[:3, 3]
    return places


def same_world(first: MetaTensor, second: MetaTensor) -> None:
    where = {float(v): np.argwhere(second[0].numpy() == v)[0] for v in world_of_values(first)}
    affine = second.affine.numpy()
    for value, expected in world_of_values(first).items():
        np.testing.assert_allclose(affine[:3, :3] @ where[value] + affine[:3, 3], expected, atol=1e-9)


@pytest.mark.parametrize(("axis", "order", "angles"), STACKS)
def test_slices_come_last_and_voxels_keep_their_place_in_the_world(axis, order, angles):
    image = stack(axis, order, angles)
    found = SliceAxisLast()(image)
    assert found.shape[-1] == SHAPE[axis]
    assert int(np.argmax(spacing_of(found.affine))) == 2
    assert sorted(found.unique().tolist()) == sorted(image.unique().tolist())
    same_world(image, found)
    # The two in-plane axes keep their order.
    rest = [n for i, n in enumerate(SHAPE) if i != axis]
    assert list(found.shape[1:3]) == rest


@pytest.mark.parametrize(("axis", "order", "angles"), STACKS[::3])
def test_the_inverse_brings_everything_back(axis, order, angles):
    image = stack(axis, order, angles)
    transform = SliceAxisLast()
    found = transform.inverse(transform(image))
    assert torch.equal(found.as_tensor(), image.as_tensor())
    assert torch.equal(found.affine, image.affine)
    assert found.applied_operations == []
    assert found.meta["filename_or_obj"] == "folder/a.nii"


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_dictionary_form_treats_every_key_by_its_own_geometry(axis):
    item = {"image": stack(axis), "label": stack(2 - axis), "name": "a"}
    transform = SliceAxisLastd(("image", "label"))
    moved = transform(item)
    assert moved["image"].shape[-1] == SHAPE[axis]
    assert moved["label"].shape[-1] == SHAPE[2 - axis]
    back = transform.inverse(moved)
    for key in ("image", "label"):
        assert torch.equal(back[key].as_tensor(), item[key].as_tensor())
    assert moved["name"] == back["name"] == "a"
    with pytest.raises(KeyError):
        SliceAxisLastd(("image", "other"))(item)
    assert "other" not in SliceAxisLastd(("image", "other"), allow_missing_keys=True)(item)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_invertd_restores_a_finer_result_after_batching(axis):
    preprocessing = Compose([SliceAxisLastd("image")])
    batch = list_data_collate([preprocessing({"image": stack(axis, (1, 2, 0), (20, -35, 50))})])
    # More slices, other channels, no metadata. Invertd leaves out what is no MetaTensor.
    (item,) = decollate_batch(batch)
    item["pred"] = MetaTensor(item["image"].as_tensor()[:1].repeat_interleave(3, dim=-1) + 0.5)
    invert = Invertd(
        "pred", transform=preprocessing, orig_keys="image", nearest_interp=False, allow_missing_keys=True
    )
    pred = invert(item)["pred"]
    shape = list(SHAPE)
    shape[axis] *= 3
    assert list(pred.shape) == [1, *shape]
    expected = stack(axis).as_tensor()[:1].repeat_interleave(3, dim=1 + axis) + 0.5
    assert torch.equal(pred.as_tensor(), expected)
    np.testing.assert_allclose(pred.affine, stack(axis, (1, 2, 0), (20, -35, 50)).affine)


def test_the_input_is_not_changed():
    image = stack(0)
    before, affine = image.as_tensor().clone(), image.affine.clone()
    found = SliceAxisLast()(image)
    found.meta["new"] = 1
    assert torch.equal(image.as_tensor(), before)
    assert torch.equal(image.affine, affine)
    assert image.applied_operations == []
    assert "new" not in image.meta


@pytest.mark.parametrize("spacing_mm", [1.1, 1.3])
def test_near_isotropic_volumes_are_refused_by_name(spacing_mm):
    image = stack(0, spacing_mm=spacing_mm)
    with pytest.raises(GeometryError, match=r"^a\.nii: already near-isotropic"):
        SliceAxisLast()(image)
    with pytest.raises(GeometryError, match=r"a\.nii"):
        SliceAxisLastd("image")({"image": image})


def test_force_runs_all_the_same():
    equal = MetaTensor(torch.rand(1, *SHAPE), affine=torch.eye(4))
    # No axis stands out: the last counts, so nothing moves.
    assert torch.equal(SliceAxisLast(force=True)(equal).as_tensor(), equal.as_tensor())
    image = stack(0, spacing_mm=1.15)
    transform = SliceAxisLastd("image", force=True)
    moved = transform({"image": image})
    assert moved["image"].shape[-1] == SHAPE[0]
    assert torch.equal(transform.inverse(moved)["image"].as_tensor(), image.as_tensor())


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_permute_spatial_moves_voxels_and_affine_alike(order):
    image = stack(2, (1, 2, 0), (20, -35, 50))
    found = permute_spatial(image, order)
    assert found.shape == (2, *(SHAPE[i] for i in order))
    same_world(image, found)
    back = permute_spatial(found, np.argsort(order).tolist())
    assert torch.equal(back.as_tensor(), image.as_tensor())
    assert permute_spatial(torch.rand(1, *SHAPE), order).shape[1:] == found.shape[1:]


# --- RandSharpAxisLastd ---


def constant_along(axis: int, size: int = 24) -> MetaTensor:
    """Every line along the axis is one value, all other neighbours differ: the axis betrays itself."""
    shape = [size] * 3
    shape[axis] = 1
    values = torch.rand(1, *shape).expand(1, size, size, size).clone()
    return MetaTensor(values, meta={"sharp_axes": tuple(a for a in range(3) if a != axis)})


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_axis_that_is_not_sharp_never_comes_last(axis, shuffle):
    item = {"image": constant_along(axis)}
    transform = RandSharpAxisLastd("image", (8, 8, 16), shuffle=shuffle).set_random_state(seed=0)
    places = set()
    for _ in range(40):
        block = transform(item)["image"]
        assert block.shape == (1, 8, 8, 16)
        constant = [a for a in range(3) if block.diff(dim=1 + a).abs().max() == 0]
        assert len(constant) == 1
        places.add(constant[0])
    assert 2 not in places
    # The interpolated axis lies in the block's plane, in either place where shuffling (or the axis) allows.
    assert places == ({0, 1} if shuffle or axis == 1 else {0 if axis == 0 else 1})


def test_without_metadata_all_axes_are_sharp():
    image = constant_along(0)
    transform = RandSharpAxisLastd("image", (8, 8, 16)).set_random_state(seed=0)
    plain = {"image": image.as_tensor()}
    last = [transform(plain)["image"].diff(dim=3).abs().max() == 0 for _ in range(60)]
    assert 0.15 < np.mean(last) < 0.55


def test_a_block_is_a_piece_of_the_volume_up_to_axes_and_direction():
    values = torch.arange(20.0**3).reshape(1, 20, 20, 20)
    steps = {400.0: 0, 20.0: 1, 1.0: 2}
    transform = RandSharpAxisLastd("image", (6, 8, 12), foreground=0).set_random_state(seed=1)
    orders, directions = set(), set()
    for _ in range(60):
        block = transform({"image": values})["image"]
        found = [block.diff(dim=1 + a).unique() for a in range(3)]
        assert all(len(step) == 1 for step in found)
        orders.add(tuple(steps[abs(step.item())] for step in found))
        directions.add(tuple(bool(step > 0) for step in found))
    assert orders == set(permutations(range(3)))
    assert len(directions) == 8


def test_all_keys_get_the_same_block():
    image = torch.rand(1, 24, 24, 24)
    item = {"image": image, "label": torch.cat([image * 2, image * 3]), "name": "a"}
    transform = RandSharpAxisLastd(("image", "label"), (8, 10, 16)).set_random_state(seed=0)
    for _ in range(10):
        found = transform(item)
        assert torch.equal(found["label"], torch.cat([found["image"] * 2, found["image"] * 3]))
    assert item["image"] is image
    assert found["name"] == "a"


def test_the_foreground_decides_where_blocks_lie():
    values = torch.zeros(1, 48, 48, 48)
    values[:, 24:] = 1
    item = {"image": values, "foreground": values[0] > 0}

    def shares(foreground):
        transform = RandSharpAxisLastd("image", (12, 12, 16), foreground).set_random_state(seed=0)
        return np.array([transform(item)["image"].mean().item() for _ in range(40)])

    # Ten draws, the share read on every fourth voxel: nearly always enough.
    assert (shares(0.6) > 0.5).mean() > 0.8
    assert (shares(0.0) < 0.3).mean() > 0.15
    # The mask, not the intensities, decides.
    item["foreground"] = values[0] == 0
    assert (shares(0.6) < 0.5).mean() > 0.8


def test_the_foreground_is_found_when_no_mask_is_given():
    values = torch.zeros(1, 48, 48, 48)
    values[:, :, 20:] = 1 + 0.1 * torch.rand(1, 48, 28, 48)
    transform = RandSharpAxisLastd("image", (12, 12, 16), 0.6).set_random_state(seed=0)
    blocks = [(transform({"image": values})["image"] > 0).float().mean().item() for _ in range(40)]
    assert np.mean([share > 0.5 for share in blocks]) > 0.9


@pytest.mark.parametrize("shape", [(6, 30, 30), (30, 30, 5), (5, 6, 7)])
def test_small_volumes_are_padded_by_their_edge(shape):
    values = torch.rand(1, *shape) + 1
    transform = RandSharpAxisLastd("image", (10, 10, 16), foreground=0).set_random_state(seed=0)
    for _ in range(10):
        block = transform({"image": values})["image"]
        assert block.shape == (1, 10, 10, 16)
        assert np.isin(block.numpy(), values.numpy()).all()
        assert block.is_contiguous()


def test_padding_is_centred_and_repeats_the_outermost_slices():
    values = torch.rand(1, 10, 10, 5)
    image = MetaTensor(values, meta={"sharp_axes": (2,)})
    transform = RandSharpAxisLastd("image", (10, 10, 8), shuffle=False).set_random_state(seed=0)
    block = transform({"image": image})["image"]
    same = [torch.equal(block[..., k], block[..., k + 1]) for k in range(7)]
    assert same in (
        [True, False, False, False, False, True, True],
        [True, True, False, False, False, False, True],
    )


def test_blocks_obey_the_seed():
    item = {"image": torch.rand(1, 24, 24, 24)}

    def run(seed):
        return RandSharpAxisLastd("image", (8, 8, 16)).set_random_state(seed=seed)(item)["image"]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_every_second_block_looks_for_the_mask():
    label = torch.zeros(1, 40, 40, 40)
    label[:, 30:34, 5:9, 20:24] = 1
    item = {"image": MetaTensor(torch.rand(1, 40, 40, 40)), "label": label}

    def hits(**settings) -> int:
        cut = RandSharpAxisLastd(["image", "label"], (12, 12, 12), 0.0, **settings).set_random_state(0)
        return sum(bool(cut(item)["label"].any()) for _ in range(60))

    assert hits(label_key="label") > 2 * hits() > 0
    # A lesion of one voxel, wherever it lies.
    for place in range(4):
        label.zero_()[:, 20 + place, 20 + place, 20 + place] = 1
        assert hits(label_key="label") > 2 * hits() > 0
    empty = {**item, "label": torch.zeros_like(label)}
    cut = RandSharpAxisLastd(["image", "label"], (12, 12, 12), 0.0, label_key="label").set_random_state(0)
    assert cut(empty)["label"].shape == (1, 12, 12, 12)


@pytest.mark.parametrize("step", [4.0, 2.5])
@pytest.mark.parametrize("slices", [12, 5, 2])
def test_blocks_hold_whole_steps_of_a_volume_of_whole_steps(step, slices):
    count = round(slices * step)
    slab = ((torch.arange(count) + 0.5) / step).floor()
    image = MetaTensor((slab + 1).expand(1, 8, 8, count).clone())
    length = 4 * 5 if step == 2.5 else 4 * 4
    cut = RandSharpAxisLastd("image", (8, 8, length), 0.0, axes=[2], step=step).set_random_state(seed=0)
    firsts = set()
    for _ in range(40):
        line = cut({"image": image})["image"][0, 0, 0]
        edges = (line.diff().nonzero().ravel() + 1).tolist()
        # Halves are rounded, in the volume and in the block.
        allowed = 0 if step.is_integer() else 1
        assert all(abs(edge - round(edge / step) * step) <= allowed for edge in edges)
        firsts.add(int(line[0]))
    assert len(firsts) > 1


def test_a_step_below_one_voxel_is_named():
    with pytest.raises(SettingError, match=r"step must be at least 1 voxel, got 0.5"):
        RandSharpAxisLastd("image", step=0.5)


def test_the_foreground_is_taken_from_its_key():
    image = MetaTensor(torch.rand(1, 40, 40, 40) + 1)
    item = {"image": image, "brain": torch.zeros(40, 40, 40, dtype=torch.bool)}
    item["brain"][:12, :12, :12] = True

    def centre(**settings) -> float:
        cut = RandSharpAxisLastd("image", (12, 12, 12), 1.0, shuffle=False, axes=[2], **settings)
        cut.set_random_state(seed=0)
        item["image"] = MetaTensor(torch.arange(40.0).view(1, 40, 1, 1).expand(1, 40, 40, 40).clone() + 1)
        return sum(float(cut(item)["image"].mean()) for _ in range(20)) / 20

    assert centre(foreground_key="brain") < centre() - 3
