from __future__ import annotations

import pytest
import torch
from medsr.transforms.frame_augmentation import RandHueSaturationd, RandRoundFieldd
from torch import Tensor

LUMA = torch.tensor([0.299, 0.587, 0.114])


def brightness(image: Tensor) -> Tensor:
    return torch.einsum("c,chw->hw", LUMA, image)


def colourfulness(image: Tensor) -> Tensor:
    return (image - brightness(image)).square().mean()


@pytest.mark.parametrize("seed", range(5))
def test_brightness_and_grey_stay_whatever_the_colours_do(seed):
    change = RandHueSaturationd("image", hue_degrees=180, saturation=(0, 2), prob=1.0).set_random_state(seed)
    image = torch.rand(3, 8, 9)
    image[:, 0] = image[:1, 0]
    changed = change({"image": image})["image"]
    assert torch.allclose(brightness(changed), brightness(image), atol=1e-6)
    assert torch.allclose(changed[:, 0], image[:, 0], atol=1e-6)
    assert not torch.allclose(changed[:, 1:], image[:, 1:], atol=1e-2)


def test_no_saturation_is_grey_and_more_is_more():
    image = torch.rand(3, 8, 9)

    def saturated(factor):
        change = RandHueSaturationd("image", hue_degrees=0, saturation=(factor, factor), prob=1.0)
        return change({"image": image})["image"]

    assert torch.allclose(saturated(0.0), brightness(image).expand(3, -1, -1), atol=1e-6)
    assert torch.allclose(saturated(1.0), image, atol=1e-6)
    assert colourfulness(saturated(2.0)) == pytest.approx(float(4 * colourfulness(image)), rel=1e-4)


def test_a_third_of_a_turn_makes_red_to_another_pure_colour():
    """Along red, green and blue up to the different weights that they have in brightness."""
    change = RandHueSaturationd("image", hue_degrees=0, saturation=(1, 1), prob=1.0)
    red = torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    assert int(change({"image": red})["image"].argmax()) == 0
    change.hue_degrees = 120.0
    hues = {int(change.set_random_state(seed)({"image": red})["image"].argmax()) for seed in range(30)}
    assert hues == {0, 1, 2}


def test_all_images_of_a_sample_change_alike_and_most_samples_not_at_all():
    image = torch.rand(3, 4, 4)
    change = RandHueSaturationd(["image", "other"], prob=0.25).set_random_state(0)
    changed = 0
    for _ in range(80):
        item = change({"image": image, "other": image})
        assert torch.equal(item["image"], item["other"])
        changed += not torch.equal(item["image"], image)
    assert 8 <= changed <= 35


@pytest.mark.parametrize("size", [(40, 64), (64, 40)])
def test_outside_of_the_circle_there_is_neither_light_nor_instrument(size):
    field = RandRoundFieldd("image", radius=(0.3, 0.3), prob=1.0).set_random_state(3)
    label = torch.full((1, *size), 2)
    label[:, :3] = 255
    item = field({"image": torch.ones(3, *size), "label": label})
    inside = item["image"][0] > 0
    assert torch.equal(item["label"][0, 3:] > 0, inside[3:])
    assert item["label"][0, :3].eq(255).all(), "what nobody labelled stays unlabelled"
    assert item["label"].dtype == label.dtype
    # A circle of radius 0.3 * 64, of which the border of the frame may cut off a part.
    area = 3.1416 * (0.3 * 64) ** 2
    assert 0.4 * area < inside.sum() <= 1.02 * area
    rows, columns = inside.nonzero().T
    assert rows.max() - rows.min() <= 2 * 0.3 * 64
    assert columns.max() - columns.min() <= 2 * 0.3 * 64


def test_most_frames_keep_their_corners():
    field = RandRoundFieldd("image", prob=0.25).set_random_state(0)
    item = {"image": torch.ones(3, 16, 16), "label": torch.ones(1, 16, 16)}
    whole = sum(bool(field(item)["image"].all()) for _ in range(80))
    assert 45 <= whole <= 72
