"""The losses, each fused with its gradient: cross-entropy over all items, and two that sample.

Symbols: N tokens, D hidden size, V items, K negatives, c rows in a chunk. The logits [N, V] would be
by far the largest array of a step; they are made in chunks of a few rows that stay in the processor's
cache, used for loss and gradient at once, and overwritten. The whole [N, V] never exists. Where even
V logits a token are too many (a million items), the two sampled losses look at a few items only.
"""

from minirec.backend import chunk_rows, get_array_module, scatter_add

LOSSES = ("ce", "sampled", "bce")


def cross_entropy(x, items, targets, scale, d_items):
    """Loss and gradient of softmax cross-entropy against the next item (no sampling).

    x [N, D] token representations, items [V, D] item embeddings (tied: logits = x items^T),
    targets [N] integers, scale: what each token's loss counts (1/N for a mean).
    Returns the loss (a 0-d array, on the device) and d_x [N, D]; adds to d_items [V, D].

    For one token with target t: z = items x, p_v = exp z_v / sum_u exp z_u, and
        loss = -log p_t = log(sum_v exp z_v) - z_t
        dloss/dz_v = exp z_v / sum_u exp z_u - [v = t] = p_v - [v = t].
    Subtracting the row's maximum m changes neither (it cancels) and keeps exp from overflowing.
    From here z = x items^T is a linear layer without bias (ops.linear_backward): with onehot_v = [v = t],
        d_x = (p - onehot) items,        d_items += (p - onehot)^T x.
    With e = exp(z - m) and s = sum e: p - onehot = (e - s onehot) / s. So s is taken from the one
    entry at t, and the division by s is left for the thin factors, [c, D] instead of [c, V]:
        d_x = ((e - s onehot) items) / s,        d_items += (e - s onehot)^T (x / s).
    """
    xp = get_array_module(x)
    scale = float(scale)  # a NumPy float64 scalar would promote float32 arrays
    rows = chunk_rows(xp, len(items), x.dtype.itemsize)
    d_x, ones = xp.empty_like(x), xp.ones(len(items), x.dtype)
    loss = xp.zeros((), xp.float64)
    for start in range(0, len(x), rows):
        chunk = slice(start, start + rows)
        x_chunk, target = x[chunk], targets[chunk]  # [c, D], [c]
        each = xp.arange(len(target))
        z = x_chunk @ items.T  # [c, V]
        z -= z.max(axis=1, keepdims=True)
        z_target = z[each, target]  # [c]
        xp.exp(z, out=z)
        s = z @ ones  # [c]; a row sum is fastest as a product
        loss += (xp.log(s) - z_target).sum()
        z[each, target] -= s
        thin = (scale / s)[:, None]  # [c, 1]
        d_x[chunk] = z @ items
        d_x[chunk] *= thin
        d_items += z.T @ (x_chunk * thin)
    return loss * scale, d_x


def sampled_cross_entropy(x, items, targets, negatives, scale, d_items):
    """Loss and gradient of softmax cross-entropy over the target and K shared negatives.

    As in Klenitskiy and Vasilev (2023): negatives [K] are drawn once for all tokens, uniformly; where
    one of them is a token's own target, it does not count for that token. Else as cross_entropy, whose
    derivation holds with the target's logit in a column of its own: p - onehot = (e - s onehot) / s.
    """
    xp = get_array_module(x)
    scale = float(scale)
    items_target, items_negative = items[targets], items[negatives]  # [N, D], [K, D]
    z = x @ items_negative.T  # [N, K]
    z = xp.where(targets[:, None] == negatives, -xp.inf, z)  # exp(-inf) = 0
    z_target = (x * items_target).sum(axis=1)  # [N]
    highest = xp.maximum(z.max(axis=1), z_target)
    z -= highest[:, None]
    z_target -= highest
    xp.exp(z, out=z)
    e_target = xp.exp(z_target)
    s = z @ xp.ones(len(negatives), x.dtype) + e_target  # [N]
    loss = (xp.log(s) - z_target).sum(dtype=xp.float64)
    thin = (scale / s)[:, None]  # [N, 1]
    d_target = (e_target - s)[:, None] * thin  # dloss/dz_target, [N, 1]
    d_x = (z @ items_negative) * thin + d_target * items_target
    scatter_add(d_items, negatives, z.T @ (x * thin))
    scatter_add(d_items, targets, d_target * x)
    return loss * scale, d_x


def binary_cross_entropy(x, items, targets, negatives, scale, d_items):
    """Loss and gradient of SASRec's own loss: the target against one negative a position.

    Kang and McAuley (2018), equation 6: loss = -log sigmoid(z_t) - log(1 - sigmoid(z_n)), with
    z_t = x . items_t and z_n = x . items_n; negatives [N]. In a form that cannot overflow,
        -log sigmoid(z) = log(1 + exp(-z)),    its derivative -exp(-z) / (1 + exp(-z)) = sigmoid(z) - 1,
        dloss/dz_t = sigmoid(z_t) - 1,    dloss/dz_n = 1 - sigmoid(-z_n) = sigmoid(z_n).
    Else as cross_entropy.
    """
    xp = get_array_module(x)
    scale = float(scale)
    loss, d_x = xp.zeros((), xp.float64), xp.zeros_like(x)
    for index, sign in ((targets, 1), (negatives, -1)):  # -log(1 - sigmoid(z)) = -log sigmoid(-z)
        rows = items[index]  # [N, D]
        z = sign * (x * rows).sum(axis=1)
        loss += xp.logaddexp(0, -z).sum(dtype=xp.float64)
        d_z = (-sign * scale * 0.5 * (1 - xp.tanh(z / 2)))[:, None]  # sigmoid(z) = (1 + tanh(z/2)) / 2
        d_x += d_z * rows
        scatter_add(d_items, index, d_z * x)
    return loss * scale, d_x
