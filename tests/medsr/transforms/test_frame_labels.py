from __future__ import annotations

import numpy as np
import pytest
import torch
from medsr.errors import DataError, SettingError
from medsr.io.masks import write_mask
from medsr.transforms.bicubic import bicubic_resize
from medsr.transforms.frame_labels import (
    IGNORED,
    GreysToClassesd,
    LoadMaskd,
    ResizeFramed,
    SameSized,
)
from monai.data import MetaTensor, list_data_collate
from monai.transforms import Compose, RandFlipd, RandSpatialCropd

LABEL_MAP = {"background": [0], "shaft": [10], "tip": [20, 30]}


@pytest.fixture
def path(tmp_path):
    return write_mask(tmp_path / "d1-a.png", np.array([[0, 10, 20], [30, 255, 0]]))


# -- loading and mapping ------------------------------------------------------------------------------------


def test_a_mask_is_loaded_with_its_values_and_its_name(path):
    mask = LoadMaskd("label")({"label": path})["label"]
    assert mask.tolist() == [[[0, 10, 20], [30, 255, 0]]]
    assert not mask.is_floating_point()
    assert mask.meta["filename_or_obj"] == str(path)


def test_greys_become_the_index_of_their_class(path):
    item = Compose([LoadMaskd("label"), GreysToClassesd("label", LABEL_MAP)])({"label": path})
    assert item["label"].tolist() == [[[0, 1, 2], [2, IGNORED, 0]]]
    assert item["label"].dtype == torch.int64
    assert item["label"].meta["filename_or_obj"] == str(path)


def test_the_order_of_the_map_is_that_of_the_classes_not_of_the_greys():
    mask = torch.tensor([[[0, 50, 7]]], dtype=torch.int32)
    found = GreysToClassesd("label", {"background": [50, 3], "instrument": [0, 7]})({"label": mask})
    assert found["label"].tolist() == [[[1, 0, 1]]]


def test_other_values_can_be_ignored_and_255_can_be_a_class():
    classes = GreysToClassesd("label", {"background": 0, "instrument": 255}, ignore=[128])
    assert classes({"label": torch.tensor([[[0, 128, 255]]])})["label"].tolist() == [[[0, IGNORED, 1]]]


def test_a_mask_whose_only_object_does_not_count_is_pointed_out_once(caplog):
    def after(*masks: list[int], ignore: list[int]) -> list[str]:
        caplog.clear()
        classes = GreysToClassesd("label", LABEL_MAP, ignore)
        for mask in masks:
            classes({"label": torch.tensor([[mask]])})
        return [record.getMessage() for record in caplog.records]

    # What most programs write for background and instrument.
    (message,) = after([0, 0, 255], [0, 255, 255], ignore=[255])
    assert "nothing but background and pixels that do not count ([255])" in message
    assert after([0, 10, 255], [0, 0, 0], [20, 20, 20], ignore=[255]) == []


@pytest.mark.parametrize("foreign", [5, 254, 300])
def test_a_value_outside_the_map_is_named_with_its_file(foreign):
    mask = MetaTensor(torch.tensor([[[0, 10, foreign]]]), meta={"filename_or_obj": "/data/d1-a.png"})
    with pytest.raises(
        DataError, match=rf"^d1-a.png: grey value {foreign} belongs to no class of background"
    ):
        GreysToClassesd("label", LABEL_MAP)({"label": mask})


@pytest.mark.parametrize(
    ("label_map", "ignore"),
    [
        ({"background": [0]}, [255]),
        ({"background": [0], "instrument": [0, 1]}, [255]),
        ({"background": [0], "instrument": []}, [255]),
        ({"background": [0], "instrument": [255]}, [255]),
        ({"background": [0], "instrument": ["x"]}, [255]),
    ],
)
def test_a_map_that_is_none_is_refused(label_map, ignore):
    with pytest.raises(SettingError, match=r"^classes(:| must give two classes)"):
        GreysToClassesd("label", label_map, ignore)


def test_words_are_no_grey_values_to_ignore():
    with pytest.raises(SettingError, match=r"ignore must be a list of whole numbers >= 0, got \('a',\)"):
        GreysToClassesd("label", LABEL_MAP, ["a"])


def test_another_size_than_the_image_is_refused_with_both():
    item = {"image": torch.zeros(3, 4, 5), "label": torch.zeros(1, 4, 5)}
    assert SameSized("label")(item).keys() == item.keys()
    item["label"] = MetaTensor(torch.zeros(1, 5, 4), meta={"filename_or_obj": "a/m.png"})
    with pytest.raises(DataError, match=r"m\.png: 5 x 4 pixels, but its image has 4 x 5"):
        SameSized("label")(item)


# -- resizing -----------------------------------------------------------------------------------------------


def frame(height: int = 24, width: int = 36) -> dict[str, torch.Tensor]:
    """An image whose first channel is the mask."""
    mask = torch.zeros(1, height, width, dtype=torch.int64)
    mask[:, height // 3 : 2 * height // 3, width // 2 :] = 3
    return {"image": torch.cat([mask / 3, torch.rand(2, height, width)]), "label": mask}


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"size": (10, 20)}, (10, 20)),
        ({"longest": 18}, (12, 18)),
        ({"longest": 72}, (48, 72)),
        ({"factor": 1.5}, (16, 24)),
        ({"factor": 2}, (12, 18)),
        ({"factor": 100}, (1, 1)),
    ],
)
def test_image_and_mask_get_one_size(settings, size):
    found = ResizeFramed("image", "label", **settings)(frame())
    assert found["image"].shape == (3, *size)
    assert found["label"].shape == (1, *size)
    assert set(found["label"].unique().tolist()) <= {0, 3}
    assert found["label"].dtype == torch.int64


@pytest.mark.parametrize("size", [(8, 12), (48, 72), (9, 13), (31, 50)])
def test_image_and_mask_stay_on_each_other(size):
    found = ResizeFramed("image", "label", size=size)(frame())
    drawn = found["label"][0] > 0
    apart = (drawn.double() - found["image"][0].double()).abs()
    # Half a pixel at the outline; a shift by one pixel would give 1 along a whole side.
    assert apart.max() < 0.75
    assert abs(drawn.double().mean() - found["image"][0].mean()) < 0.05


def test_nearest_takes_the_pixel_under_the_new_centre():
    mask = torch.arange(9)[None, None].expand(1, 3, 9).contiguous()
    found = ResizeFramed((), "label", size=(3, 3))({"label": mask})
    assert found["label"][0, 0].tolist() == [1, 4, 7]


def test_the_image_is_antialiased_and_stays_in_range():
    image = (torch.rand(3, 24, 36) > 0.5).float()
    found = ResizeFramed("image", factor=3)({"image": image})["image"]
    assert torch.equal(found, bicubic_resize(image, (8, 12)).clamp(0, 1))
    large = ResizeFramed("image", longest=144)({"image": image})["image"]
    assert large.min() >= 0
    assert large.max() <= 1


@pytest.mark.parametrize("settings", [{}, {"factor": 0}, {"size": (4, 0)}, {"size": (4, 4), "factor": 2}])
def test_one_positive_size_is_needed(settings):
    with pytest.raises(SettingError, match="one positive size"):
        ResizeFramed("image", **settings)


def test_masks_pass_through_the_augmentation_and_the_collation_of_monai(path):
    transforms = Compose(
        [
            LoadMaskd("label"),
            GreysToClassesd("label", LABEL_MAP),
            ResizeFramed("image", "label", factor=0.5),
            RandSpatialCropd(["image", "label"], (4, 4), random_size=False),
            RandFlipd(["image", "label"], 1.0, spatial_axis=1),
        ]
    )
    item = {"image": MetaTensor(torch.rand(3, 2, 3)), "label": path}
    batch = list_data_collate([transforms(item), transforms(item)])
    assert batch["image"].shape == (2, 3, 4, 4)
    assert batch["label"].shape == (2, 1, 4, 4)
    assert batch["label"].dtype == torch.int64
    assert set(batch["label"].unique().tolist()) <= {0, 1, 2, IGNORED}
