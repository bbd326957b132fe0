"""Whether two restored views still fit together: the disparities seen in them, against those of the truth."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from medsr.errors import DataError, SettingError

__all__ = ["DISPARITY_SHARE", "disparity_error", "row_disparity"]

DISPARITY_SHARE = (-0.125, 0.25)
"""Disparities that are looked for, as shares of the width: cameras that look inwards have both signs."""

_WINDOW = 9
"""Side of the patches that are compared, in pixels."""

_TEXTURE = 2 / 255
"""Mean change from column to column below which a patch looks like its neighbours."""

_OUTSIDE = 100.0
"""What lies beyond a view, more unlike than any grey: patches that reach there come last, at any contrast."""

_RETURN_PX = 1
"""Distance from itself at which a pixel may arrive on its way to the other view and back."""


def row_disparity(pair: Tensor, span: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Disparity of every left pixel by block matching along its row, and where it can be trusted.

    The patch of the other view with the least mean absolute difference of grey counts. It is trusted where the left
    patch has texture, and where the best match of the match is the pixel again (left-right check). This is no
    state-of-the-art matching, but it is the same for every method that is compared, and it learnt from no image.
    OpenCV's ``StereoBM`` does the same; OpenCV is not a dependency, and MONAI has no stereo matching.

    Args:
        pair: intensities in [0, 1], left before right.
        span: smallest and largest disparity (left minus right column), in pixels; default by ``DISPARITY_SHARE``.

    Returns:
        the disparity in whole pixels, and the mask of what is trusted.

    Shape:
        - pair: ``(2C, H, W)``;
        - outputs: ``(H, W)``.

    Raises:
        DataError: if it is no pair.
        SettingError: for an empty span.

    Example:
        >>> view = torch.rand(1, 20, 60, generator=torch.Generator().manual_seed(0))
        >>> found, trusted = row_disparity(torch.cat([view, view.roll(-3, 2)]), (-4, 8))
        >>> found[trusted].mode().values.item()
        3

    Reference:
        D. Scharstein and R. Szeliski, A taxonomy and evaluation of dense two-frame stereo correspondence algorithms,
        2002, doi:10.1023/A:1014573219977
    """
    left, right, (low, high) = _greys(pair, span)
    width = left.shape[1]
    first = _best(left, right, low, high)
    # Seen from the right, the other view lies on the other side.
    second = _best(right, left, -high, -low)
    columns = torch.arange(width, device=pair.device)
    there = (columns - first).clamp(0, width - 1)
    back = there - second.gather(1, there)
    change = F.pad(left.diff(dim=1).abs(), (0, 1))
    trusted = ((back - columns).abs() <= _RETURN_PX) & (_smooth(change) > _TEXTURE)
    return first, trusted & (columns - first >= 0) & (columns - first < width)


def disparity_error(
    pred: Tensor, truth: tuple[Tensor, Tensor], span: tuple[int, int] | None = None
) -> float | None:
    """Mean distance of the disparities in a restored pair from those in the true one, where the true one has them.

    Errors of the two views that agree cost nothing here; details that were made up in one view only do.

    Args:
        pred: restored pair.
        truth: what :func:`row_disparity` finds in the true pair, with the same span.
        span: see :func:`row_disparity`.

    Returns:
        the mean in pixels; None if nothing in the true pair can be trusted.

    Shape:
        - pred: ``(2C, H, W)``;
        - truth: ``(H, W)`` both.

    Raises:
        DataError: if the shapes differ.

    Example:
        >>> view = torch.rand(1, 20, 60, generator=torch.Generator().manual_seed(0))
        >>> pairs = [torch.cat([view, view.roll(-shift, 2)]) for shift in (3, 5)]
        >>> round(disparity_error(pairs[1], row_disparity(pairs[0], (0, 8)), (0, 8)), 1)
        2.0
    """
    true, trusted = truth
    left, right, ends = _greys(pred, span)
    if left.shape != true.shape:
        raise DataError(f"views of {tuple(left.shape)} do not fit to disparities of {tuple(true.shape)}")
    if not trusted.any():
        return None
    return float((_best(left, right, *ends) - true)[trusted].abs().float().mean())


def _greys(pair: Tensor, span: tuple[int, int] | None) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Left view, right view and the disparities to look for."""
    if pair.ndim != 3 or len(pair) % 2:
        raise DataError(f"a pair is (2C, H, W), left before right, got {tuple(pair.shape)}")
    low, high = span or (round(share * pair.shape[2]) for share in DISPARITY_SHARE)
    if low > high:
        raise SettingError(f"span must be the smallest and the largest disparity, got {span}")
    left, right = pair.float().unflatten(0, (2, -1)).mean(1)
    return left, right, (low, high)


def _best(view: Tensor, other: Tensor, low: int, high: int) -> Tensor:
    """The shift of the other view at which the patch around each pixel is most alike, ``(H, W)``."""
    width = view.shape[1]
    reach = max(abs(low), abs(high))
    padded = F.pad(other, (reach, reach), value=_OUTSIDE)
    best = torch.full_like(view, float("inf"))
    found = torch.zeros_like(view, dtype=torch.long)
    for shift in range(low, high + 1):
        start = reach - shift
        cost = _smooth((view - padded[:, start : start + width]).abs())
        better = cost < best
        best, found = torch.where(better, cost, best), found.masked_fill(better, shift)
    return found


def _smooth(image: Tensor) -> Tensor:
    """Mean over the patch around each pixel; at the border, over the part inside."""
    return F.avg_pool2d(image[None], _WINDOW, 1, _WINDOW // 2, count_include_pad=False)[0]
