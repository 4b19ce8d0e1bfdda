"""The losses, each fused with its gradient: cross-entropy over all items, and two that sample.

Symbols: N tokens, D hidden size, V items, n negatives, c rows of a chunk. The logits [N, V] would be by far the
largest array of a step. They are made in chunks of a few rows that stay in the processor's cache, used for loss and
gradient at once, and overwritten. The whole [N, V] never exists. If even V logits per token are too many (a
million items), the two sampled losses look at a few items only.
"""

from minirec.backend import get_array_module, row_sum, scatter_add
from minirec.gpu import fused
from minirec.packing import chunk_rows

LOSSES = ("ce", "sampled", "bce")


@fused
def cross_entropy(x, items, targets, scale, d_items):
    """Loss and gradient of softmax cross-entropy against the next item (no sampling).

    x [N, D] token representations, items [V, D] item embeddings (tied: logits = x items^T), targets [N] integers,
    scale: the weight of each token's loss (1/N for a mean); it multiplies the loss and every gradient.
    Returns the loss (a 0-d array, on the device) and d_x [N, D]; adds to d_items [V, D].

    Take one token x with target t. Its logits are z = x items^T, and its probabilities p_v = exp z_v / sum_u exp z_u.
        loss = -log p_t = log(sum_v exp z_v) - z_t
        dloss/dz_v = exp z_v / sum_u exp z_u - [v = t] = p_v - [v = t]
    z is a linear layer without bias (ops.linear_backward), so with onehot_v = [v = t]
        d_x = (p - onehot) items        d_items += (p - onehot)^T x
    Let m be the largest logit, e = exp(z - m), which cannot overflow, and s = sum_v e_v. The m cancels:
        loss = log s - (z_t - m)        p - onehot = (e - s onehot) / s
    In this form only the one entry at t has to change, and the division by s is left to arrays [c, D], which are
    smaller than [c, V]:
        d_x = ((e - s onehot) items) / s        d_items += (e - s onehot)^T (x / s)
    """
    xp = get_array_module(x)
    scale = float(scale)  # a NumPy float64 scalar would promote float32 arrays
    rows = chunk_rows(xp, len(items), x.dtype.itemsize)
    d_x = xp.empty_like(x)
    loss = xp.zeros((), xp.float64)
    for start in range(0, len(x), rows):
        chunk = slice(start, start + rows)
        x_chunk, target = x[chunk], targets[chunk]  # [c, D], [c]
        row = xp.arange(len(target))
        logits = x_chunk @ items.T  # [c, V]; e and weight, below, are written over it
        logits -= logits.max(axis=1, keepdims=True)
        logits_target = logits[row, target]  # [c]
        e = xp.exp(logits, out=logits)
        s = row_sum(e)  # [c, 1]
        loss += (xp.log(s[:, 0]) - logits_target).sum()
        weight = e  # becomes e - s onehot, in place
        weight[row, target] -= s[:, 0]
        scale_over_s = scale / s  # [c, 1]
        d_x[chunk] = weight @ items
        d_x[chunk] *= scale_over_s
        d_items += weight.T @ (x_chunk * scale_over_s)
    return loss * scale, d_x


def sampled_cross_entropy(x, items, targets, negatives, scale, d_items):
    """Loss and gradient of softmax cross-entropy over the target and n shared negatives.

    After Klenitskiy and Vasilev (2023). Here negatives [n] are drawn once for all tokens, uniformly. Where one of them
    is a token's own target, it does not count for that token. Otherwise as cross_entropy, whose derivation holds with
    the target's logit in a column of its own: p - onehot = (e - s onehot) / s.

    This loss is biased: where the full sum has V - 1 terms beside the target's, s has about n, so the target looks
    more probable than it is. A draw is item v with probability 1/V, so adding log(V/n) to the negatives' logits would
    make the expectation of s the full sum (Bengio and Senecal 2008). The expectation of log s would still be slightly
    wrong. We leave it out, because we want the ranking of the items, not their probabilities.
    """
    xp = get_array_module(x)
    scale = float(scale)
    items_target, items_negative = items[targets], items[negatives]  # [N, D], [n, D]
    logits = x @ items_negative.T  # [N, n]
    logits = xp.where(targets[:, None] == negatives, -xp.inf, logits)  # exp(-inf) = 0
    logits_target = row_sum(x * items_target)  # [N, 1]
    highest = xp.maximum(logits.max(axis=1, keepdims=True), logits_target)
    logits -= highest
    logits_target -= highest
    e, e_target = xp.exp(logits, out=logits), xp.exp(logits_target)
    s = row_sum(e) + e_target  # [N, 1]
    loss = (xp.log(s) - logits_target).sum(dtype=xp.float64)
    scale_over_s = scale / s  # [N, 1]
    d_logits_target = (e_target - s) * scale_over_s  # [N, 1]
    d_x = (e @ items_negative) * scale_over_s + d_logits_target * items_target
    scatter_add(d_items, negatives, e.T @ (x * scale_over_s))
    scatter_add(d_items, targets, d_logits_target * x)
    return loss * scale, d_x


def binary_cross_entropy(x, items, targets, negatives, scale, d_items):
    """Loss and gradient of SASRec's own loss: the target against one negative a position.

    Kang and McAuley (2018): loss = -log sigmoid(logit of the target) - log(1 - sigmoid(logit of the negative)), with
    negatives [N]. As 1 - sigmoid(y) = sigmoid(-y), both terms are -log sigmoid(z), with z = sign * logit and sign 1 for
    the target, -1 for the negative:
        -log sigmoid(z) = log(1 + exp(-z)), computed by logaddexp(0, -z), which cannot overflow
        its derivative by z is -exp(-z) / (1 + exp(-z)) = -(1 - sigmoid(z))
        dloss/dlogit = -sign (1 - sigmoid(z)), since dz/dlogit = sign
    Otherwise as cross_entropy.
    """
    xp = get_array_module(x)
    scale = float(scale)
    loss, d_x = xp.zeros((), xp.float64), xp.zeros_like(x)
    for index, sign in ((targets, 1), (negatives, -1)):
        rows = items[index]  # [N, D]
        z = sign * row_sum(x * rows)  # [N, 1]
        loss += xp.logaddexp(0, -z).sum(dtype=xp.float64)
        d_logit = -sign * scale * 0.5 * (1 - xp.tanh(z / 2))  # sigmoid(z) = (1 + tanh(z/2)) / 2
        d_x += d_logit * rows
        scatter_add(d_items, index, d_logit * x)
    return loss * scale, d_x
