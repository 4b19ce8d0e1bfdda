"""Packed batches: every sequence and its targets, the buckets that hold them, the micro-batches they are cut into."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minirec.packing import from_heads, make_buckets, micro_batches, pack, spans, to_heads

LENGTHS = np.array([1, 3, 3, 4, 6])
N, D, H = LENGTHS.sum(), 6, 2


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), max_size=12))
def test_spans_are_the_ranges_end_to_end(ranges):
    starts, lengths = np.array(ranges, int).reshape(-1, 2).T
    expected = [i for start, length in ranges for i in range(start, start + length)]
    assert list(spans(starts, lengths)) == expected


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), min_size=1, max_size=12))
def test_a_packed_batch_holds_every_sequence_and_its_targets(windows):
    flat = np.random.default_rng(0).permutation(50)
    starts, lengths = np.array(windows).T
    batch = pack(flat, starts, lengths)
    ends = np.cumsum(batch.lengths)
    for place, end in zip(batch.order, ends, strict=True):
        rows, start, length = slice(end - lengths[place], end), *windows[place]
        np.testing.assert_array_equal(batch.items[rows], flat[start : start + length])
        np.testing.assert_array_equal(batch.targets[rows], flat[start + 1 : start + length + 1])
        np.testing.assert_array_equal(batch.positions[rows], np.arange(length))
    assert sorted(batch.order) == list(range(len(windows))) and len(batch.items) == ends[-1] == lengths.sum()


def test_buckets_without_padding_are_views(rng):
    x = rng.normal(size=(N, D))
    buckets = make_buckets(LENGTHS, None, np)
    assert [(b.count, b.length) for b in buckets] == [(1, 1), (2, 3), (1, 4), (1, 6)]
    assert all(np.shares_memory(to_heads(x, bucket, H), x) for bucket in buckets)


@pytest.mark.parametrize("n_buckets", [None, 1, 2, 9])
def test_from_heads_undoes_to_heads(rng, n_buckets):
    x = rng.normal(size=(N, D))
    out = np.zeros_like(x)
    for bucket in make_buckets(LENGTHS, n_buckets, np):
        from_heads(to_heads(x, bucket, H), bucket, out)
    np.testing.assert_array_equal(out, x)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=300), st.integers(1, 6))
@settings(deadline=None)
def test_micro_batches_hold_every_sequence_once_and_are_even(lengths, n_buffers):
    lengths = np.array(lengths)
    buffers = micro_batches(lengths, n_buffers, 1000)
    assert len(buffers) == n_buffers
    dealt = [chunk for buffer in buffers for chunk in buffer]
    assert sorted(np.concatenate(dealt)) == list(range(len(lengths)))
    assert max(lengths[chunk].sum() for chunk in dealt) <= 1000 + 2 * lengths.max()
