"""The ends of spans, as SpanBERT defines them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpt.corruption.boundaries import ends_of_spans

ENDS = jax.jit(ends_of_spans)


def test_a_packed_row():
    #                    0  1  2  3  4  5  6  7  8  9 10 11
    selected = jnp.array([0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 1, 0]) > 0
    segments = jnp.array([1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 0])
    ordinary = jnp.array([1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0]) > 0
    ends = jax.device_get(ENDS(selected, ordinary, segments))
    # {1, 2} stands between 0 and 3; {4} touches a special token; {7} and {8} are two spans, each at an edge of its
    # document; {10} is the end of the text
    assert ends.known.nonzero()[0].tolist() == [1, 2]
    assert (ends.left[1:3] == 0).all()
    assert (ends.right[1:3] == 3).all()
    assert ends.place[[1, 2, 4, 7, 8, 10]].tolist() == [0, 1, 0, 0, 0, 0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=14, max_size=14), st.integers(0, 14), st.integers(0, 14))
def test_against_a_walk_over_the_row(selected, cut, special):
    selected, index = np.array(selected), np.arange(14)
    segments, ordinary = np.where(index < cut, 1, 2), index != special
    selected &= ordinary
    ends = jax.device_get(ENDS(selected, ordinary, segments))
    for t in np.flatnonzero(selected):
        left = right = t
        while left >= 0 and selected[left] and segments[left] == segments[t]:
            left -= 1
        while right < 14 and selected[right] and segments[right] == segments[t]:
            right += 1
        known = all(0 <= end < 14 and ordinary[end] and segments[end] == segments[t] for end in (left, right))
        assert ends.known[t] == known
        assert ends.place[t] == t - left - 1
        if known:
            assert (ends.left[t], ends.right[t]) == (left, right)
    assert not ends.known[~selected].any()
