"""Parallax attention: what the two views of a stereo pair can tell each other, row by row.

Papers:
    iPASSR (bidirectional parallax attention, biPAM): CVPR Workshops (NTIRE) 2021, arXiv 2011.03802.
    PASSRnet (parallax attention): CVPR 2019, arXiv 1903.05784.
Code: written from the papers. Weights: see the bundle's ``models/README.md``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medsr.errors import DataError, SettingError
from medsr.networks.blocks import without_autocast

__all__ = [
    "PARALLAX_PATHS",
    "BiPAM",
    "ParallaxResult",
    "StereoPrediction",
    "by_view",
    "checked_pair",
    "parallax_attention",
    "side_by_side",
    "wanted_of",
]

PARALLAX_PATHS = ("chunked", "fused", "reference")

_PARALLAX = ("none", "disparity", "maps")

_RELAXED = 2
"""Columns on either side of a pixel where a match that comes back still counts as its own."""

_SHARPNESS = 5.0
"""Gain before the tanh of a valid mask: where all of a match comes back, the mask is 0.9999."""

_BLOCK = 32
"""Columns whose relaxed products are taken from one matrix product; of a larger one more would be thrown away."""

_FUSED_BLOCK = 64
"""Left columns whose scores the fused path holds at a time."""

_STRIP = 64
"""Rows that inference projects at a time."""

_EXCLUDED = -1e30
"""Score of a pair outside the disparity band: its weight is 0, and finite where the whole row is outside."""

_MAPS = 6
"""Buffers of the size of a map that the chunked path has at a time, at most."""

_CPU_BYTES, _DEVICE_BYTES = 64 * 2**20, 512 * 2**20
"""Memory for these buffers: about a cache on processors; on accelerators, enough to keep them busy."""


class ParallaxResult(NamedTuple):
    """What parallax attention finds; the first half of each batch holds the left views, the second the right ones.

    Args:
        features: features of the other view, brought to this one; where there is no match, this one's own.
        valid: how sure the match is, from 0 to 1, without gradient.
        to_left: weight of each right column (last axis) for each left column; None unless asked for.
        to_right: weight of each left column (last axis) for each right column; None unless asked for.
        disparity: column in the left view minus column in the right view, in pixels; None unless asked for.

    Shape:
        - features: ``(2B, C, H, W)``;
        - valid, disparity: ``(2B, 1, H, W)``;
        - to_left, to_right: ``(B, H, W, W)``.

    Example:
        >>> ParallaxResult(torch.zeros(2, 8, 4, 6), torch.zeros(2, 1, 4, 6)).disparity is None
        True
    """

    features: Tensor
    valid: Tensor
    to_left: Tensor | None = None
    to_right: Tensor | None = None
    disparity: Tensor | None = None


class StereoPrediction(NamedTuple):
    """A super-resolved pair with what :class:`~medsr.losses.stereo.StereoLoss` needs besides.

    Args:
        image: the result.
        low: the pair that it was made of.
        parallax: how the views were matched, on the grid of ``low``.

    Shape:
        - image: ``(B, 2C, scale * H, scale * W)``;
        - low: ``(B, 2C, H, W)``.

    Example:
        >>> pair = torch.rand(1, 6, 4, 6)
        >>> StereoPrediction(pair, pair, ParallaxResult(by_view(pair), torch.ones(2, 1, 4, 6))).low is pair
        True
    """

    image: Tensor
    low: Tensor
    parallax: ParallaxResult


_SOFTER = 0.5
"""What projections are multiplied by at first; scores change by its square."""


class BiPAM(nn.Module):
    """Brings features of either view of a rectified pair to the other one, where they match.

    Every left pixel is compared with all pixels of the same row on the right; see :func:`parallax_attention`. What
    is compared comes from several levels of the extractor, each in its own group: batch norm, a residual block, and a
    projection per view. From each row its mean is taken away (whitening), so that what all pixels of a row have in
    common does not drown what tells them apart.

    Batch norm sees both views at once: one scale for both. ``monai.networks.blocks.CrossAttentionBlock`` was
    considered: it attends over all pixels of an image, scales the scores, and has no masks.

    Inference without gradients goes through the image in strips of rows, which changes nothing and bounds the memory
    of the projections too. Under autocast the scores stay in float32: nothing scales them down, and the rounding of
    bfloat16 would be a good part of 1 for a score of 100.

    Args:
        channels: channels of the features that are exchanged.
        levels: levels of the extractor, each with ``channels`` channels.
        path: see :func:`parallax_attention`; the reference is taken in any case where maps are asked for.
        tied: give both views one projection, so that swapping the views swaps the results.
        band: see :func:`parallax_attention`.

    Shape:
        - levels: ``(2B, levels * channels, H, W)``, left views first;
        - features: ``(2B, channels, H, W)``.

    Raises:
        SettingError: for an unknown path, an empty band, or channels that the levels cannot share.

    Example:
        >>> exchange = BiPAM(channels=8, levels=2).eval()
        >>> exchange(torch.rand(2, 16, 4, 6), torch.rand(2, 8, 4, 6)).features.shape
        torch.Size([2, 8, 4, 6])

    Reference:
        arXiv 2011.03802
    """

    row_reach = 2
    """Rows on either side of a pixel that what is compared depends on."""

    def __init__(
        self,
        channels: int = 64,
        levels: int = 4,
        *,
        path: str = "chunked",
        tied: bool = False,
        band: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if channels % levels:
            raise SettingError(f"channels must be a multiple of levels, got {channels} and {levels}")
        _check(path, band)
        self.path, self.band = path, band
        wide = levels * channels
        self.norm = nn.BatchNorm2d(wide)
        self.residual = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1, groups=levels),
            nn.LeakyReLU(0.1, inplace=True),
            nn.Conv2d(wide, wide, 3, padding=1, groups=levels),
        )
        self.project_left = nn.Conv2d(wide, channels, 1, groups=levels)
        self.project_right = None if tied else nn.Conv2d(wide, channels, 1, groups=levels)

    def forward(
        self, levels: Tensor, features: Tensor, *, maps: bool = False, disparity: bool = False
    ) -> ParallaxResult:
        """Exchange features.

        Args:
            levels: what is compared.
            features: what is exchanged.
            maps: return the attention maps; they need much memory, see :func:`parallax_attention`.
            disparity: return the disparity.
        """
        path, height = "reference" if maps else self.path, features.shape[2]
        # Batch norm in training sees the whole image.
        whole = path == "reference" or self.training or torch.is_grad_enabled()
        strip = height if whole else _STRIP
        parts = []
        for start in range(0, height, strip):
            rows = slice(start, min(start + strip, height))
            low = max(0, start - self.row_reach)
            compared = self.project(levels[:, :, low : rows.stop + self.row_reach])
            query, key = (one[:, :, start - low :][:, :, : rows.stop - start] for one in compared)
            parts.append(
                parallax_attention(
                    query,
                    key,
                    features[:, :, rows],
                    path=path,
                    band=self.band,
                    maps=maps,
                    disparity=disparity,
                )
            )
        return ParallaxResult(*(_joined(one, 2) for one in zip(*parts, strict=True)))

    @torch.no_grad()
    def match_from_the_start(self) -> None:
        """Give both projections the same weights, and smaller ones.

        Equal pixels then have the highest score before anything is learnt. With weights of their own, the views match
        at random: the rest of the network learns to ignore what comes from the other view before that means
        anything, scores grow until softmax has no gradient, and the exchange stays unused.
        """
        self.project_left.weight.mul_(_SOFTER)
        if self.project_right is not None:
            self.project_right.load_state_dict(self.project_left.state_dict())

    def project(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Whitened features of the left and of the right views, ``(B, channels, H, W)`` each, at least float32."""
        levels = self.norm(levels)
        left, right = (levels + self.residual(levels)).chunk(2)
        second = self.project_left if self.project_right is None else self.project_right
        return _whitened(self.project_left(left)), _whitened(second(right))


def parallax_attention(
    query: Tensor,
    key: Tensor,
    features: Tensor,
    *,
    path: str = "chunked",
    band: tuple[int, int] | None = None,
    maps: bool = False,
    disparity: bool = False,
    chunk_bytes: int | None = None,
) -> ParallaxResult:
    """Exchange features between the views of a pair by attention along rows, in both directions.

    The score of a left and a right pixel is the scalar product of what is compared. Softmax over the right columns
    gives the weights with which features go to the left view; over the left columns, those to the right view. The
    valid mask of a pixel is tanh of five times the weight that comes back, from all its matches, to it or to the two
    pixels beside it: near 1 for a match, near 0 for what the other view does not see. It carries no gradient. The
    features that are brought count by this mask, and the pixel's own by the rest.

    The three paths have one result, up to rounding:

    - ``reference`` has all scores at once, several maps of ``4 B H W ** 2`` bytes each, and can return them;
    - ``chunked`` goes through the rows, as many at a time as ``chunk_bytes`` allow. It is the fastest on processors;
    - ``fused`` leaves the features to :func:`torch.nn.functional.scaled_dot_product_attention`, and computes the
      masks from the two log-sums of the exponentials of the scores, in blocks of columns. No map is there at any
      time, at the price of computing the scores four times.

    Chunks and blocks follow from the size of the images: a traced or exported graph is for images of one size.

    Args:
        query: what is compared of the left views.
        key: what is compared of the right views.
        features: what is exchanged, the left views first.
        path: ``chunked``, ``fused`` or ``reference``.
        band: smallest and largest disparity (left minus right column, in pixels) that a match may have; default any.
            Pixels that have no partner in the band keep their own features.
        maps: return the attention maps; for the reference path.
        disparity: return the mean disparity under the weights (soft-argmax), 0 where the band leaves no partner.
        chunk_bytes: memory for the chunks; default 64 MiB on processors and 512 MiB elsewhere.

    Shape:
        - query, key: ``(B, C, H, W)``;
        - features: ``(2B, F, H, W)``.

    Raises:
        SettingError: for an unknown path, an empty band, or maps of another path than the reference.

    Example:
        >>> code = 9 * torch.eye(6).reshape(1, 6, 1, 6)
        >>> found = parallax_attention(code, code.roll(-1, -1), torch.rand(2, 3, 1, 6), disparity=True)
        >>> found.disparity[0, 0, 0].round()
        tensor([-5.,  1.,  1.,  1.,  1.,  1.])

    Reference:
        arXiv 2011.03802
    """
    _check(path, band)
    if maps and path != "reference":
        raise SettingError(f"the {path} path has no maps to return; use path='reference'")
    batch = len(query)
    with without_autocast(query):
        # Scores are never scaled: float32 at least.
        queries, keys = (_rows(one.to(torch.promote_types(one.dtype, torch.float32))) for one in (query, key))
        views = [_rows(one) for one in features.chunk(2)]
        window = None if band is None else _Window(band, queries)
        given = (queries, keys, *views)
        if path == "fused":
            found = _fused(given, window, disparity=disparity)
        else:
            width, count = queries.shape[1], len(queries)
            if path == "chunked":
                allowed = chunk_bytes or (_CPU_BYTES if query.device.type == "cpu" else _DEVICE_BYTES)
                count = max(1, allowed // (_MAPS * 4 * width**2))
            parts = [
                _attended(rows, window, maps=maps, disparity=disparity)
                for rows in zip(*(one.split(count) for one in given), strict=True)
            ]
            found = _Exchange(*(_joined(one, 0) for one in zip(*parts, strict=True)))
        valid = [(_SHARPNESS * one).tanh()[..., None] for one in (found.agrees_left, found.agrees_right)]
        brought = [found.left, found.right]
        filled = [
            torch.lerp(own, new, mask.to(own.dtype))
            for own, new, mask in zip(views, brought, valid, strict=True)
        ]
    shifts = [found.shift_left, found.shift_right] if disparity else None
    return ParallaxResult(
        features=_images(filled, batch),
        valid=_images(valid, batch),
        to_left=None if found.to_left is None else found.to_left.unflatten(0, (batch, -1)),
        to_right=None if found.to_right is None else found.to_right.unflatten(0, (batch, -1)),
        disparity=None if shifts is None else _images(shifts, batch),
    )


class _Exchange(NamedTuple):
    """What the paths find, for N rows of W pixels; see :class:`ParallaxResult`."""

    left: Tensor
    right: Tensor
    agrees_left: Tensor
    agrees_right: Tensor
    shift_left: Tensor | None = None
    shift_right: Tensor | None = None
    to_left: Tensor | None = None
    to_right: Tensor | None = None


_Given = tuple[Tensor, Tensor, Tensor, Tensor]
"""Queries, keys, left and right features, ``(N, W, channels)`` each."""


class _Window:
    """Which pairs of columns lie in a band of disparities, and which columns have a partner at all."""

    def __init__(self, band: tuple[int, int], like: Tensor) -> None:
        columns = torch.arange(like.shape[1], device=like.device)
        disparity = columns[:, None] - columns
        outside = (disparity < band[0]) | (disparity > band[1])
        self.scores = torch.zeros_like(disparity, dtype=like.dtype).masked_fill_(outside, _EXCLUDED)
        self.lonely_left, self.lonely_right = outside.all(1), outside.all(0)


def _attended(given: _Given, window: _Window | None, *, maps: bool, disparity: bool) -> _Exchange:
    """Exchange features between rows whose maps fit into memory."""
    queries, keys, left, right = given
    scores = queries @ keys.mT
    if window is not None:
        scores = scores + window.scores
    # Both maps have the left column on axis 1 and the right column on axis 2.
    to_left, from_left = scores.softmax(2), scores.softmax(1)
    if window is not None:
        to_left = to_left.masked_fill(window.lonely_left[:, None], 0)
        from_left = from_left.masked_fill(window.lonely_right, 0)
    to_right = from_left.mT
    with torch.no_grad():
        agrees_left = _relaxed_products(to_left, from_left)
        agrees_right = _relaxed_products(to_right, to_left.mT)
    shifts: list[Tensor | None] = [None, None]
    if disparity:
        columns = _columns(queries)
        # The sum of the weights is 0 where there is no partner, and 1 elsewhere.
        shifts = [
            columns * to_left.sum(2, keepdim=True) - to_left @ columns,
            to_right @ columns - columns * to_right.sum(2, keepdim=True),
        ]
    return _Exchange(
        to_left.to(right.dtype) @ right,
        to_right.to(left.dtype) @ left,
        agrees_left,
        agrees_right,
        *shifts,
        *((to_left, to_right) if maps else ()),
    )


def _fused(given: _Given, window: _Window | None, *, disparity: bool) -> _Exchange:
    """Exchange features between rows without a map, see :func:`parallax_attention`."""
    queries, keys, left, right = given
    scores = None if window is None else window.scores
    found = [_fused_features(queries, keys, right, scores=scores, disparity=disparity)]
    turned = None if scores is None else scores.T
    found.append(_fused_features(keys, queries, left, scores=turned, disparity=disparity))
    agrees = _fused_agreement(queries, keys, window)
    shifts: list[Tensor | None] = [None, None]
    if disparity:
        columns = _columns(queries)
        shifts = [columns - found[0][..., -1:], found[1][..., -1:] - columns]
        found = [one[..., :-1] for one in found]
    found = [one.to(left.dtype) for one in found]
    if window is not None:
        lonely = (window.lonely_left[:, None], window.lonely_right[:, None])
        found = [one.masked_fill(alone, 0) for one, alone in zip(found, lonely, strict=True)]
        if disparity:
            shifts = [one.masked_fill(alone, 0) for one, alone in zip(shifts, lonely, strict=True)]
    return _Exchange(*found, *agrees, *shifts)


def _fused_features(
    queries: Tensor, keys: Tensor, values: Tensor, *, scores: Tensor | None, disparity: bool
) -> Tensor:
    """Features, and the mean column behind them if the disparity is wanted, brought to where the queries are."""
    values = values.to(queries.dtype)
    if disparity:
        values = torch.cat([values, _columns(keys).expand(len(keys), -1, 1)], 2)
    # The kernels that need no map want as many channels to compare as to bring, and four axes.
    wide = max(queries.shape[2], values.shape[2])
    padded = (F.pad(one, (0, wide - one.shape[2]))[:, None] for one in (queries, keys, values))
    found = F.scaled_dot_product_attention(*padded, attn_mask=scores, scale=1.0)
    return found[:, 0, :, : values.shape[2]]


@torch.no_grad()
def _fused_agreement(queries: Tensor, keys: Tensor, window: _Window | None) -> list[Tensor]:
    """Weights that come back, ``(N, W)`` on the left and on the right, from scores in blocks of left columns."""
    width = queries.shape[1]

    def scores(columns: slice) -> Tensor:
        block = queries[:, columns] @ keys.mT
        return block if window is None else block + window.scores[columns]

    by_left, by_right = [], torch.full_like(keys[:, None, :, 0], -torch.inf)
    for start in range(0, width, _FUSED_BLOCK):
        block = scores(slice(start, start + _FUSED_BLOCK))
        by_left.append(block.logsumexp(2, keepdim=True))
        by_right = torch.logaddexp(by_right, block.logsumexp(1, keepdim=True))
    log_left = torch.cat(by_left, 1)
    if window is not None:
        # Whoever has no partner weighs nothing.
        log_left = log_left.masked_fill(window.lonely_left[:, None], torch.inf)
        by_right = by_right.masked_fill(window.lonely_right, torch.inf)
    agrees_left, agrees_right = [], torch.zeros_like(keys[:, :, 0])
    for start in range(0, width, _FUSED_BLOCK):
        stop, low = min(start + _FUSED_BLOCK, width), max(0, start - _RELAXED)
        seen = slice(low, min(stop + _RELAXED, width))
        block = scores(seen)
        to_left, from_left = (block - log_left[:, seen]).exp(), (block - by_right).exp()
        inner = slice(start - low, stop - low)
        agrees_left.append(_relaxed_products(to_left, from_left)[:, inner])
        agrees_right += _relaxed_products(from_left[:, inner].mT, to_left[:, inner].mT)
    return [torch.cat(agrees_left, 1), agrees_right]


def _relaxed_products(weights: Tensor, back: Tensor) -> Tensor:
    """Sum over j and over the columns k within two of i of ``weights[n, k, j] * back[n, i, j]``, ``(N, W)``.

    For a block of columns these are the entries next to the diagonal of a matrix product. That reads the maps once;
    five shifted products of maps took twice as long.
    """
    width, found = weights.shape[1], []
    for start in range(0, width, _BLOCK):
        stop, low = min(start + _BLOCK, width), max(0, start - _RELAXED)
        high = min(stop + _RELAXED, width)
        products = back[:, start:stop] @ weights[:, low:high].mT
        near = products.new_ones(stop - start, high - low)
        near = near.tril_(start - low + _RELAXED).triu_(start - low - _RELAXED)
        found.append((products * near).sum(2))
    return torch.cat(found, 1)


def by_view(pairs: Tensor) -> Tensor:
    """Views one after the other, so that one network serves both: ``(B, 2C, ...)`` to ``(2B, C, ...)``, left first.

    Example:
        >>> by_view(torch.tensor([[1, 2], [3, 4]])).flatten().tolist()
        [1, 3, 2, 4]
    """
    return torch.cat(pairs.chunk(2, 1))


def side_by_side(views: Tensor) -> Tensor:
    """The pairs that :func:`by_view` took apart, ``(2B, C, ...)`` to ``(B, 2C, ...)``.

    Example:
        >>> side_by_side(by_view(torch.tensor([[1, 2], [3, 4]]))).tolist()
        [[1, 2], [3, 4]]
    """
    return torch.cat(views.chunk(2), 1)


def checked_pair(image: Tensor, channels: int) -> Tensor:
    """Return a pair, or say what a pair is.

    Args:
        image: what should be a pair.
        channels: channels of both views together.

    Raises:
        DataError: for another shape.

    Example:
        >>> checked_pair(torch.zeros(1, 6, 4, 5), 6).shape
        torch.Size([1, 6, 4, 5])
    """
    if image.ndim != 4 or image.shape[1] != channels:
        raise DataError(
            f"a pair is (B, {channels}, H, W), left before right, got {tuple(image.shape)}; "
            "give one view twice if there is no other"
        )
    return image


def wanted_of(parallax: str, exchange: BiPAM | None) -> dict[str, bool]:
    """Arguments of :class:`BiPAM` for what a network shall return of the parallax.

    Args:
        parallax: ``none``, ``disparity`` or ``maps``.
        exchange: that of the network.

    Raises:
        SettingError: for another word, or a network without exchange that shall return some.

    Example:
        >>> wanted_of("maps", BiPAM(8, 2)), wanted_of("none", None)
        ({'maps': True}, {})
    """
    if parallax not in _PARALLAX:
        raise SettingError(f"parallax must be one of {', '.join(_PARALLAX)}, got '{parallax}'")
    if parallax == "none":
        return {}
    if exchange is None:
        raise SettingError(
            "a network with cross_view=False has no parallax to return; its training needs sr_only, and balance 0"
        )
    return {parallax: True}


def _check(path: str, band: tuple[int, int] | None) -> None:
    if path not in PARALLAX_PATHS:
        raise SettingError(f"path must be one of {', '.join(PARALLAX_PATHS)}, got '{path}'")
    if band is not None and not band[0] <= band[1]:
        raise SettingError(f"band must be the smallest and the largest disparity, got {band}")


def _whitened(x: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x - x.mean(3, keepdim=True)


def _rows(x: Tensor) -> Tensor:
    """``(B, C, H, W)`` as ``(B * H, W, C)``."""
    return x.permute(0, 2, 3, 1).flatten(0, 1).contiguous()


def _images(views: list[Tensor], batch: int) -> Tensor:
    """Rows of the left and of the right views ``(B * H, W, C)`` as ``(2B, C, H, W)``."""
    return torch.cat(views).unflatten(0, (2 * batch, -1)).permute(0, 3, 1, 2)


def _columns(like: Tensor) -> Tensor:
    """Numbers of the columns, ``(W, 1)``."""
    return torch.arange(like.shape[1], device=like.device, dtype=like.dtype)[:, None]


def _joined(parts: tuple[Tensor | None, ...], axis: int) -> Tensor | None:
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts, axis)
