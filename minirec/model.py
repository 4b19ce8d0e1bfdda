"""SASRec (Kang and McAuley 2018): the forward as a list of calls, and the backward as the same list read backwards.

Symbols: N tokens (all positions of a batch, packed), D hidden size, H heads, K = D/H, V items; LN layer norm, E [V, D]
item embedding, P [max_length, D] position embedding, W [D, D]. Position 0 is the oldest item kept.

    x      = LN(dropout(E[item] sqrt(D) + P[position]))
    per block, post-LN (Kang and McAuley normalise the input of each sub-layer instead, and have no W_o):
      o    = attention(x W_q + b_q, x W_k + b_k, x W_v + b_v) W_o + b_o
      y    = LN(x + dropout(o))
      x    = LN(y + dropout(relu(dropout(y W_1 + b_1)) W_2 + b_2))
    logits = x E^T, loss = mean over all positions of cross-entropy against the next item

E and P start with the same standard deviation, 0.02; sqrt(D) makes the item's part larger than the position's.
plain.py computes the same with loops, one sequence at a time. Parameters and gradients are mappings from dotted names
to arrays. In training the arrays are views on one flat vector (`unflatten`), so that Adam, a sum over workers or a
checkpoint is one operation. The functions here accept any mapping with those names.
"""

import math

import numpy as np

from minirec import kernels as kernels  # the GPU versions of the functions marked @fused
from minirec.attention import attention, attention_backward
from minirec.backend import get_array_module
from minirec.errors import UserError
from minirec.loss import binary_cross_entropy, cross_entropy, sampled_cross_entropy
from minirec.ops import (
    dropout,
    dropout_backward,
    embedding,
    embedding_backward,
    layer_norm,
    layer_norm_backward,
    linear,
    linear_backward,
    relu,
    relu_backward,
)
from minirec.packing import pack_list
from minirec.parameters import Config, init_parameters, parameter_count, sub_dict, unflatten

__all__ = ["Config", "init_parameters", "loss_and_gradients", "encode", "attention_matrices"]

# One block


def block(x, p, buckets, config, weighting, rng):
    """One transformer block.

    x [N, D]; p: the parameters of this block, named without "blocks.I."; buckets: of the Batch; rng None = no dropout.
    Returns out [N, D] and the cache, a dict that the backward and the decomposition read.
    """
    rate, c = config.dropout, {"x": x}
    # 1. query, key, value                                                           [N, D] each
    q = k = None  # the fixed weightings use neither
    if weighting == "softmax":
        q, c["q"] = linear(x, p["attention.w_q"], p["attention.b_q"])
        k, c["k"] = linear(x, p["attention.w_k"], p["attention.b_k"])
    v, c["v"] = linear(x, p["attention.w_v"], p["attention.b_v"])
    # 2. mix positions, then heads                                                   [N, D]
    mixed, c["attention"] = attention(q, k, v, buckets, config.n_heads, weighting, rate, rng)
    o, c["o"] = linear(mixed, p["attention.w_o"], p["attention.b_o"])
    # 3. residual and layer norm                                                     [N, D]
    o, c["o_dropout"] = dropout(o, rate, rng)
    y, c["attention_norm"] = layer_norm(x + o, p["attention_norm.gamma"], p["attention_norm.beta"])
    # 4. feed-forward (FFN); dropout before relu or after: mask >= 0, so relu(mask * f) = mask * relu(f)  [N, D]
    f, c["ffn_1"] = linear(y, p["ffn.w_1"], p["ffn.b_1"])
    f, c["ffn_1_dropout"] = dropout(f, rate, rng)
    f, c["relu"] = relu(f)
    f, c["ffn_2"] = linear(f, p["ffn.w_2"], p["ffn.b_2"])
    f, c["ffn_2_dropout"] = dropout(f, rate, rng)
    # 5. residual and layer norm                                                     [N, D]
    out, c["ffn_norm"] = layer_norm(y + f, p["ffn_norm.gamma"], p["ffn_norm.beta"])
    return out, c


def block_backward(d_out, c, g, buckets, weighting):
    """Return d_x [N, D]; add to the gradients g, named as p in block.

    d_out and all d_ here [N, D]. A sum hands its gradient to both summands: the gradient of x + o is that of x and
    that of o. Where a value goes two ways (x into attention and residual, y into FFN and residual), its gradient is
    the sum of what comes back, hence each +=.
    """
    # 5. the gradient of y + f, which is also that of y (through the residual) and of f
    d_y = layer_norm_backward(d_out, c["ffn_norm"], g["ffn_norm.gamma"], g["ffn_norm.beta"])
    # 4. from f back to y
    d_f = dropout_backward(d_y, c["ffn_2_dropout"])
    d_f = linear_backward(d_f, c["ffn_2"], g["ffn.w_2"], g["ffn.b_2"])
    d_f = relu_backward(d_f, c["relu"])
    d_f = dropout_backward(d_f, c["ffn_1_dropout"])
    d_y += linear_backward(d_f, c["ffn_1"], g["ffn.w_1"], g["ffn.b_1"])
    # 3. the gradient of x + o, which is also that of x (through the residual) and of o
    d_x = layer_norm_backward(d_y, c["attention_norm"], g["attention_norm.gamma"], g["attention_norm.beta"])
    d_o = dropout_backward(d_x, c["o_dropout"])
    # 2. from o back to q, k, v
    d_mixed = linear_backward(d_o, c["o"], g["attention.w_o"], g["attention.b_o"])
    d_q, d_k, d_v = attention_backward(d_mixed, c["attention"], buckets, weighting)
    # 1. from q, k, v back to x
    d_x += linear_backward(d_v, c["v"], g["attention.w_v"], g["attention.b_v"])
    if weighting == "softmax":
        d_x += linear_backward(d_k, c["k"], g["attention.w_k"], g["attention.b_k"])
        d_x += linear_backward(d_q, c["q"], g["attention.w_q"], g["attention.b_q"])
    return d_x


# The whole model


def forward(parameters, config, batch, rng=None):
    """Token representations of a packed batch: out [N, D] (before the tied logits), cache.

    rng: a generator of the parameters' backend for dropout; None = no dropout.
    """
    p, c = parameters, {}
    # 1. embed
    e, c["items"] = embedding(p["item_embedding"], batch.items)  # [N, D]
    e_position, c["positions"] = embedding(p["position_embedding"], batch.positions)  # [N, D]
    x = e * math.sqrt(config.hidden_size) + e_position
    x, c["dropout"] = dropout(x, config.dropout, rng)
    x, c["norm"] = layer_norm(x, p["embedding_norm.gamma"], p["embedding_norm.beta"])
    # 2. blocks
    c["blocks"] = []
    for i, weighting in enumerate(config.weightings):
        x, cache = block(x, sub_dict(p, f"blocks.{i}."), batch.buckets, config, weighting, rng)
        c["blocks"].append(cache)
    return x, c


def backward(d_out, cache, gradients, config, batch):
    """Add the gradients of all parameters to `gradients`, with d_out [N, D]."""
    g, c, d_x = gradients, cache, d_out
    # 2. blocks, last first
    for i, weighting in reversed(list(enumerate(config.weightings))):
        d_x = block_backward(d_x, c["blocks"][i], sub_dict(g, f"blocks.{i}."), batch.buckets, weighting)
    # 1. embed
    d_x = layer_norm_backward(d_x, c["norm"], g["embedding_norm.gamma"], g["embedding_norm.beta"])
    d_x = dropout_backward(d_x, c["dropout"])
    embedding_backward(d_x, c["positions"], g["position_embedding"])
    embedding_backward(d_x * math.sqrt(config.hidden_size), c["items"], g["item_embedding"])


def add_gradients(parameters, config, batch, scale, gradients, rng=None, loss="ce"):
    """Forward, loss and backward of one packed batch with targets.

    loss: one of LOSSES; all but "ce" need batch.negatives. Adds to `gradients`; returns `scale` times
    the summed loss of the batch's tokens, as a 0-d array on the device. If scale is 1/N, with N the number of
    tokens of all micro-batches of a step, their losses and gradients add up to those of the mean.
    """
    x, cache = forward(parameters, config, batch, rng)
    # E is used twice, at the input and at the output. Let O [N, V] hold the one-hot rows of the items. The input is
    # h = sqrt(D) O E + P[position], the output logits = x E^T, so
    #     dLoss/dE = sqrt(D) O^T d_h  (input: added by backward)  +  d_logits^T x  (output: added by the loss)
    items, d_items = parameters["item_embedding"], gradients["item_embedding"]
    if loss == "ce":
        value, d_x = cross_entropy(x, items, batch.targets, scale, d_items)
    else:
        sampled = sampled_cross_entropy if loss == "sampled" else binary_cross_entropy
        value, d_x = sampled(x, items, batch.targets, batch.negatives, scale, d_items)
    backward(d_x, cache, gradients, config, batch)
    return value


# On lists of sequences


def loss_and_gradients(parameters, config, sequences, rng=None):
    """Mean next-item cross-entropy over all positions of the sequences, and its gradients.

    parameters: a mapping as from init_parameters; dtype and backend follow it. sequences: list of
    1-D integer arrays, oldest item first; inputs are s[:-1], targets s[1:], the last max_length of
    them. rng: a generator for dropout, None = no dropout.
    Returns a float and {name: array}. Raises UserError for items outside 0..V-1.
    """
    like = parameters["item_embedding"]
    xp = get_array_module(like)
    batch = pack_list(sequences, config, xp, with_targets=True)
    gradients = unflatten(xp.zeros(parameter_count(config), like.dtype), config)
    loss = add_gradients(parameters, config, batch, 1 / len(batch.items), gradients, rng)
    return float(loss), gradients


def encode(parameters, config, sequences):
    """Representations of every position, without dropout.

    sequences: list of 1-D integer arrays, oldest item first, none empty; the last max_length items of
    each are used. Returns a list of arrays [len, D] on the parameters' backend; logits are
    `representation @ parameters["item_embedding"].T`. Raises UserError for items outside 0..V-1.
    """
    if any(len(s) == 0 for s in sequences):
        raise UserError("an empty sequence has no representation")
    batch = pack_list(sequences, config, get_array_module(parameters["item_embedding"]))
    x, _ = forward(parameters, config, batch)
    ends = np.cumsum(batch.lengths)
    out = [None] * len(sequences)
    for i, start, end in zip(batch.order, ends - batch.lengths, ends, strict=True):
        out[i] = x[start:end]
    return out


def attention_matrices(parameters, config, sequence):
    """A of every block for one sequence: query position down, key position across, without dropout.

    sequence: a 1-D integer array, oldest item first; its last max_length items are used.
    Returns a list of arrays [H, L, L], one a block. Raises UserError for items outside 0..V-1.
    """
    xp = get_array_module(parameters["item_embedding"])
    batch = pack_list([sequence], config, xp)
    _, cache = forward(parameters, config, batch)
    shape = (1, config.n_heads, len(batch.items), len(batch.items))
    return [xp.broadcast_to(block["attention"][0].weights, shape)[0] for block in cache["blocks"]]
