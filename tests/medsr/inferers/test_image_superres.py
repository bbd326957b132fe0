from __future__ import annotations

import pytest
import torch
from medsr.errors import DataError, SettingError
from medsr.inferers import image_superres
from medsr.inferers.image_superres import ImageSuperResInferer
from medsr.transforms.bicubic import bicubic_resize
from torch import Tensor, nn


class Bicubic(nn.Module):
    """A network that interpolates, adds what it is told to, and has no preferred direction."""

    scale, in_channels, size_multiple, exact_halo, half_precision_safe = 4, 3, 1, 2, False

    def __init__(self, added: float = 0.0, *, scale: int = 4) -> None:
        super().__init__()
        self.added, self.scale = added, scale

    def forward(self, image: Tensor) -> Tensor:
        return bicubic_resize(image, tuple(self.scale * n for n in image.shape[-2:])) + self.added


class Slanted(Bicubic):
    """Treats the left half otherwise than the right one."""

    def forward(self, image: Tensor) -> Tensor:
        result = super().forward(image)
        result[..., : result.shape[-1] // 2] += 0.1
        return result


def photograph(channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return bicubic_resize(torch.rand(1, channels, 5, 6, generator=generator), (20, 25)).clamp(0.2, 0.8)


def test_the_result_is_the_networks_and_the_facts_say_how_well_it_agrees():
    image, infer = photograph(), ImageSuperResInferer()
    result = infer(image, Bicubic())
    assert torch.allclose(result, Bicubic()(image).clamp(0, 1), atol=1e-5)
    assert infer.facts["data_consistency_db"] > 40
    assert infer.uncertainty is None
    brighter = ImageSuperResInferer()
    brighter(image, Bicubic(0.05))
    assert brighter.facts["data_consistency_db"] == pytest.approx(26.0, abs=0.3)
    assert brighter.facts["data_consistency_max_255ths"] == pytest.approx(0.05 * 255, abs=6)


def test_back_projection_makes_the_result_agree_with_the_input():
    image = photograph()
    found = {}
    for steps in (0, 1, 3):
        infer = ImageSuperResInferer(back_projection=steps)
        infer(image, Bicubic(0.05))
        found[steps] = infer.facts["data_consistency_db"]
        assert infer.facts["back_projection"] == steps
    assert found[0] + 10 < found[1] < found[3]


def test_a_result_leaves_no_range():
    result = ImageSuperResInferer()(photograph(), Bicubic(0.5))
    assert float(result.max()) == 1
    assert float(ImageSuperResInferer()(photograph(), Bicubic(-0.5)).min()) == 0


def test_grey_images_pass_a_network_for_colour():
    image, infer = photograph(1), ImageSuperResInferer()
    result = infer(image, Bicubic())
    assert result.shape == (1, 1, 80, 100)
    assert torch.allclose(result, Bicubic()(image), atol=1e-5)
    assert "grey" in infer.facts["warnings"][-1]
    with pytest.raises(DataError, match="4 channels"):
        infer(photograph(4), Bicubic())


def test_the_ensemble_knows_where_its_members_disagree():
    infer = ImageSuperResInferer(ensemble=True)
    infer(photograph(), Bicubic())
    assert float(infer.uncertainty.max()) < 1e-5
    result = infer(photograph(), Slanted())
    assert infer.uncertainty.shape == (1, 1, 80, 100)
    assert float(infer.uncertainty.mean()) > 0.02
    assert torch.allclose(result, Bicubic(0.05)(photograph()), atol=0.02)


@pytest.mark.parametrize(("scale", "noted"), [(4, False), (8, True), (16, True)])
def test_results_with_mostly_estimated_detail_say_so(scale, noted):
    infer = ImageSuperResInferer()
    infer(photograph(), Bicubic(scale=scale))
    assert ("not for diagnosis" in infer.facts.get("notice", "")) == noted


@pytest.mark.parametrize("steps", [-1, 1.5, "x"])
def test_steps_are_whole_numbers(steps):
    with pytest.raises(SettingError, match="back_projection"):
        ImageSuperResInferer(back_projection=steps)


def test_an_ensemble_is_asked_for_or_not():
    with pytest.raises(SettingError, match="ensemble must be true or false, got 'off'"):
        ImageSuperResInferer(ensemble="off")


def test_large_results_are_kept_in_half_precision(monkeypatch):
    finer = photograph()
    image = (255 * finer).round() / 255
    exact = ImageSuperResInferer(back_projection=1)(image, Bicubic(0.05))
    monkeypatch.setattr(image_superres, "LARGEST_FLOAT32", 1000)
    infer = ImageSuperResInferer(back_projection=1)
    found = infer(image, Bicubic(0.05))
    assert found.dtype == torch.float16
    assert float((found.float() - exact).abs().max()) < 0.3 / 255
    assert infer.facts["data_consistency_db"] > 35
    # Half precision has no more than 11 bits.
    assert infer(finer, Bicubic(0.05)).dtype == torch.float32


def test_the_grey_levels_of_two_views_are_not_mixed():
    class Pairs(Bicubic):
        in_channels = 6

    class ViewInferer(ImageSuperResInferer):
        views = 2

    pair = torch.cat([photograph(1), 1 - photograph(1)], 1)
    assert torch.allclose(ViewInferer()(pair, Pairs()), Bicubic()(pair), atol=1e-5)
    with pytest.raises(DataError, match="1 channels"):
        ViewInferer()(photograph(1), Pairs())
