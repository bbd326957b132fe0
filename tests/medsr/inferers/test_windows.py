"""Every place of an axis belongs to one window, and every window reads the halo that was asked for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from medsr.inferers.windows import covering


@given(
    units=st.integers(1, 300), tile=st.integers(8, 100), halo=st.integers(0, 40), multiple=st.integers(1, 4)
)
def test_windows_have_one_size_and_the_halo_that_was_asked_for(units, tile, halo, multiple):
    size = units * multiple
    spans = covering(size, tile, halo, multiple=multiple)
    lengths = {one.read.stop - one.read.start for one in spans}
    assert len(lengths) == 1
    assert lengths.pop() <= max(tile, multiple) + 2 * (halo + multiple - 1)
    assert [index for one in spans for index in range(one.place.start, one.place.stop)] == list(range(size))
    for one in spans:
        before, after = one.margins
        assert one.read.start >= 0
        assert one.read.stop <= size
        assert (one.read.start + before, one.read.stop - after) == (one.place.start, one.place.stop)
        # Either the halo is whole, or the border is where the axis ends.
        assert before >= halo or one.read.start == 0
        assert after >= halo or one.read.stop == size
        assert not any(edge % multiple for part in one for edge in (part.start, part.stop))


@given(size=st.integers(1, 300), halo=st.integers(0, 40))
def test_what_fits_into_one_window_has_one(size, halo):
    (one,) = covering(size, size, halo)
    assert one.read == one.keep == one.place == slice(0, size)
    assert one.margins == (0, 0)
