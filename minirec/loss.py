"""Cross-entropy over all items, fused with its gradient.

Symbols: N tokens, D hidden size, V items, c rows in a chunk. The logits [N, V] would be by far the
largest array of a step; they are made in chunks of a few rows that stay in the processor's cache,
used for loss and gradient at once, and overwritten. The whole [N, V] never exists.
"""

from minirec.backend import get_array_module, plan


def cross_entropy(x, items, targets, scale, d_items):
    """Loss and gradient of softmax cross-entropy against the next item (no sampling).

    x [N, D] token representations, items [V, D] item embeddings (tied: logits = x items^T),
    targets [N] integers, scale: what each token's loss counts (1/N for a mean).
    Returns the loss (a 0-d array, on the device) and d_x [N, D]; adds to d_items [V, D].

    For one token with target t: z = items x, loss = log(sum_v exp z_v) - z_t, so
        dloss/dz_v = exp z_v / sum exp z - [v = t] = p_v - [v = t].
    Subtracting the row's maximum m changes neither (it cancels) and keeps exp from overflowing.
    With e = exp(z - m) and s = sum e: p - onehot = (e - s onehot) / s, so s is taken from the one
    entry at t and the division by s is left for the thin factors, [c, D] instead of [c, V]:
        d_x = (p - onehot) items = ((e - s onehot) items) / s
        d_items += (p - onehot)^T x = (e - s onehot)^T (x / s).
    """
    xp = get_array_module(x)
    scale = float(scale)  # a NumPy float64 scalar would promote float32 arrays
    rows = max(16, plan(xp).loss_bytes // (len(items) * x.dtype.itemsize))
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
