"""Batches without padding: sequences of unequal length as rows of one array, and as dense rectangles.

Symbols: B sequences, L positions, N tokens (all positions of a batch), D hidden size, H heads, K = D/H.

All of a transformer but attention looks at one token at a time. For that a batch is one array of N rows, its
sequences one after the other, and no row is padding. Attention looks along a sequence and needs rectangles
[B, L, ...]. The sequences lie sorted by length, so those of equal length are neighbours, and a run of them is such a
rectangle already: a view of the same memory, no copy. It is called a bucket. Lengths 1 3 3 4:

    row          0     1   2   3   4   5   6     7   8   9  10        one packed array, N = 11
    sequence     a     b   b   b   c   c   c     d   d   d   d
    position     0     0   1   2   0   1   2     0   1   2   3        0 = oldest item kept

    buckets     [a]   [b   b   b]               [d   d   d   d]       three dense rectangles, B x L:
                      [c   c   c]                                     1 x 1, 2 x 3 and 1 x 4

A GPU wants few large kernels instead of many small ones. There, sequences of unequal length share a bucket, and
the positions that are missing at each sequence's END hold zeros. Missing positions need no mask. A real query never
looks ahead, so it never sees them. Their own outputs are dropped, so their gradients are 0.
"""

from typing import NamedTuple

import numpy as np

from minirec.backend import get_array_module, to_device
from minirec.errors import UserError
from minirec.gpu import fused


class Plan(NamedTuple):
    """How a batch is cut into chunks of work. A CPU wants chunks that stay in its cache. On a GPU every kernel
    launch costs, so it wants few chunks, however many sequences a batch has."""

    gradient_buffers: int  # gradient vectors that may be filled at the same time
    micro_batch_tokens: int  # about so many tokens go through the model at a time
    bucket_scores: int | None  # None: one bucket a length; else 1, or 3 where 1 would hold more scores than this
    loss_bytes: int  # a chunk of logits has so many bytes,
    loss_rows: int  # or so many rows, whichever is more (within LARGEST_CHUNK)


CPU_PLAN = Plan(gradient_buffers=4, micro_batch_tokens=1000, bucket_scores=None, loss_bytes=4 << 20, loss_rows=128)
GPU_PLAN = Plan(gradient_buffers=1, micro_batch_tokens=1 << 18, bucket_scores=1 << 23, loss_bytes=1 << 30, loss_rows=1)
LARGEST_CHUNK = 64 << 20  # bytes that loss_rows may ask for


def plan(xp):
    """Return the Plan for array module xp."""
    return CPU_PLAN if xp is np else GPU_PLAN


def chunk_rows(xp, n_columns, itemsize):
    """Return how many rows of [rows, n_columns] logits or scores, of itemsize bytes a number, to make at a time.

    A small chunk stays in the cache. But every chunk reads the embeddings of all items, and the loss adds to the
    gradients of all. With many items, a chunk needs more rows to share this cost.
    """
    row_bytes, p = n_columns * itemsize, plan(xp)
    return max(16, p.loss_bytes // row_bytes, min(p.loss_rows, LARGEST_CHUNK // row_bytes))


def spans(starts, lengths):
    """Return the ranges start, start + 1, ..., start + length - 1 of all starts [B] and lengths [B], end to end."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


# Buckets


class Bucket(NamedTuple):
    """Rows start:stop of a packed array, seen as `count` sequences of `length` positions."""

    start: int
    stop: int
    count: int
    length: int
    filled: object = None  # [stop - start] which of the count * length positions each row fills; None: all, in order


def make_buckets(lengths, n_buckets, xp):
    """Cut sequences into buckets.

    lengths [B] ascending, on the host (in the CPU's memory); n_buckets: how many, of about equal numbers of sequences,
    or None for one a length, with no padding at all.
    Returns a list of Bucket that covers rows 0..N-1 in order.
    """
    if n_buckets is None:
        runs = np.split(lengths, np.flatnonzero(np.diff(lengths)) + 1)
    else:
        runs = [run for run in np.array_split(lengths, n_buckets) if len(run)]
    buckets, start = [], 0
    for run in runs:
        count, length, n = len(run), int(run[-1]), int(run.sum())
        filled = None
        if n < count * length:
            filled = to_device(spans(np.arange(count) * length, run), xp)
        buckets.append(Bucket(start, start + n, count, length, filled))
        start += n
    return buckets


@fused
def to_heads(x, bucket, n_heads):
    """Return a bucket's rows of packed x [N, D] as [B, H, L, K]; a view where the bucket is dense."""
    rows = x[bucket.start : bucket.stop]
    if bucket.filled is not None:
        xp = get_array_module(x)
        padded = xp.zeros((bucket.count * bucket.length, x.shape[1]), x.dtype)
        padded[bucket.filled] = rows
        rows = padded
    return rows.reshape(bucket.count, bucket.length, n_heads, -1).transpose(0, 2, 1, 3)


@fused
def from_heads(x_heads, bucket, out):
    """Write x_heads [B, H, L, K] to the bucket's rows of packed out [N, D]: the inverse of to_heads."""
    rows = x_heads.transpose(0, 2, 1, 3).reshape(bucket.count * bucket.length, -1)
    out[bucket.start : bucket.stop] = rows if bucket.filled is None else rows[bucket.filled]


# Batches


class Batch(NamedTuple):
    """Sequences packed row by row, shortest first, with nothing in between."""

    items: object  # [N] the item at each position
    positions: object  # [N] 0 = oldest item kept
    targets: object  # [N] the item that follows; None where there is nothing to learn
    negatives: object  # [N] one a position (loss "bce"), or [n] for all, set by the caller ("sampled"); else None
    buckets: list  # rectangles for attention
    order: np.ndarray  # [B] which of the given sequences comes first, second, ..., on the host
    lengths: np.ndarray  # [B] ascending, on the host


def pack(flat, starts, lengths, xp=np, with_targets=True, negatives=None):
    """Pack the sequences flat[start : start + length] into a Batch on array module xp.

    flat: integer array of items, on the host; starts, lengths [B], all lengths at least 1. The target of a position is
    the next entry of flat, so flat must reach one item past each sequence. negatives: as long as flat,
    one for each of its entries, or None.
    """
    order = np.argsort(lengths, kind="stable")
    starts, lengths = starts[order], lengths[order]
    rows = spans(starts, lengths)
    limit, n_buckets = plan(xp).bucket_scores, None
    if limit is not None:
        n_buckets = 3 if len(lengths) * int(lengths[-1]) ** 2 > limit else 1  # the scores of one head
    return Batch(
        items=to_device(flat[rows], xp),
        positions=to_device(spans(np.zeros_like(lengths), lengths), xp),
        targets=to_device(flat[rows + 1], xp) if with_targets else None,
        negatives=None if negatives is None else to_device(negatives[rows], xp),
        buckets=make_buckets(lengths, n_buckets, xp),
        order=order,
        lengths=lengths,
    )


def check_items(flat, n_items):
    """Raise UserError where flat is not a row of integers in 0..n_items-1: a GPU would not notice."""
    if flat.ndim != 1 or flat.dtype.kind not in "iu" or not flat.size or flat.min() < 0 or flat.max() >= n_items:
        raise UserError(f"a sequence must be a 1-D array of integers in 0..{n_items - 1}")


def pack_list(sequences, config, xp=np, with_targets=False):
    """Pack a list of 1-D integer arrays, the last max_length positions of each (see pack).

    config: a model.Config. With targets, inputs are s[:-1] and targets s[1:], and sequences of one item are left out:
    they have no target. Raises UserError for an item outside 0..V-1, or where nothing is left to compute.
    """
    fewest = 2 if with_targets else 1
    sequences = [np.asarray(s)[-(config.max_length + fewest - 1) :] for s in sequences if len(s) >= fewest]
    if not sequences:
        raise UserError(f"no sequence has {fewest} or more items")
    flat = np.concatenate(sequences)
    check_items(flat, config.n_items)
    lengths = np.array([len(s) for s in sequences])
    return pack(flat, np.cumsum(lengths) - lengths, lengths - (fewest - 1), xp, with_targets)


def micro_batches(lengths, n_buffers, n_tokens):
    """Cut a batch into micro-batches of about n_tokens tokens, and deal them to gradient buffers.

    lengths [B] of the sequences. They are sorted by length, because equal lengths make dense buckets, and cut into
    micro-batches of about equal token counts, the same number for each buffer. With 2 buffers, micro-batches 0, 2, 4,
    ... go to one and 1, 3, 5, ... to the other: both get short and long sequences.
    Returns, for each buffer, a list of index arrays into `lengths`.
    """
    order = np.argsort(lengths, kind="stable")
    ordered = lengths[order]
    total = int(ordered.sum())
    n = n_buffers * -(-total // (n_buffers * n_tokens))
    middles = np.cumsum(ordered) - ordered / 2  # where the middle of each sequence falls, in tokens
    number = (middles * n / total).astype(int)  # of its micro-batch
    cut = [order[number == i] for i in range(n)]
    return [[part for part in cut[buffer::n_buffers] if len(part)] for buffer in range(n_buffers)]
