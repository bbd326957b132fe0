"""Surgical instruments that nobody photographed: drawn into frames in many shapes, colours and lights, with their mask.

What is drawn need not look real, it must differ: whoever has seen it in every way takes the real thing for one way more
(domain randomisation, Tobin et al., IROS 2017, arXiv 1703.06907).
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform
from torch import Tensor
from torch.nn import functional as F

from medsr.errors import SettingError
from medsr.transforms.frame_labels import IGNORED

__all__ = ["RandDrawnInstrumentsd", "part_classes"]

_PARTS = ("shaft", "wrist", "clasper")


class _Part(NamedTuple):
    """A band from a point in a direction: lengths in pixels, angles in radians, 0 along a row."""

    start: tuple[float, float]
    angle: float
    length: float
    widths: tuple[float, float]
    curve: float
    colour: tuple[float, float, float]
    label: int

    @property
    def end(self) -> tuple[float, float]:
        """Row and column where it ends, if it is not curved."""
        row, column = self.start
        return row + self.length * math.sin(self.angle), column + self.length * math.cos(self.angle)


class _Light(NamedTuple):
    """How round things shine: where across them the light falls, from -1 to 1, how narrow and strong its reflex is."""

    side: float
    spread: float
    strength: float
    ambient: float


class RandDrawnInstrumentsd(RandomizableTransform, MapTransform):
    """Draw instruments into a frame, and their parts into its mask.

    An instrument is a shaft that comes in from anywhere, a wrist and up to two claspers, straight, bent or hooked.
    Sizes, colours (grey and metal most of the time), light, rings, texture, shadow and what its surface reflects of
    the frame are drawn anew each time. Few labelled scenes show few instruments; these show what all have in common.
    Drawn ones cover what is below, photographed instruments included. MONAI has no such transform.

    Args:
        keys: images in [0, 1], of red, green and blue, which all get the same instruments.
        label_key: their mask of class indices.
        classes: class indices of shaft, wrist and clasper; equal ones for masks that do not tell parts apart.
        most: largest number of instruments; at least one is drawn.
        ignore: class index that stays.
        prob: how often.
        allow_missing_keys: skip items that a sample does not have.

    Shape:
        ``(3, H, W)`` to the same, label ``(1, H, W)``.

    Raises:
        SettingError: if there is not one class for each part, ``most`` is not positive, or an image is not in colours.

    Example:
        >>> draw = RandDrawnInstrumentsd("image", classes=(1, 2, 3), prob=1.0).set_random_state(seed=0)
        >>> item = draw({"image": torch.full((3, 96, 128), 0.3), "label": torch.zeros(1, 96, 128)})
        >>> item["label"].unique().tolist()
        [0.0, 1.0, 2.0, 3.0]
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_key: str = "label",
        classes: Sequence[int] = (1, 1, 1),
        *,
        most: int = 2,
        ignore: int = IGNORED,
        prob: float = 0.5,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        if len(classes) != 3:
            raise SettingError(f"classes must be those of shaft, wrist and clasper, not {list(classes)}")
        if most < 1:
            raise SettingError(f"most must be at least 1, not {most}")
        self.label_key, self.classes = label_key, (int(classes[0]), int(classes[1]), int(classes[2]))
        self.most, self.ignore = int(most), int(ignore)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Draw the same instruments into all images and the mask, or none."""
        result = dict(data)
        self.randomize(None)
        if not self._do_transform:
            return result
        for _ in range(self.R.randint(1, self.most + 1)):
            height, width = result[self.label_key].shape[-2:]
            cover, surface, drawn = _painted(
                _instrument(self.R, height, width, self.classes), self.R, height, width
            )
            mirror, shade = self.R.uniform(0, 0.35), self.R.uniform(0.2, 0.7) * (self.R.rand() < 0.5)
            shadow = shade * _shadow(cover, self.R)
            for key in self.key_iterator(result):
                image = result[key]
                if len(image) != 3:
                    raise SettingError(
                        f"instruments are drawn in red, green and blue; {key} has {len(image)} channels"
                    )
                lit = _lit(surface, image, mirror)
                result[key] = torch.lerp(image.float() * (1 - shadow), lit, cover).to(image.dtype)
            label = result[self.label_key]
            inside = (cover > 0.5) & (label != self.ignore)
            result[self.label_key] = torch.where(inside, drawn.to(label.dtype), label)
        return result


def part_classes(classes: Sequence[str]) -> tuple[int, int, int]:
    """Class indices of shaft, wrist and clasper, where classes have these names, or one for all where there is one.

    Args:
        classes: names, the background first.

    Raises:
        SettingError: for classes that are neither.

    Example:
        >>> part_classes(["background", "instrument"]), part_classes(["background", "clasper", "shaft", "wrist"])
        ((1, 1, 1), (2, 3, 1))
    """
    names = list(classes)
    if len(names) == 2:
        return 1, 1, 1
    if not set(_PARTS) <= set(names):
        raise SettingError(
            f"instruments are drawn as {', '.join(_PARTS)}, or as the one class besides the background; "
            f"there are {', '.join(names)}: set draw_share to 0"
        )
    shaft, wrist, clasper = map(names.index, _PARTS)
    return shaft, wrist, clasper


def _instrument(
    draw: np.random.RandomState, height: int, width: int, classes: tuple[int, int, int]
) -> list[_Part]:
    """Parts of one instrument, in the order in which they cover each other."""
    shaft, wrist, clasper = classes
    thick = min(height, width) * math.exp(draw.uniform(math.log(0.06), math.log(0.3)))
    joint = (draw.uniform(0.1, 0.9) * height, draw.uniform(0.1, 0.9) * width)
    angle = draw.uniform(-math.pi, math.pi)
    bent = angle + draw.uniform(-0.7, 0.7) * (draw.rand() < 0.6)
    dull, metal = _colour(draw, draw.uniform(0.1, 0.95) ** 1.3), _colour(draw, draw.uniform(0.4, 0.95))
    parts = _claspers(draw, joint, bent + math.pi, thick, metal, clasper)
    length = draw.uniform(0.5, 3.0) * thick * (draw.rand() < 0.8)
    widths = (thick * draw.uniform(0.6, 0.95), thick * draw.uniform(0.8, 1.0))
    parts.append(_Part(joint, bent, length, widths, 0.0, metal if draw.rand() < 0.7 else dull, wrist))
    # What is nearer to the camera is wider, sometimes much.
    widths = (thick, thick * draw.uniform(1.0, 12.0 if draw.rand() < 0.3 else 3.0))
    parts.append(_Part(parts[-1].end, angle, 2.0 * (height + width), widths, 0.0, dull, shaft))
    return [part for part in parts if part.length > 0]


def _claspers(
    draw: np.random.RandomState,
    joint: tuple[float, float],
    angle: float,
    thick: float,
    colour: tuple[float, float, float],
    label: int,
) -> list[_Part]:
    """Two that open, one that is straight, bent or a hook, or none."""
    kind = draw.rand()
    count = 0 if kind < 0.1 else 1 if kind < 0.35 else 2
    opening, length = draw.uniform(0, 0.6), draw.uniform(1.0, 4.0) * thick
    parts = []
    for side in (-1, 1)[:count]:
        turned = angle + (side * opening if count == 2 else draw.uniform(-0.5, 0.5))
        wide = thick * draw.uniform(0.25, 0.6)
        widths = (wide, wide * draw.uniform(0.15, 0.9))
        long = length * draw.uniform(0.85, 1.15)
        parts.append(_Part(joint, turned, long, widths, draw.uniform(-0.25, 0.25), colour, label))
        if count == 1 and draw.rand() < 0.4:
            hook = turned + draw.choice([-1, 1]) * draw.uniform(1.2, 1.7)
            widths = (0.6 * wide, 0.5 * wide)
            straight = parts.pop()._replace(curve=0.0)
            parts += [
                straight,
                _Part(straight.end, hook, thick * draw.uniform(0.5, 1.0), widths, 0.0, colour, label),
            ]
    return parts


def _colour(draw: np.random.RandomState, brightness: float) -> tuple[float, float, float]:
    """Grey with a cast most of the time, which is what tells instruments from tissue, and sometimes any colour."""
    saturation = draw.uniform(0, 0.25) if draw.rand() < 0.85 else draw.uniform(0.2, 0.8)
    hue = draw.rand() if draw.rand() < 0.5 else draw.uniform(0.4, 0.7)
    return colorsys.hsv_to_rgb(hue, saturation, brightness)


def _painted(
    parts: Sequence[_Part], draw: np.random.RandomState, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Share of each pixel that is covered, colours ``(3, H, W)``, and class indices."""
    light = _Light(
        draw.uniform(-0.6, 0.6), draw.uniform(0.05, 0.4), draw.uniform(0, 0.8), draw.uniform(0.2, 0.9)
    )
    surface, cover = torch.zeros(3, height * width), torch.zeros(height * width)
    labels = torch.zeros(height * width, dtype=torch.int64)
    thick = parts[-1].widths[0]
    for part in parts:
        share, along, across = (values.flatten() for values in _band(part, height, width))
        seen = share.nonzero()[:, 0]
        share, along, across = share[seen], along[seen], across[seen]
        value = torch.tensor(part.colour)[:, None] * _shaded(along / thick, across, light, draw)
        value += light.strength * torch.exp(-((across - light.side) / light.spread).square())
        below = cover[seen]
        cover[seen] = share + below * (1 - share)
        surface[:, seen] = torch.lerp(surface[:, seen], value, share / cover[seen])
        # Where edges of two parts meet, both together may cover what neither does.
        taken = (share > 0.5) | ((labels[seen] == 0) & (cover[seen] > 0.5))
        labels[seen] = torch.where(taken, part.label, labels[seen])
    surface, cover, labels = (values.unflatten(-1, (height, width)) for values in (surface, cover, labels))
    grain = torch.from_numpy(draw.normal(size=(1, 1, height // 4 + 1, width // 4 + 1))).float()
    return cover, surface * (1 + draw.uniform(0, 0.15) * _enlarged(grain, height, width)[0]), labels


def _band(part: _Part, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Share of each pixel inside, pixels along the band, and place across it, from -1 to 1."""
    rows = torch.arange(height)[:, None] + 0.5 - part.start[0]
    columns = torch.arange(width)[None] + 0.5 - part.start[1]
    sine, cosine = math.sin(part.angle), math.cos(part.angle)
    along = sine * rows + cosine * columns
    aside = sine * columns - cosine * rows - part.curve * along.square() / part.length
    narrow, wide = part.widths
    half = torch.lerp(torch.tensor(narrow / 2), torch.tensor(wide / 2), (along / part.length).clamp(0, 1))
    # It starts a little before its joint, which would gape otherwise where it is bent.
    share = (half - aside.abs() + 0.5).clamp(0, 1)
    share = share * (along + 0.3 * narrow + 0.5).clamp(0, 1) * (part.length - along + 0.5).clamp(0, 1)
    return share, along, (aside / half.clamp_min(0.5)).clamp(-1, 1)


def _shaded(along: Tensor, across: Tensor, light: _Light, draw: np.random.RandomState) -> Tensor:
    """Brightness of a round surface with bands and, sometimes, rings; ``along`` in thicknesses of the shaft."""
    shade = 1 - (1 - light.ambient) * ((across - light.side) / (1 + abs(light.side))).square()
    bands = torch.from_numpy(draw.uniform(0.7, 1.15, size=8) ** draw.uniform(0, 1.5)).float()
    place = (along / 4).clamp(0, 1) * (len(bands) - 1)
    before = place.long().clamp_max(len(bands) - 2)
    shade = shade * torch.lerp(bands[before], bands[before + 1], place - before)
    if draw.rand() < 0.4:
        phase = along / draw.uniform(0.5, 2) + draw.rand()
        ring = (phase % 1 < draw.uniform(0.05, 0.3)) & (along < draw.uniform(0.5, 6))
        shade = torch.where(ring, shade * draw.uniform(0.2, 1.3), shade)
    return shade


def _lit(surface: Tensor, image: Tensor, mirror: float) -> Tensor:
    """The surface in the light of a frame: about as bright, and with a share of what lies around in it."""
    image = torch.as_tensor(image).float()
    around = _enlarged(F.adaptive_avg_pool2d(image[None], 4), *image.shape[1:])
    mean = around.mean()
    brightness = (mean / 0.35).clamp(0.5, 1.3)
    return (
        surface * brightness * torch.lerp(torch.ones_like(around), around / mean.clamp_min(0.05), mirror)
    ).clamp(0, 1)


def _shadow(cover: Tensor, draw: np.random.RandomState) -> Tensor:
    """The covered area, soft and moved."""
    height, width = cover.shape
    size = max(1.0, draw.uniform(0.03, 0.2) * min(height, width))
    coarse = F.adaptive_avg_pool2d(cover[None, None], (math.ceil(height / size), math.ceil(width / size)))
    soft = _enlarged(coarse, height, width)[0]
    down, right = (int(step) for step in draw.uniform(-1, 1, size=2) * size / 2)
    rows = (torch.arange(height) - down).clamp(0, height - 1)
    columns = (torch.arange(width) - right).clamp(0, width - 1)
    return soft[rows[:, None], columns]


def _enlarged(image: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(image, size=(height, width), mode="bilinear", align_corners=False)[0]
