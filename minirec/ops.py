"""Forward and backward of the token-wise operations: embedding, linear, relu, dropout, layer norm.

Symbols: N tokens (all positions of a batch, packed, no padding), D hidden size, V items; M columns of a result.
The forward computes y = f(x). In the backward, d_y means dLoss/dy; it has y's shape.
In derivations [i = j], also delta_ij, is 1 if i = j, otherwise 0.

Each f(...) returns (out, cache), and f_backward(d_out, cache, ...), right below it, returns d_x (that of embedding
returns nothing: an index has no gradient). `xp` is NumPy, or CuPy on a GPU (backend.py). Gradients of
parameters are ADDED to the arrays that are passed in (d_w, d_b, ...): a parameter that is used twice, or by several
micro-batches, gets the sum of its gradients, as the chain rule asks.
"""

import math
from typing import NamedTuple

from minirec.backend import column_sum, get_array_module, matmul, random_uint16, row_mean, scatter_add
from minirec.gpu import fused

LAYER_NORM_EPS = 1e-8


def embedding(table, index):
    """Look up rows: out[n] = table[index[n]].

    table [V, D], index [N] integers in 0..V-1 -> out [N, D], cache (index).
    """
    return table[index], index


def embedding_backward(d_out, index, d_table):
    """Add to d_table [V, D], with d_out [N, D]: the gradient of a row goes to the row that was looked up.

    out_nd = sum_v [index_n = v] table_vd, a product with one-hot rows, so
        dLoss/dtable_vd = sum_n [index_n = v] dLoss/dout_nd        all uses of row v add up
    """
    scatter_add(d_table, index, d_out)


class LinearCache(NamedTuple):
    """What linear_backward needs of the forward."""

    x: object  # [N, D]
    w: object  # [D, M]


def linear(x, w, b):
    """out = x w + b.

    x [N, D], w [D, M], b [M] -> out [N, M], LinearCache.
    """
    out = matmul(x, w)  # [N, M]
    out += b
    return out, LinearCache(x, w)


@fused
def linear_backward(d_out, cache, d_w, d_b):
    """Return d_x [N, D], with d_out [N, M]; add to d_w [D, M] and d_b [M].

    out_nm = sum_d x_nd w_dm + b_m. The chain rule sums over every output that an input reaches:
        dLoss/dx_nd = sum_m dLoss/dout_nm w_dm        ->  d_x = d_out w^T
        dLoss/dw_dm = sum_n x_nd dLoss/dout_nm        ->  d_w = x^T d_out
        dLoss/db_m  = sum_n dLoss/dout_nm             ->  d_b = the sum of d_out's rows
    """
    d_w += cache.x.T @ d_out
    d_b += column_sum(d_out)
    return d_out @ cache.w.T


def relu(x):
    """out = max(x, 0), elementwise -> out, cache (out)."""
    out = get_array_module(x).maximum(x, 0)
    return out, out


def relu_backward(d_out, out):
    """Return d_x: d_out where x > 0, that is where out > 0, and 0 elsewhere. (At x = 0 the slope is taken as 0.)"""
    return d_out * (out > 0)


@fused
def dropout_mask(shape, rate, rng, like):
    """Draw a mask that is 0 with probability `rate` (rounded to n/65536), otherwise a constant; its mean is 1.

    Library (NumPy or CuPy) and dtype are those of the array `like`. The draws do not depend on the dtype, so that
    checks in float64 see the masks of training in float32. Returns None where nothing is dropped (rng None or rate 0).
    """
    if rng is None or rate == 0:
        return None
    xp = get_array_module(like)
    threshold = min(round(rate * 65536), 65535)  # 16 random bits take a third of the time of a random float
    keep = random_uint16(rng, math.prod(shape), xp).reshape(shape) >= threshold
    return xp.multiply(keep, 65536 / (65536 - threshold), dtype=like.dtype)


@fused
def dropout(x, rate, rng):
    """Inverted dropout (Srivastava et al. 2014): out = x * mask -> out, cache (the mask or None).

    What is kept is divided by 1 - rate. So the mean of out is that of x, and inference needs no rescaling.
    """
    mask = dropout_mask(x.shape, rate, rng, x)
    return (x if mask is None else x * mask), mask


def dropout_backward(d_out, mask):
    """Return d_x = d_out * mask."""
    return d_out if mask is None else d_out * mask


class LayerNormCache(NamedTuple):
    """What layer_norm_backward needs of the forward, and decompose.py too."""

    normed: object  # [N, D] (x - mean) / sigma
    sigma: object  # [N, 1]
    gamma: object  # [D]


@fused
def layer_norm(x, gamma, beta):
    """Layer norm (Ba et al. 2016): out = gamma (x - mean) / sigma + beta, over each row.

    x [N, D], gamma [D], beta [D] -> out [N, D], LayerNormCache.
    sigma = sqrt(variance + 1e-8). The variance takes two passes, so it stays accurate where mean >> deviation.
    """
    xp = get_array_module(x)
    centred = x - row_mean(x)  # [N, D]
    sigma = xp.sqrt(row_mean(centred * centred) + LAYER_NORM_EPS)  # [N, 1]
    normed = centred  # in place: centred itself is not needed any more
    normed /= sigma
    out = normed * gamma
    out += beta
    return out, LayerNormCache(normed, sigma, gamma)


@fused
def layer_norm_backward(d_out, cache, d_gamma, d_beta):
    """Return d_x [N, D], with d_out [N, D]; add to d_gamma [D] and d_beta [D].

    One row: m its mean, s its sigma, n = (x - m)/s, out = gamma n + beta, and e = dLoss/dn = gamma d_out.
    Every x_k moves m and s, and these move every n_i:
        dm/dx_k = 1/D
        s^2 = sum_i (x_i - m)^2 / D + eps, so 2 s ds/dx_k = 2/D sum_i (x_i - m)(delta_ik - 1/D)
            = 2/D (x_k - m), for sum_i (x_i - m) = 0; hence ds/dx_k = n_k / D
        dn_i/dx_k = (delta_ik - 1/D)/s - (x_i - m)/s^2 * n_k/D        by the quotient rule
                  = (delta_ik - 1/D - n_i n_k / D) / s
        d_x_k = sum_i e_i dn_i/dx_k = (e_k - mean(e) - n_k mean(e n)) / s
    In words: e minus its mean, minus its part along n, all divided by s. These two parts of e are lost, because n does
    not change when a row is shifted or stretched (except through eps). gamma and beta serve all rows, so
        d_gamma = sum over rows of d_out n        d_beta = sum over rows of d_out
    """
    normed, sigma, gamma = cache
    d_gamma += column_sum(d_out * normed)
    d_beta += column_sum(d_out)
    d_normed = d_out * gamma  # e, [N, D]
    d_x = d_normed - row_mean(d_normed)
    d_x -= normed * row_mean(d_normed * normed)
    d_x /= sigma
    return d_x
