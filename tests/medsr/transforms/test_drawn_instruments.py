from __future__ import annotations

import numpy as np
import pytest
import torch
from medsr.errors import SettingError
from medsr.transforms.drawn_instruments import RandDrawnInstrumentsd, _shadow, part_classes
from torch import Tensor


def frame(height: int = 96, width: int = 128, *, seed: int = 0) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {"image": torch.rand(3, height, width, generator=made), "label": torch.zeros(1, height, width)}


def drawing(seed: int, **settings: object) -> RandDrawnInstrumentsd:
    return RandDrawnInstrumentsd("image", prob=1.0, **settings).set_random_state(seed=seed)


@pytest.mark.parametrize("seed", range(12))
def test_the_frame_changes_inside_the_mask_and_its_edge_and_in_the_shadow(seed):
    before = frame()
    after = drawing(seed)({key: value.clone() for key, value in before.items()})
    image, label = after["image"], after["label"]
    assert image.shape == before["image"].shape
    assert torch.isfinite(image).all()
    assert image.min() >= 0
    assert image.max() <= 1
    inside = label[0] == 1
    assert 0.005 < inside.float().mean() < 0.95
    # All over the noise of the frame lies something smoother.
    assert not torch.equal(image[:, inside], before["image"][:, inside])
    edge = torch.nn.functional.max_pool2d(label, 5, 1, 2)[0] > 0
    # Outside there is at most a shadow: darker, all channels by the same share.
    ratio = (image / before["image"].clamp_min(1e-3))[:, ~edge]
    assert ratio.max() <= 1 + 1e-5
    assert (ratio.max(0).values - ratio.min(0).values)[
        before["image"][:, ~edge].min(0).values > 1e-3
    ].max() < 1e-4


def test_the_input_stays_as_it_is():
    before = frame()
    kept = {key: value.clone() for key, value in before.items()}
    drawing(1)(before)
    assert all(torch.equal(kept[key], before[key]) for key in kept)


def test_the_parts_have_their_classes_and_hang_together():
    seen = set()
    for seed in range(20):
        label = drawing(seed, classes=(5, 6, 7), most=1)(frame())["label"][0]
        seen |= set(label.unique().tolist())
        # Every clasper grows out of a wrist or a shaft.
        if (label == 7).any():
            near = torch.nn.functional.max_pool2d((label == 7).float()[None, None], 7, 1, 3)[0, 0] > 0
            assert (near & ((label == 5) | (label == 6))).any()
    assert seen == {0, 5, 6, 7}


def test_pixels_to_ignore_stay_so_and_what_was_labelled_below_is_covered():
    item = frame()
    item["label"][:, :48] = 255
    item["label"][:, 48:] = 3
    label = drawing(2, most=3)(item)["label"]
    assert (label[:, :48] == 255).all()
    assert set(label[:, 48:].unique().tolist()) == {1.0, 3.0}


def test_what_is_covered_has_a_class_and_little_images_do_no_harm():
    dark = {"image": torch.zeros(3, 96, 128), "label": torch.zeros(1, 96, 128)}
    for seed in range(30):
        item = drawing(seed)(dark)
        # Before black, what is drawn shows wherever it covers; its faintest edge has no class.
        assert (item["label"][0] > 0)[item["image"].amax(0) > 0.5].all()
        assert torch.isfinite(drawing(seed)(frame(2, 5))["image"]).all()


@pytest.mark.parametrize("edge", ["left", "right", "top", "bottom"])
def test_a_shadow_does_not_come_in_from_the_other_side(edge):
    cover = torch.zeros(64, 96)
    {"left": cover[:, :8], "right": cover[:, -8:], "top": cover[:8], "bottom": cover[-8:]}[edge].fill_(1)
    for seed in range(20):
        shadow = _shadow(cover, np.random.RandomState(seed))
        far = {"left": shadow[:, -16:], "right": shadow[:, :16], "top": shadow[-16:], "bottom": shadow[:16]}[
            edge
        ]
        assert far.max() < 0.05
        assert 0.3 < shadow.max() <= 1


def test_half_precision_stays_and_grey_images_are_refused():
    item = frame()
    drawn = drawing(6)({**item, "image": item["image"].bfloat16()})["image"]
    assert drawn.dtype == torch.bfloat16
    with pytest.raises(SettingError, match="image has 1 channels"):
        drawing(6)({**item, "image": item["image"][:1]})


def test_a_seed_says_what_is_drawn():
    first, again, other = (drawing(seed)(frame())["image"] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_images_of_one_item_get_the_same_instruments():
    item = {**frame(), "other": frame(seed=1)["image"]}
    both = RandDrawnInstrumentsd(["image", "other"], prob=1.0).set_random_state(seed=5)(item)
    inside = both["label"][0] == 1
    # Noise below, the same surface on top, lit by nearly the same mean.
    assert (both["image"] - both["other"])[:, inside].abs().mean() < 0.1
    assert (both["image"] - both["other"])[:, ~inside].abs().mean() > 0.2


def test_never_means_never():
    item = frame()
    after = RandDrawnInstrumentsd("image", prob=0.0)(item)
    assert after["image"] is item["image"]
    assert after["label"] is item["label"]


def test_parts_are_known_by_their_names_or_are_all_the_same():
    assert part_classes(["nothing", "tool"]) == (1, 1, 1)
    assert part_classes(["background", "wrist", "thread", "clasper", "shaft"]) == (4, 1, 3)
    with pytest.raises(SettingError, match="there are background, shaft, tip: set draw_share to 0"):
        part_classes(["background", "shaft", "tip"])


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(SettingError, match="shaft, wrist and clasper"):
        RandDrawnInstrumentsd("image", classes=(1, 2))
    with pytest.raises(SettingError, match="at least 1"):
        RandDrawnInstrumentsd("image", most=0)
