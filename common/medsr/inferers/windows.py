"""Windows that cover an axis: what each reads, what of its result is kept, and where that belongs."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Span", "covering"]


class Span(NamedTuple):
    """A window along one axis.

    Attributes:
        read: what the window reads.
        keep: what of it is kept, counted from the start of the window.
        place: where that belongs on the axis.

    Example:
        >>> Span(slice(2, 8), slice(2, 4), slice(4, 6)).margins
        (2, 2)
    """

    read: slice
    keep: slice
    place: slice

    @property
    def margins(self) -> tuple[int, int]:
        """What is read only, before and after that which is kept."""
        return self.keep.start, self.read.stop - self.read.start - self.keep.stop


def covering(size: int, tile: int, halo: int, *, multiple: int = 1) -> list[Span]:
    """Windows of one size that cover an axis; each keeps its own share and reads at least the halo around it.

    Shares are equal but for the last. At both ends windows are shifted inwards: they end where the axis ends, so that
    a network pads there as it does for the whole. ``monai.data.utils.dense_patch_slices`` was considered: its windows
    overlap, and say nothing of what to keep.

    Args:
        size: length of the axis, a multiple of ``multiple``.
        tile: share of a window at most, rounded down to a multiple.
        halo: what a window reads on either side of its share, at least; rounded up to a multiple.
        multiple: of which all lengths and starts are.

    Example:
        >>> [(span.read, span.place) for span in covering(10, 5, 2)]
        [(slice(0, 9, None), slice(0, 5, None)), (slice(1, 10, None), slice(5, 10, None))]
    """
    units, halo = size // multiple, -(-halo // multiple)
    tile = max(1, tile // multiple)
    if units <= tile + 2 * halo:
        whole = slice(0, size)
        return [Span(whole, whole, whole)]
    # Equal shares but for the last: windows with equal margins can share a batch.
    share = -(-units // -(-units // tile))
    length = min(units, share + 2 * halo)
    spans = []
    for start in range(0, units, share):
        stop = min(start + share, units)
        low = min(max(0, start - halo), units - length)
        parts = ((low, low + length), (start - low, stop - low), (start, stop))
        spans.append(Span(*(slice(first * multiple, last * multiple) for first, last in parts)))
    return spans
