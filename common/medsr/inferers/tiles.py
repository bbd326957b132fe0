"""Inference of images of any size in tiles that show no seams: the result is that of the whole image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from math import isqrt
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from monai.inferers import Inferer
from torch import Tensor, nn

from medsr.errors import DataError, MedsrError, SettingError
from medsr.inferers.precision import checked_precision, choose_precision, precision_name
from medsr.inferers.windows import Span, covering
from medsr.settings import as_whole

__all__ = ["TileInferer"]

_SMALLEST_TILE = 32
"""Tiles are not made smaller than this to save memory: hardly anything but halos would be computed."""

_TRIAL = 32
"""Side of the part of the image on which the precision is tried: on a small image a larger one would take longer than
what it saves."""

_TOLERANCE = 0.003
"""Largest mean difference, relative to the spread of the part: a tenth of a grey level or two. The best networks are
within three grey levels of the truth in the mean, and must not lose 0.02 dB."""


class _Network(Protocol):
    """What is asked of a network: another halo only where no ``exact_halo`` is, ``squeeze`` only of gated ones."""

    scale: int
    size_multiple: int | Sequence[int]
    exact_halo: int | None
    half_precision_safe: bool

    row_halo: int
    gated_halo: int
    gated_row_halo: int

    def __call__(self, image: Tensor, statistics: list[Tensor] | None = None) -> Tensor: ...

    def squeeze(
        self, image: Tensor, statistics: list[Tensor] | None = None, *, border: Sequence[int]
    ) -> list[Tensor]: ...


class _Tile(NamedTuple):
    """A window of an image."""

    rows: Span
    columns: Span

    @property
    def border(self) -> tuple[int, int, int, int]:
        """Pixels that are read only: top, bottom, left, right."""
        return (*self.rows.margins, *self.columns.margins)

    @property
    def area(self) -> int:
        """Pixels that are kept."""
        rows, columns = self.rows.place, self.columns.place
        return (rows.stop - rows.start) * (columns.stop - columns.start)


class TileInferer(Inferer):
    """Runs a 2D super-resolution network over an image of any size in bounded memory, without seams.

    ``monai.inferers.SlidingWindowInferer`` was considered: at the border of each window the network sees padding
    where the image goes on, and blending spreads those errors instead of removing them. Here every tile reads real
    neighbours around it, as far as its result depends on them, and nothing else is kept:

    - an image whose result has at most ``max_whole`` pixels runs whole;
    - a network with an ``exact_halo`` runs in tiles that read so many pixels around them;
    - a network whose pixels see their whole row besides (``row_halo``), as those of stereo pairs do, runs in bands of
      whole rows;
    - a network with squeeze-and-excitation gates has no exact halo, since its gates see means over the whole image.
      Passes over the tiles find these means: the first with gates that see the tile's own means, each further one
      with the means of the one before, until they stay. A last pass with the means of the whole image writes;
    - a network with both (``gated_row_halo``) runs in bands of whole rows, with the same passes.

    All windows of an image have one size. At the border of the image they are shifted inwards, so that they end
    where the image ends and the network pads there as it does for the whole image.

    ``facts`` holds what the report needs about the last image: ``mode`` (``whole``, ``tiles``, ``bands``,
    ``gated tiles`` or ``gated bands``), ``tiles``, ``passes`` over them (the one that writes included), ``precision``
    and ``warnings``; for gated ones ``statistics_error`` as well, which is compared with ``tolerance``.

    Args:
        tile: side of a tile, or height of a band, without its halo, in pixels of the input, at most; rounded down to
            the network's ``size_multiple``.
        max_whole: largest number of pixels of the result that are computed at once. A
            :class:`~medsr.networks.se_gan.SEGenerator` takes about 630 bytes for each in float32, 2.6 GB at the
            default. Where tiles with their halos would exceed it, they are made smaller, though not smaller than 32
            pixels.
        batch: windows that are processed together; they share ``max_whole``.
        amp: ``auto``, ``float32`` or ``bfloat16``, see :func:`medsr.inferers.precision.choose_precision`; networks
            that are not ``half_precision_safe`` run in float32.
        progress: show a progress bar.
        tolerance: the means of the gates are found once another pass would change none by more than this share of
            the spread of all means that its gate sees, as the last two changes let expect.
        max_passes: passes that may look for them; if that is not enough, a warning says how far they got.

    Shape:
        ``(1, C, H, W)``, intensities in [0, 1], to ``(1, C', scale * H, scale * W)``, float32, on the CPU.

    Raises:
        SettingError: if a setting is out of range, the batch holds more than one image, or the image is too large
            for a network that cannot run in tiles.
        DataError: if the image has no pixels.
        MedsrError: if the network gives values that are not finite.

    Example:
        >>> class Twice(nn.Upsample):
        ...     scale, size_multiple, exact_halo, half_precision_safe = 2, 1, 0, True
        >>> infer = TileInferer(tile=32, max_whole=64 * 64)
        >>> infer(torch.rand(1, 3, 40, 70), Twice(scale_factor=2)).shape
        torch.Size([1, 3, 80, 140])
        >>> infer.facts["mode"], infer.facts["tiles"]
        ('tiles', 6)

    Reference:
        doi:10.1109/CVPR.2018.00745 (the gates)
    """

    def __init__(
        self,
        tile: int = 256,
        *,
        max_whole: int = 2048 * 2048,
        batch: int = 1,
        amp: str = "auto",
        progress: bool = False,
        tolerance: float = 1e-4,
        max_passes: int = 4,
    ) -> None:
        super().__init__()
        self.tile = as_whole("tile", tile, 8)
        self.max_whole = as_whole("max_whole", max_whole, 1)
        self.batch = as_whole("batch", batch, 1)
        if not tolerance > 0 or max_passes < 2:
            raise SettingError(
                f"tolerance > 0 and max_passes >= 2 are needed, got {tolerance}, {max_passes}: one pass cannot tell "
                "whether the means stay"
            )
        self.amp = checked_precision(amp)
        self.progress = progress
        self.tolerance, self.max_passes = float(tolerance), int(max_passes)
        self.facts: dict[str, Any] = {}

    def __call__(self, inputs: Tensor, network: _Network, *args: Any, **kwargs: Any) -> Tensor:
        """Super-resolve the first (only) image of the batch; other arguments are ignored."""
        result: Tensor | None = None

        def place(row: int, column: int, part: Tensor) -> None:
            nonlocal result
            if result is None:
                size = (network.scale * length for length in inputs.shape[-2:])
                result = torch.empty(1, part.shape[1], *size)
            result[..., row : row + part.shape[-2], column : column + part.shape[-1]] = part

        self.stream(inputs, network, place)
        assert result is not None
        return result

    def stream(self, inputs: Tensor, network: _Network, sink: Callable[[int, int, Tensor], object]) -> None:
        """Super-resolve the first (only) image of the batch and hand out its parts, each pixel once.

        The result of a large photograph in float32 is larger than all that its computation needs. Who wants it as
        integers, or in a file, takes it part by part.

        Args:
            inputs: the image, ``(1, C, H, W)``.
            network: any that states its facts, see :class:`TileInferer`.
            sink: called with the first row, the first column (both in pixels of the result), and the part,
                ``(1, C', h, w)``, float32, on the CPU.
        """
        if inputs.ndim != 4 or inputs.shape[0] != 1:
            raise SettingError(f"images differ in size: a batch of one is needed, got {tuple(inputs.shape)}")
        if 0 in inputs.shape:
            raise DataError(f"the image has no pixels: its shape is {tuple(inputs.shape[1:])}")
        if isinstance(network, nn.Module):
            network.eval()
        image = (inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs).float()
        height, width = (network.scale * size for size in image.shape[-2:])
        with torch.no_grad():
            padded = _padded(image, _multiples(network))
            mode, tiles = self._plan(padded, network)
            dtype, warnings = self._precision(padded, network)
            facts = {"mode": mode, "tiles": len(tiles), "passes": 1, "warnings": warnings}
            facts["precision"] = precision_name(dtype)
            batches = _batches(tiles, self.batch)
            statistics = None
            if mode.startswith("gated"):
                statistics = self._statistics(padded, network, batches, dtype=dtype, facts=facts)
            for batch in self._progress(batches, "super-resolution"):
                given = () if statistics is None else (_repeated(statistics, len(batch)),)
                with _autocast(padded, dtype):
                    found = network(_windows(padded, batch), *given)
                found = _finite(found.float().cpu())
                for tile, one in zip(batch, found.split(1), strict=True):
                    rows, columns = (_scaled(span.keep, network.scale) for span in tile)
                    row, column = (network.scale * span.place.start for span in tile)
                    # What was added at the bottom and on the right is cut off.
                    sink(row, column, one[..., rows, columns][..., : height - row, : width - column])
        self.facts = facts

    def _plan(self, image: Tensor, network: _Network) -> tuple[str, list[_Tile]]:
        """How the image is run, and in which windows."""
        height, width = image.shape[-2:]
        pixels = height * width * network.scale**2
        if pixels <= self.max_whole:
            return "whole", [_Tile(*(covering(size, size, 0)[0] for size in (height, width)))]
        shapes = {"tiles": "exact_halo", "bands": "row_halo"}
        if hasattr(network, "squeeze"):
            shapes |= {"gated tiles": "gated_halo", "gated bands": "gated_row_halo"}
        halos = {mode: getattr(network, name, None) for mode, name in shapes.items()}
        mode, halo = next(((mode, halo) for mode, halo in halos.items() if halo is not None), ("", None))
        if halo is None:
            raise SettingError(
                f"{type(network).__name__} cannot run in tiles, and the result of {height} x {width} pixels has "
                f"{pixels}: use a smaller image, or max_whole={pixels} if there is memory"
            )
        in_bands = mode.endswith("bands")
        if in_bands:
            affordable = self.max_whole // (self.batch * width * network.scale**2)
        else:
            affordable = isqrt(self.max_whole // self.batch) // network.scale
        tile = min(self.tile, max(affordable - 2 * halo, _SMALLEST_TILE))
        sides = (tile, width if in_bands else tile)
        rows, columns = (
            covering(size, side, halo, multiple=multiple)
            for size, side, multiple in zip((height, width), sides, _multiples(network), strict=True)
        )
        return mode, [_Tile(row, column) for row in rows for column in columns]

    def _precision(self, image: Tensor, network: _Network) -> tuple[torch.dtype, list[str]]:
        if self.amp == "float32" or not network.half_precision_safe:
            unwanted = f"{type(network).__name__} is not safe in bfloat16: float32 was used"
            return torch.float32, [unwanted] if self.amp == "bfloat16" else []
        # The corners of a photograph are often black: precision is tried in its middle.
        middle = []
        for size, multiple in zip(image.shape[-2:], _multiples(network), strict=True):
            length = min(size, -(-_TRIAL // multiple) * multiple)
            start = (size - length) // 2
            middle.append(slice(start, start + length))
        return choose_precision(self.amp, network, image[..., middle[0], middle[1]], tolerance=_TOLERANCE), []

    def _statistics(
        self,
        image: Tensor,
        network: _Network,
        batches: list[list[_Tile]],
        *,
        dtype: torch.dtype,
        facts: dict[str, Any],
    ) -> list[Tensor]:
        """The means over the whole image that the gates see, each ``(1, features)``."""
        statistics: list[Tensor] | None = None
        before = error = float("inf")
        for number in range(1, self.max_passes + 1):
            sums: list[Tensor] = []
            for batch in self._progress(batches, f"gate statistics, pass {number}"):
                given = None if statistics is None else _repeated(statistics, len(batch))
                with _autocast(image, dtype):
                    means = network.squeeze(_windows(image, batch), given, border=batch[0].border)
                # Summed in float64: photographs have many tiles.
                areas = torch.tensor([[tile.area] for tile in batch], dtype=torch.float64)
                parts = [(_finite(mean.double().cpu()) * areas).sum(0, keepdim=True) for mean in means]
                sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
            area = image.shape[-2] * image.shape[-1]
            found = [(total / area).float().to(image.device) for total in sums]
            if statistics is not None:
                change = max(_change(old, new) for old, new in zip(statistics, found, strict=True))
                # The next change would be smaller by the same factor; without this, one pass more just to see it.
                error = change * min(1.0, change / before) if before < float("inf") else change
                before = change
            statistics = found
            if error <= self.tolerance:
                break
        else:
            facts["warnings"].append(
                f"the means of the gates are known to {error:.2g} of their spread only after {self.max_passes} passes"
            )
        assert statistics is not None
        facts["passes"], facts["statistics_error"] = number + 1, error
        return statistics

    def _progress(self, batches: list[list[_Tile]], words: str) -> Any:
        if not self.progress:
            return batches
        from tqdm.auto import tqdm

        return tqdm(batches, desc=words, unit="batch", leave=False)


def _multiples(network: _Network) -> tuple[int, int]:
    found = network.size_multiple
    return (found, found) if isinstance(found, int) else (found[0], found[1])


def _padded(image: Tensor, multiples: tuple[int, int]) -> Tensor:
    """The image, mirrored at the bottom and on the right up to a size that the network takes."""
    for axis, multiple in zip((-2, -1), multiples, strict=True):
        size = image.shape[axis]
        missing = -size % multiple
        if missing:
            # PyTorch mirrors by less than the size of the image only; NumPy goes to and fro.
            index = np.pad(np.arange(size), (0, missing), mode="reflect")
            image = image.index_select(axis, torch.as_tensor(index, device=image.device))
    return image


def _batches(tiles: list[_Tile], size: int) -> list[list[_Tile]]:
    """The tiles in batches that read equally many pixels around each: means are taken over one region per batch."""
    ordered = sorted(tiles, key=lambda tile: tile.border)
    groups = [list(group) for _, group in groupby(ordered, key=lambda tile: tile.border)]
    return [group[k : k + size] for group in groups for k in range(0, len(group), size)]


def _windows(image: Tensor, batch: list[_Tile]) -> Tensor:
    return torch.cat([image[..., tile.rows.read, tile.columns.read] for tile in batch])


def _scaled(part: slice, scale: int) -> slice:
    return slice(scale * part.start, scale * part.stop)


def _repeated(statistics: list[Tensor], count: int) -> list[Tensor]:
    return [mean.expand(count, -1) for mean in statistics]


def _change(old: Tensor, new: Tensor) -> float:
    """Largest change of a mean, relative to the spread of the means of one gate."""
    spread = new.std(correction=0).clamp_min(1e-6)
    return float((new - old).abs().max() / spread)


def _autocast(image: Tensor, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(image.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def _finite(values: Tensor) -> Tensor:
    if not torch.isfinite(values).all():
        raise MedsrError(
            "the network gave values that are not finite: check the image and the weights, or use amp=float32"
        )
    return values
