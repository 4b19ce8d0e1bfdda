"""Causal multi-head attention and its backward. The weights are the one line the study changes.

Symbols: B sequences, L positions, N tokens, D hidden size, H heads, K = D/H, g sequences in a group,
i a position that looks (query), j one that is looked at (key).

Position i asks with its query q[i], position j answers with its key k[j]; the better the two match, the
more of the value v[j] goes into o[i]. All three are linear in the block's input (model.py). Only j <= i
counts: position i is to predict item i + 1 and must not see it. Each head does this on K columns of
its own; 1/sqrt(K) keeps the spread of s, a sum of K products, from growing with K.

    softmax   A[i,j] = exp(s_ij) / sum_{j' <= i} exp(s_ij'),  s = q k^T / sqrt(K)   learned
    uniform   A[i,j] = 1/(i+1) for j <= i                                           a plain average
    identity  A[i,j] = 1 for j = i                                                  no mixing
    recency   A[i,j] proportional to 1/(1 + i - j) for j <= i                       the recent counts more
    o[i] = sum_j dropout(A)[i,j] v[j]

Token-wise arrays are packed, [N, D], with no padding rows, but attention needs rectangles
[g, L, ...]. The sequences of a batch lie sorted by length, so a run of equal lengths IS a
rectangle: a view, no copy. Where few large kernels beat many small ones (a GPU), unequal lengths
share a rectangle and the missing places at each sequence's END are zero. No mask is needed for
them: a causal query never looks ahead, and their own outputs are dropped.
"""

from typing import NamedTuple

import numpy as np

from minirec.backend import get_array_module, to_device
from minirec.ops import dropout_mask

# The fixed weightings: what A[i,j] is proportional to, for query position i and key position j <= i. Each row is
# divided by its sum, and the future gets 0. Whatever lists weightings takes them from here: a new one is one line.
FIXED = {
    "uniform": lambda i, j: 1,
    "identity": lambda i, j: i == j,
    "recency": lambda i, j: 1 / (1 + i - j),
}


def known_weightings():
    """Return the names that a block's weighting can have: softmax, and those of FIXED."""
    return ("softmax", *FIXED)


class Group(NamedTuple):
    """Rows start:stop of a packed array, seen as `count` sequences of `length` positions."""

    start: int
    stop: int
    count: int
    length: int
    places: object = None  # [stop - start] where each row lies in the count * length places; None: all in order


def make_groups(lengths, rectangles, xp):
    """Cut sequences into groups for attention.

    lengths [B] ascending, on the host; rectangles: how many groups, or None for one group a
    distinct length (no padding at all). Returns a list of Group that covers rows 0..N-1 in order.
    """
    lengths = np.asarray(lengths)
    if rectangles is None:
        cuts = np.flatnonzero(np.diff(lengths)) + 1
        runs = np.split(lengths, cuts)
    else:
        runs = [run for run in np.array_split(lengths, rectangles) if len(run)]
    groups, start = [], 0
    for run in runs:
        count, length, n = len(run), int(run[-1]), int(run.sum())
        places = None
        if n < count * length:
            places = np.flatnonzero(np.arange(length) < run[:, None])
            places = to_device(places, xp)
        groups.append(Group(start, start + n, count, length, places))
        start += n
    return groups


def to_heads(x, group, n_heads):
    """Return rows of packed x [N, D] as [g, H, L, K]; a view where the group is dense."""
    rows = x[group.start : group.stop]
    if group.places is not None:
        xp = get_array_module(x)
        padded = xp.zeros((group.count * group.length, x.shape[1]), x.dtype)
        padded[group.places] = rows
        rows = padded
    return rows.reshape(group.count, group.length, n_heads, -1).transpose(0, 2, 1, 3)


def from_heads(x_heads, group, out):
    """Write x_heads [g, H, L, K] to its rows of packed out [N, D]: the inverse of to_heads."""
    rows = x_heads.transpose(0, 2, 1, 3).reshape(group.count * group.length, -1)
    out[group.start : group.stop] = rows if group.places is None else rows[group.places]


def fixed_part(weighting, length, like):
    """Return what of A no input changes, [length, length]; its upper left corner serves shorter sequences.

    softmax: 0 for j <= i and -inf for j > i, to be added to the scores, since exp(-inf) = 0;
    one of FIXED: A itself. `like` gives array module and dtype.
    """
    xp = get_array_module(like)
    if weighting == "softmax":
        return xp.triu(xp.full((length, length), -xp.inf, like.dtype), 1)
    position = xp.arange(length, dtype=like.dtype)
    i, j = position[:, None], position[None, :]
    past = j <= i
    a = FIXED[weighting](i, xp.minimum(i, j)) * past  # the future is computed as j = i, then set to 0
    a = a.astype(like.dtype)
    return a / (a @ xp.ones((length, 1), like.dtype))


def attention_weights(weighting, q, k, fixed):
    """Return A: [g, H, L, L] for softmax, else [L, L] for all sequences and heads alike.

    q (divided by sqrt(K)) and k [g, H, L, K] are used by softmax alone; fixed [L, L] as from fixed_part.
    """
    return softmax(q @ k.swapaxes(2, 3) + fixed) if weighting == "softmax" else fixed


def softmax(scores):
    """Softmax over the last axis; scores are overwritten. The row's maximum cancels; it keeps exp from overflowing."""
    xp = get_array_module(scores)
    scores -= scores.max(axis=-1, keepdims=True)
    xp.exp(scores, out=scores)
    scores /= (scores @ xp.ones(scores.shape[-1], scores.dtype))[..., None]  # a row sum is fastest as a product
    return scores


def attention(q, k, v, groups, n_heads, weighting, dropout, rng):
    """Mix the values of each sequence's past.

    q, k, v [N, D] packed (q and k are None unless the weighting is softmax), groups as from
    make_groups, dropout: rate on A -> out [N, D], cache: a list with one tuple a group,
    (q / sqrt K, k, v, A, A with dropout, o), q, k, v and o as [g, H, L, K].
    """
    xp = get_array_module(v)
    out = xp.empty_like(v)
    fixed = fixed_part(weighting, max(group.length for group in groups), v)
    cache = []
    for group in groups:
        v_heads = to_heads(v, group, n_heads)  # [g, H, L, K]
        q_heads = k_heads = None
        if weighting == "softmax":
            q_heads = to_heads(q, group, n_heads) * v_heads.shape[-1] ** -0.5  # the 1/sqrt(K) of s
            k_heads = to_heads(k, group, n_heads)
        a = attention_weights(weighting, q_heads, k_heads, fixed[: group.length, : group.length])
        mask = dropout_mask(v_heads.shape[:3] + (group.length,), dropout, rng, v)
        a_dropped = a if mask is None else a * mask  # [g, H, L, L], or [L, L] like a
        o_heads = a_dropped @ v_heads  # [g, H, L, K]
        from_heads(o_heads, group, out)
        cache.append((q_heads, k_heads, v_heads, a, a_dropped, o_heads))
    return out, cache


def attention_backward(d_out, cache, groups, weighting):
    """Return d_q, d_k, d_v [N, D]; d_q and d_k are None unless the weighting is softmax.

    Write M for the dropout mask, a' = A M (elementwise), o = a' v. Then, with d_o = d_out given,
        d_v = a'^T d_o        d_a' = d_o v^T        d_A = d_a' M        [L, L] a head, but d_v [L, K].
    Softmax of one row, S = sum_l exp(s_l): A_j = exp(s_j) / S, so by the quotient rule
        dA_j/ds_l = delta_jl exp(s_j) / S - exp(s_j) exp(s_l) / S^2 = A_j (delta_jl - A_l)
        d_s_l = sum_j d_A_j A_j (delta_jl - A_l) = A_l (d_A_l - r),   r = sum_j d_A_j A_j.
    The mask need not be kept: A d_A = a' d_a' (both are A M d_a'), and (Dao et al. 2022, FlashAttention)
        r = sum_j d_a'_j a'_j = sum_j (d_o . v_j) a'_j = d_o . sum_j a'_j v_j = d_o . o.
    So d_s = a' d_a' - A (d_o . o). Last, s = q k^T / sqrt K: d_q = d_s k / sqrt K, d_k = d_s^T q / sqrt K.
    A row of d_s sums to 0 (sum_l A_l = 1), for what adds the same to all scores of a row, as b_k does
    (q_i . b_k), changes no weight: the gradient of b_k is 0.
    """
    xp = get_array_module(d_out)
    softmax = weighting == "softmax"
    d_q, d_k, d_v = (xp.empty_like(d_out) if wanted else None for wanted in (softmax, softmax, True))
    for group, (q, k, v, a, a_dropped, o) in zip(groups, cache, strict=True):
        d_o = to_heads(d_out, group, v.shape[1])  # [g, H, L, K]
        from_heads(a_dropped.swapaxes(-1, -2) @ d_o, group, d_v)
        if softmax:
            d_scores = d_o @ v.swapaxes(2, 3)  # d_a', [g, H, L, L]
            d_scores *= a_dropped
            d_scores -= a * (d_o * o).sum(axis=-1, keepdims=True)
            from_heads(d_scores @ k * k.shape[-1] ** -0.5, group, d_q)
            from_heads(d_scores.swapaxes(2, 3) @ q, group, d_k)  # q holds the 1/sqrt(K) already
    return d_q, d_k, d_v
