"""Causal multi-head attention and its backward. The weights A are the one thing that the study changes.

Symbols: B sequences of a bucket, all of L positions; N tokens, D hidden size, H heads, K = D/H; i a position that
looks (query), j one that is looked at (key). d_A stands for dLoss/dA, and so on. A * M is elementwise, A v a product.

Position i asks with its query q_i, position j answers with its key k_j. The better the two match, the more of the
value v_j goes to position i. All three are linear in the block's input (model.py). Only j <= i counts: position i is to
predict item i + 1 and must not see it. Each head does this on K columns of its own.

    s_ij    = q_i . k_j / sqrt(K)                         how well j's key answers i's query
    A_ij    = exp(s_ij) / sum_{l <= i} exp(s_il)          softmax: positive, each row sums to 1; 0 for j > i
    mixed_i = sum_j A_ij M_ij v_j                         M: the dropout mask

Why 1/sqrt(K): let the entries of q and k be independent, with mean 0 and variance 1. A product of two of them then
has variance 1, and the sum of K such products has variance K. Divided by sqrt(K), s has variance 1 whatever K is.
Without it, scores would grow like sqrt(K), and softmax would put nearly all weight on one position. Its derivatives,
A_j (delta_jl - A_l) below, would then be near 0, and queries and keys would hardly learn.

The fixed weightings put a constant matrix in the place of the softmax. For three positions:

    uniform   1    0    0        identity   1    0    0        recency   1    0    0
             1/2  1/2   0                   0    1    0                 1/3  2/3   0
             1/3  1/3  1/3                  0    0    1                 2/11 3/11 6/11

Queries and keys then reach no output, so the gradients of W_q, b_q, W_k and b_k are 0. Adam never moves them, because
its step is 0 where every gradient was 0.
"""

from typing import NamedTuple

from minirec.backend import get_array_module, matmul, row_sum
from minirec.gpu import fused
from minirec.ops import dropout_mask
from minirec.packing import from_heads, to_heads

# The fixed weightings: what A_ij is proportional to, with i the query's position and j <= i the key's. Each row is then
# divided by its sum. Every list of weightings comes from here, so a new one is one more line. (plain.py, which stands
# alone, repeats these three.)
FIXED = {
    "uniform": lambda i, j: 1,  # A_ij = 1/(i + 1): a plain average of the past
    "identity": lambda i, j: i == j,  # A_ii = 1: no mixing
    "recency": lambda i, j: 1 / (1 + i - j),  # the more recent, the more weight
}


def known_weightings():
    """Return the names that a block's weighting can have: softmax, and those of FIXED."""
    return ("softmax", *FIXED)


@fused
def fixed_weights(weighting, length, like):
    """Return A of a weighting of FIXED, [L, L]: the same for all sequences and heads.

    Shorter sequences use its upper left corner. `like`: an array of the library and dtype that A is to have.
    """
    xp = get_array_module(like)
    position = xp.arange(length, dtype=like.dtype)
    i, j = position[:, None], position[None, :]
    a = FIXED[weighting](i, xp.minimum(i, j)) * (j <= i)  # no formula sees j > i, where 1 + i - j can be 0
    a = a.astype(like.dtype)
    return a / row_sum(a)


@fused
def causal_mask(length, like):
    """Return what hides the future from softmax, [L, L]: 0 for j <= i, -inf for j > i, since exp(-inf) = 0."""
    xp = get_array_module(like)
    return xp.triu(xp.full((length, length), -xp.inf, like.dtype), 1)


@fused
def softmax(scores, mask):
    """Softmax over the last axis of scores [B, H, L, L] + mask [L, L]; scores are overwritten.

    The row's maximum cancels between numerator and denominator. Taking it off keeps exp from overflowing.
    """
    scores += mask
    scores -= scores.max(axis=-1, keepdims=True)
    weights = get_array_module(scores).exp(scores, out=scores)
    weights /= row_sum(weights)
    return weights


@fused
def softmax_backward(d_dropped, weights, dropped, d_mixed, mixed):
    """Return d_s from d_A', A, A', d_mixed and mixed (see attention_backward, 3); d_A' is overwritten."""
    d_dropped *= dropped
    d_dropped -= weights * row_sum(d_mixed * mixed)
    return d_dropped


class AttentionCache(NamedTuple):
    """What one bucket's attention leaves for its backward, and for whoever wants to look at A."""

    q: object  # [B, H, L, K], divided by sqrt(K); None where the weighting is fixed
    k: object  # [B, H, L, K]; None where the weighting is fixed
    v: object  # [B, H, L, K]
    weights: object  # A: [B, H, L, L] of softmax, [L, L] of a fixed weighting
    weights_dropped: object  # A * M, [B, H, L, L]; A itself without dropout
    mixed: object  # [B, H, L, K]


def attention(q, k, v, buckets, n_heads, weighting, dropout, rng):
    """Mix the values of each sequence's past: mixed_i = sum_j A_ij M_ij v_j.

    q, k, v [N, D] packed (q and k None where the weighting is fixed); buckets: of packing.make_buckets; weighting:
    "softmax" or one of FIXED; dropout: its rate on A; rng None = no dropout.
    Returns mixed [N, D], all heads side by side, and a list of one AttentionCache a bucket.
    """
    longest = max(bucket.length for bucket in buckets)
    constant = causal_mask(longest, v) if weighting == "softmax" else fixed_weights(weighting, longest, v)
    out, caches = get_array_module(v).empty_like(v), []
    for bucket in buckets:
        v_heads = to_heads(v, bucket, n_heads)  # [B, H, L, K]
        corner = constant[: bucket.length, : bucket.length]  # [L, L]
        q_heads = k_heads = None
        if weighting == "softmax":
            q_heads = to_heads(q, bucket, n_heads) * v_heads.shape[-1] ** -0.5  # the 1/sqrt(K) of s
            k_heads = to_heads(k, bucket, n_heads)
            weights = softmax(matmul(q_heads, k_heads.swapaxes(2, 3)), corner)  # A, [B, H, L, L]
        else:
            weights = corner  # A, [L, L]
        mask = dropout_mask(v_heads.shape[:3] + (bucket.length,), dropout, rng, v)
        weights_dropped = weights if mask is None else weights * mask  # [B, H, L, L], or A's shape without a mask
        mixed = matmul(weights_dropped, v_heads)  # [B, H, L, K]
        from_heads(mixed, bucket, out)
        caches.append(AttentionCache(q_heads, k_heads, v_heads, weights, weights_dropped, mixed))
    return out, caches


def attention_backward(d_mixed, caches, buckets, weighting):
    """Return d_q, d_k, d_v [N, D], with d_mixed [N, D]; d_q and d_k are None where the weighting is fixed.

    One sequence, one head: q, k, v, mixed and their gradients are [L, K], A, M, s and theirs [L, L], r is [L].

    1. Without dropout. mixed = A v is linear in A and in v (ops.linear_backward):
           d_A = d_mixed v^T        d_v = A^T d_mixed
       One row of the softmax, S = sum_l exp(s_l): A_j = exp(s_j) / S. By the quotient rule
           dA_j/ds_l = delta_jl exp(s_j) / S - exp(s_j) exp(s_l) / S^2 = A_j (delta_jl - A_l)
           d_s_l = sum_j d_A_j dA_j/ds_l = d_A_l A_l - A_l sum_j d_A_j A_j
                 = A_l (d_A_l - r),        r = sum_j d_A_j A_j, one number a row
       This is 0 for l > i, where A_l is 0: the backward needs no mask of the future.
       s = q k^T / sqrt(K) is a product again:
           d_q = d_s k / sqrt(K)        d_k = d_s^T q / sqrt(K), the transpose of d(k^T) = q^T d_s / sqrt(K)

    2. With dropout. mixed = A' v with A' = A * M. Then v meets A', and A is reached through the mask:
           d_v = A'^T d_mixed        d_A' = d_mixed v^T        d_A = d_A' * M
       and d_s, r, d_q, d_k are as in 1.

    3. In the form that the code uses (Dao et al. 2022, FlashAttention). A * d_A = A * M * d_A' = A' * d_A', so M is not
       needed, and
           r = sum_j A'_j d_A'_j = sum_j A'_j (d_mixed . v_j) = d_mixed . sum_j A'_j v_j = d_mixed . mixed
       row by row: a sum over K numbers instead of L. With each row of A multiplied by its own r,
           d_s = A * d_A - A r = A' * d_A' - A (d_mixed . mixed)

    A row of d_s sums to 0, because sum_l A_l = 1. What adds the same to all scores of a row changes no weight.
    b_k does just that (q_i . b_k is the same for all j), so its gradient is 0.
    """
    learned = weighting == "softmax"
    empty_like = get_array_module(d_mixed).empty_like
    d_q, d_k = (empty_like(d_mixed), empty_like(d_mixed)) if learned else (None, None)
    d_v = empty_like(d_mixed)
    for bucket, cache in zip(buckets, caches, strict=True):
        q, k, v, weights, weights_dropped, mixed = cache
        d_heads = to_heads(d_mixed, bucket, v.shape[1])  # [B, H, L, K]
        from_heads(matmul(weights_dropped.swapaxes(-1, -2), d_heads), bucket, d_v)
        if learned:
            d_dropped = matmul(d_heads, v.swapaxes(2, 3))  # d_A', [B, H, L, L]
            d_scores = softmax_backward(d_dropped, weights, weights_dropped, d_heads, mixed)
            from_heads(matmul(d_scores, k) * k.shape[-1] ** -0.5, bucket, d_q)
            from_heads(matmul(d_scores.swapaxes(2, 3), q), bucket, d_k)  # q holds the 1/sqrt(K) already
    return d_q, d_k, d_v
