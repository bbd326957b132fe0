from __future__ import annotations

import pytest
import torch
from medsr.errors import DataError, SettingError
from medsr.transforms.labels import ClassesToChannelsd, SameGridd
from monai.data import MetaTensor


def volume(shape=(4, 5, 6), shift_mm=0.0, name="a.nii.gz") -> MetaTensor:
    affine = torch.diag(torch.tensor([1.0, 1, 4, 1], dtype=torch.float64))
    affine[2, 3] = shift_mm
    return MetaTensor(torch.zeros(1, *shape), affine=affine, meta={"filename_or_obj": f"folder/{name}"})


def checked(label: MetaTensor):
    return SameGridd("label")({"image": volume(), "label": label})


def test_rounding_of_a_header_is_not_another_grid():
    assert checked(volume(shift_mm=0.001))["label"].shape == (1, 4, 5, 6)


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (volume((4, 5, 7), name="m.nii"), ("m.nii", "4 x 5 x 7", "a.nii.gz", "4 x 5 x 6")),
        (volume(shift_mm=2.0, name="m.nii"), ("m.nii", "2 mm", "a.nii.gz")),
    ],
    ids=["shape", "origin"],
)
def test_another_grid_is_refused_with_both_names(label, words):
    with pytest.raises(DataError) as caught:
        checked(label)
    assert all(word in str(caught.value) for word in words)
    assert "folder" not in str(caught.value)


@pytest.mark.parametrize("label", [volume((4, 5, 7)), volume(shift_mm=2.0)], ids=["shape", "origin"])
def test_a_mask_that_is_called_like_its_image_is_told_from_it(label):
    with pytest.raises(DataError, match=r"^label a\.nii\.gz: .* image a\.nii\.gz"):
        checked(label)


def test_a_tilt_that_keeps_the_origin_is_seen():
    label = volume()
    label.affine[0, 2] = 0.1
    with pytest.raises(DataError, match=r"lies 0\.5 mm away"):
        checked(label)


CLASSES = {"core": [1, 4], "oedema": [2]}


def channels(values, classes=None) -> torch.Tensor:
    mask = volume((len(values), 1, 1))
    mask[0, :, 0, 0] = torch.tensor(values)
    return ClassesToChannelsd("label", classes or CLASSES)({"label": mask})["label"]


def test_a_class_unites_values():
    found = channels([0.0, 1.0, 2.0, 4.0])
    assert found.flatten(1).tolist() == [[0, 1, 0, 1], [0, 0, 1, 0]]
    assert found.meta["filename_or_obj"] == "folder/a.nii.gz"


def test_a_stored_scale_factor_does_not_matter():
    assert channels([0.0, 0.9999999, 2.0000002]).flatten(1).tolist() == [[0, 1, 0], [0, 0, 1]]


def test_an_empty_mask_is_kept():
    assert not channels([0.0, 0.0]).any()


@pytest.mark.parametrize("value", [3.0, 0.5, -1.0])
def test_a_value_of_no_class_is_named(value):
    with pytest.raises(DataError, match=rf"a.nii.gz: value {value:g} belongs to no class of core \[1, 4\]"):
        channels([0.0, 1.0, value])


def test_values_of_a_drawn_mask_do_not_pass_for_probabilities():
    split = ClassesToChannelsd("label", None)
    mask = volume((2, 1, 1))
    mask[0, :, 0, 0] = torch.tensor([0.25, 1.0000001])
    assert split({"label": mask})["label"] is mask
    mask[0, 0, 0, 0] = 4
    with pytest.raises(
        DataError, match=r"a\.nii\.gz: value 4 is no probability; set classes, such as \{'tumour': \[4\]\}"
    ):
        split({"label": mask})


@pytest.mark.parametrize("classes", [{}, {"a": [0]}, {"a": [1], "b": [1, 2]}])
def test_classes_that_cannot_be_told_apart_are_refused(classes):
    with pytest.raises(SettingError, match="distinct values"):
        ClassesToChannelsd("label", classes)


def test_a_mask_of_several_channels_is_refused():
    mask = MetaTensor(torch.zeros(3, 2, 2, 2), meta={"filename_or_obj": "folder/a.nii.gz"})
    with pytest.raises(DataError, match=r"a\.nii\.gz: 3 channels, .* save it as one mask"):
        ClassesToChannelsd("label", {"lesion": [1]})({"label": mask})
