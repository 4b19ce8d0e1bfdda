"""The whole model in one file: one sequence, one block, one head at a time. Read this first.

SASRec (Kang and McAuley 2018) reads a user's items, oldest first, and predicts at each position the item that comes
next. Everything is here: forward, loss, backward, Adam, a training loop, an evaluation. The other files compute the
same thing faster. They also derive the formulas that this file only states. The tests hold them equal to this one.

Symbols: L positions of one sequence, D hidden size, H heads, K = D/H, V items; LN layer norm; i a position that looks
back, j <= i one that is looked at. @ multiplies matrices, * entries. d_y is the gradient dLoss/dy: an array of y's
shape that says how fast the loss grows with each entry of y. If f computes y from x, f_backward computes d_x from d_y.

    x      = LN(E[item] sqrt(D) + P[position])              E [V, D] items, P positions, its first L rows
    block: A_h   = softmax over j <= i of q_i . k_j / sqrt(K)   q, k, v = x W + b; head h has K columns of each
           mixed = concat_h(A_h v_h)                        the only step at which positions meet
           o     = mixed W_o + b_o
           y     = LN(x + o)
           x     = LN(y + relu(y W_1 + b_1) W_2 + b_2)
    logits = x E^T                                          loss = -log softmax(logits)[next item]

In training, dropout masks multiply A, o, the outputs of both feed-forward layers, and the sum E[item] sqrt(D) +
P[position] (`draw_masks`). Three things differ from the original: W_o joins the heads, LN comes after each sum, and the
loss is over all items. The study puts a fixed matrix in the place of A (`attention_weights`) and changes nothing else.

    python -m minirec.plain         trains learned and uniform attention on a small dataset, in a few minutes
"""

import time

import numpy as np


def init_parameters(n_items, d=64, n_blocks=2, max_length=50, seed=0):
    """Return the parameters, {name: array}: gamma 1, biases and beta 0, matrices random with mean 0.

    W_q, W_k, W_v are Xavier-uniform, as parts of one matrix [D, 3D]; all others normal with standard deviation 0.02.
    Names, shapes and values are those of the fast model (parameters.py). Gradients have the same names.
    """
    rng, bound = np.random.default_rng(seed), np.sqrt(6 / (4 * d))
    normal = lambda *shape: rng.normal(0, 0.02, shape)
    p = {"item_embedding": normal(n_items, d), "position_embedding": normal(max_length, d)}
    p |= {"embedding_norm.gamma": np.ones(d), "embedding_norm.beta": np.zeros(d)}
    for name in (f"blocks.{i}" for i in range(n_blocks)):
        p |= {f"{name}.attention.w_{n}": rng.uniform(-bound, bound, (d, d)) for n in "qkv"}
        p |= {f"{name}.attention.w_o": normal(d, d)}
        p |= {f"{name}.attention.b_{n}": np.zeros(d) for n in "qkvo"}
        p |= {f"{name}.attention_norm.gamma": np.ones(d), f"{name}.attention_norm.beta": np.zeros(d)}
        for n in "12":
            p |= {f"{name}.ffn.w_{n}": normal(d, d), f"{name}.ffn.b_{n}": np.zeros(d)}
        p |= {f"{name}.ffn_norm.gamma": np.ones(d), f"{name}.ffn_norm.beta": np.zeros(d)}
    return p


def layer_norm(x, p, name):
    """Give each row mean 0 and deviation 1, then a learned scale and shift: x [L, D] -> out [L, D] and a cache."""
    centred = x - x.mean(axis=1, keepdims=True)  # [L, D]
    sigma = np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-8)  # [L, 1]
    normed = centred / sigma  # [L, D]
    return normed * p[f"{name}.gamma"] + p[f"{name}.beta"], (normed, sigma)


def layer_norm_backward(d_out, cache, p, g, name):
    """Return d_x [L, D]; add to the gradients g of gamma and beta. Derived in ops.py."""
    normed, sigma = cache
    g[f"{name}.gamma"] += (d_out * normed).sum(axis=0)
    g[f"{name}.beta"] += d_out.sum(axis=0)
    e = d_out * p[f"{name}.gamma"]  # [L, D]
    return (e - e.mean(axis=1, keepdims=True) - normed * (e * normed).mean(axis=1, keepdims=True)) / sigma


def linear(x, p, name, n):
    """y = x W_n + b_n: x [L, D] -> y [L, D]. W_n [D, D] and b_n [D] are called name.w_n and name.b_n in p."""
    return x @ p[f"{name}.w_{n}"] + p[f"{name}.b_{n}"]


def linear_backward(d_y, x, p, g, name, n):
    """Return d_x = d_y W_n^T; add x^T d_y to the gradient of W_n, and the sum of d_y's rows to that of b_n."""
    g[f"{name}.w_{n}"] += x.T @ d_y
    g[f"{name}.b_{n}"] += d_y.sum(axis=0)
    return d_y @ p[f"{name}.w_{n}"].T


def attention_weights(attn, q, k):
    """Return A [L, L] of one head: how much position i takes from j <= i. Each row sums to 1. q, k [L, K]."""
    length, width = q.shape
    i, j = np.arange(length)[:, None], np.arange(length)[None, :]
    if attn == "softmax":
        scores = np.where(j <= i, q @ k.T / np.sqrt(width), -np.inf)  # [L, L]
        a = np.exp(scores - scores.max(axis=1, keepdims=True))  # the maximum cancels; exp cannot overflow
    else:
        a = np.where(j <= i, {"uniform": 1.0, "identity": i == j, "recency": 1 / (1 + abs(i - j))}[attn], 0.0)
    return a / a.sum(axis=1, keepdims=True)


def attention_backward(attn, d_mixed, q, k, v, a, mask):
    """Return d_q, d_k, d_v [L, K] of one head, mixed = (A * mask) @ v. Derived in attention.py."""
    d_v = (a * mask).T @ d_mixed
    if attn != "softmax":
        return np.zeros_like(q), np.zeros_like(k), d_v  # A is fixed: nothing goes back through it
    d_a = (d_mixed @ v.T) * mask  # [L, L]
    d_scores = a * (d_a - (d_a * a).sum(axis=1, keepdims=True))  # [L, L]
    d_products = d_scores / np.sqrt(q.shape[1])  # of q k^T
    return d_products @ k, d_products.T @ q, d_v


def block(x, p, name, n_heads, attn, masks):
    """One transformer block: x [L, D] -> out [L, D] and a cache. name: "blocks.0", with which its parameters begin."""
    q, k, v = (linear(x, p, f"{name}.attention", n) for n in "qkv")  # [L, D] each
    mixed, a = np.zeros_like(x), []
    for h, c in enumerate(np.split(np.arange(x.shape[1]), n_heads)):  # c: the K columns of head h
        a.append(attention_weights(attn, q[:, c], k[:, c]))  # [L, L]
        mixed[:, c] = (a[h] * masks.get(f"{name}.attention.{h}", 1)) @ v[:, c]  # these columns: [L, K]
    o = linear(mixed, p, f"{name}.attention", "o") * masks.get(f"{name}.o", 1)  # [L, D]
    y, norm_y = layer_norm(x + o, p, f"{name}.attention_norm")
    u = linear(y, p, f"{name}.ffn", "1") * masks.get(f"{name}.ffn_1", 1)  # [L, D]
    f = linear(np.maximum(u, 0), p, f"{name}.ffn", "2") * masks.get(f"{name}.ffn_2", 1)  # [L, D]
    out, norm_out = layer_norm(y + f, p, f"{name}.ffn_norm")
    cache = {"x": x, "q": q, "k": k, "v": v, "a": a, "mixed": mixed, "y": y, "u": u}
    return out, cache | {"norm_y": norm_y, "norm_out": norm_out}


def block_backward(d_out, cache, p, g, name, n_heads, attn, masks):
    """Return d_x [L, D]: the lines of `block` from the last to the first. All d_ are [L, D].

    A sum passes its gradient on to both summands. What is used twice gets the sum of what comes back.
    """
    x, q, k, v, y, u = (cache[key] for key in ("x", "q", "k", "v", "y", "u"))
    d_sum = layer_norm_backward(d_out, cache["norm_out"], p, g, f"{name}.ffn_norm")  # of y + f, so of y and of f
    d_f = d_sum * masks.get(f"{name}.ffn_2", 1)
    d_relu = linear_backward(d_f, np.maximum(u, 0), p, g, f"{name}.ffn", "2")
    d_u = d_relu * (u > 0) * masks.get(f"{name}.ffn_1", 1)
    d_y = d_sum + linear_backward(d_u, y, p, g, f"{name}.ffn", "1")
    d_x = layer_norm_backward(d_y, cache["norm_y"], p, g, f"{name}.attention_norm")  # of x + o, so of x and of o
    d_o = d_x * masks.get(f"{name}.o", 1)
    d_mixed = linear_backward(d_o, cache["mixed"], p, g, f"{name}.attention", "o")
    d_q, d_k, d_v = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for h, c in enumerate(np.split(np.arange(x.shape[1]), n_heads)):
        head = d_mixed[:, c], q[:, c], k[:, c], v[:, c], cache["a"][h], masks.get(f"{name}.attention.{h}", 1)
        d_q[:, c], d_k[:, c], d_v[:, c] = attention_backward(attn, *head)
    for d_n, n in zip((d_q, d_k, d_v), "qkv", strict=True):
        d_x = d_x + linear_backward(d_n, x, p, g, f"{name}.attention", n)
    return d_x


def forward(items, p, n_heads, attn, masks=None):
    """Represent every position of one sequence: items [L] -> x [L, D], and the caches of embedding norm and blocks.

    attn: the weighting of each block. masks: {name: array}, 0 for what is dropped, else 1/(1 - rate); none: all kept.
    """
    masks, blocks, d = masks or {}, [], p["item_embedding"].shape[1]
    x = p["item_embedding"][items] * np.sqrt(d) + p["position_embedding"][: len(items)]  # [L, D]
    x, norm = layer_norm(x * masks.get("embedding", 1), p, "embedding_norm")
    for i, weighting in enumerate(attn):
        x, cache = block(x, p, f"blocks.{i}", n_heads, weighting, masks)
        blocks.append(cache)
    return x, {"norm": norm, "blocks": blocks}


def backward(d_x, items, cache, p, g, n_heads, attn, masks):
    """Add the gradients of all parameters to g, with d_x [L, D]: forward's lines from the last to the first."""
    for i, weighting in reversed(list(enumerate(attn))):
        d_x = block_backward(d_x, cache["blocks"][i], p, g, f"blocks.{i}", n_heads, weighting, masks)
    d_x = layer_norm_backward(d_x, cache["norm"], p, g, "embedding_norm") * masks.get("embedding", 1)
    g["position_embedding"][: len(items)] += d_x
    np.add.at(g["item_embedding"], items, d_x * np.sqrt(d_x.shape[1]))  # an item can occur twice


def loss_and_gradients(sequences, p, n_heads, attn, masks=None):
    """Return the mean of -log(probability of the next item) over all positions of all sequences, and {name: gradient}.

    sequences: a list of integer arrays, oldest item first. Of each, the last max_length + 1 items count: inputs are
    s[:-1] and targets s[1:] of these. masks: one dict for each sequence (see forward).
    """
    items_table = p["item_embedding"]
    sequences = [latest(s, p, 1) for s in sequences]
    n_positions = sum(len(s) - 1 for s in sequences)
    loss, g = 0.0, {name: np.zeros_like(value) for name, value in p.items()}
    for s, mask in zip(sequences, masks or [{}] * len(sequences), strict=True):
        items, targets = s[:-1], s[1:]
        x, cache = forward(items, p, n_heads, attn, mask)
        logits = x @ items_table.T  # [L, V]
        e = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = e / e.sum(axis=1, keepdims=True)  # [L, V]
        row = np.arange(len(items))
        loss -= np.log(probabilities[row, targets]).sum() / n_positions
        d_logits = probabilities  # dloss/dlogits = probabilities - onehot(target), derived in loss.py
        d_logits[row, targets] -= 1
        d_logits /= n_positions
        g["item_embedding"] += d_logits.T @ x  # E at the output; backward adds E's gradient at the input
        backward(d_logits @ items_table, items, cache, p, g, n_heads, attn, mask)
    return loss, g


def latest(s, p, more=0):
    """Return the last max_length + more items of a sequence."""
    return s[-len(p["position_embedding"]) - more :]


def draw_masks(length, d, n_heads, n_blocks, rate, rng):
    """Return the dropout masks of one sequence, as forward takes them."""
    shapes = {"embedding": (length, d)}
    for i in range(n_blocks):
        shapes |= {f"blocks.{i}.{n}": (length, d) for n in ("o", "ffn_1", "ffn_2")}
        shapes |= {f"blocks.{i}.attention.{h}": (length, length) for h in range(n_heads)}
    return {name: (rng.random(shape) >= rate) / (1 - rate) for name, shape in shapes.items()}


def adam_step(p, g, m, v, step, lr=1e-3):
    """Move every parameter against its gradient (Adam, Kingma and Ba 2015; step counts from 1). See optimizer.py."""
    for name in p:
        m[name] += (1 - 0.9) * (g[name] - m[name])
        v[name] += (1 - 0.999) * (g[name] ** 2 - v[name])
        p[name] -= lr * (m[name] / (1 - 0.9**step)) / (np.sqrt(v[name] / (1 - 0.999**step)) + 1e-8)


def train(sequences, p, n_heads, attn, epochs=15, batch_size=32, rate=0.2, lr=3e-3, seed=0):
    """Train p in place, with dropout of this rate; print a line after each epoch."""
    m, v = ({name: np.zeros_like(value) for name, value in p.items()} for _ in range(2))
    d = p["item_embedding"].shape[1]
    rng, step, began = np.random.default_rng(seed), 0, time.perf_counter()
    for epoch in range(1, epochs + 1):
        losses = []
        for batch in np.array_split(rng.permutation(len(sequences)), -(-len(sequences) // batch_size)):
            step, chosen = step + 1, [latest(sequences[n], p, 1) for n in batch]
            masks = [draw_masks(len(s) - 1, d, n_heads, len(attn), rate, rng) for s in chosen]
            loss, g = loss_and_gradients(chosen, p, n_heads, attn, masks)
            adam_step(p, g, m, v, step, lr)
            losses.append(loss)
        print(f"epoch {epoch} of {epochs}: loss {np.mean(losses):.3f}, {time.perf_counter() - began:.0f} s")


def hit_rate(sequences, p, n_heads, attn, k=10):
    """Return HR@k: how often the last item of a sequence is among the k that the model ranks highest.

    Items that the user had before are not ranked; if the target is one of them, it is a miss. An item whose score
    equals the target's counts as ranked above it.
    """
    hits = 0
    for s in sequences:
        history, target = s[:-1], s[-1]
        x, _ = forward(latest(history, p), p, n_heads, attn)
        scores = p["item_embedding"] @ x[-1]  # [V]
        scores[history] = -np.inf
        hits += np.isfinite(scores[target]) and (scores >= scores[target]).sum() <= k
    return hits / len(sequences)


def main():
    """Train learned and uniform attention where the next item depends on the item three steps earlier."""
    from minirec.data.planted import household

    log = household()
    histories = [log.history(user) for user in range(len(log.users))]
    for attn in ("softmax", "uniform"):
        print(f"{attn} attention")
        p, options = init_parameters(len(log.items)), {"n_heads": 2, "attn": (attn, attn)}
        train([h[:-2] for h in histories], p, **options)  # the last two items are for validation and test
        print(f"test HR@10 {hit_rate(histories, p, **options):.3f}\n")


if __name__ == "__main__":
    main()
