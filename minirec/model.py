"""SASRec (Kang and McAuley 2018) as a list of calls, and its mirror.

Symbols: B sequences, L positions, N tokens (all valid positions of a batch, packed), D hidden
size, H heads, K = D/H, V items; LN layer norm, E [V, D] item and P [L, D] position embedding, W [D, D]
(a size [P] is the number of parameters). Position 0 is the oldest item kept.

    x      = LN(dropout(E[item] sqrt(D) + P[position]))
    per block, post-LN (Kang and McAuley normalise what goes into a sub-layer instead):
      o    = attention(x W_q + b_q, x W_k + b_k, x W_v + b_v) W_o + b_o
      y    = LN(x + dropout(o))
      x    = LN(y + dropout(relu(dropout(y W_1 + b_1)) W_2 + b_2))
    logits = x E^T, loss = mean over valid positions of cross-entropy against the next item

E starts at N(0, 0.02), and so does P: sqrt(D) lets the item outweigh its position.
Parameters and gradients are mappings from dotted names to arrays. In training the arrays are views
on one flat vector (`views`), so that Adam, a sum over workers or a checkpoint is one operation;
the functions here accept any mapping with those names.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minirec.attention import (
    attention,
    attention_backward,
    known_weightings,
    make_groups,
)
from minirec.backend import get_array_module, plan, to_device
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

INIT_STD = 0.02  # of embeddings, W_o, W_1, W_2


@dataclass(frozen=True)
class Config:
    """Sizes and settings of the model; the defaults are the paper's for sparse data.

    attn is one of attention.known_weightings(), or a tuple of them, one a block. Raises UserError on sizes that
    make no model.
    """

    n_items: int
    hidden_size: int = 64
    n_blocks: int = 2
    n_heads: int = 2
    max_length: int = 50
    dropout: float = 0.5
    attn: str | tuple = "softmax"

    def __post_init__(self):
        for name in ("n_items", "hidden_size", "n_blocks", "n_heads", "max_length"):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or value < 1:
                raise UserError(f"{name} is {value!r}: it must be a whole number of at least 1")
        if self.hidden_size % self.n_heads:
            raise UserError(
                f"{self.n_heads} heads do not divide hidden size {self.hidden_size}: choose a number of heads that does"
            )
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}: it must lie in [0, 1)")
        for weighting in self.weightings:
            if weighting not in known_weightings():
                raise UserError(f"attn is {weighting!r}: choose from {', '.join(known_weightings())}")
        if len(self.weightings) != self.n_blocks:
            raise UserError(f"attn names {len(self.weightings)} blocks: the model has {self.n_blocks}")

    @property
    def weightings(self):
        """The attention weighting of each block, as a tuple."""
        return (self.attn,) * self.n_blocks if isinstance(self.attn, str) else tuple(self.attn)


# Parameters


def parameter_shapes(config):
    """Return {name: shape} of all parameters, in the order in which they lie in the flat vector."""
    d = config.hidden_size
    shapes = {
        "item_embedding": (config.n_items, d),
        "position_embedding": (config.max_length, d),
        "embedding_norm.gamma": (d,),
        "embedding_norm.beta": (d,),
    }
    for i in range(config.n_blocks):
        block = {f"attention.w_{x}": (d, d) for x in "qkvo"} | {f"attention.b_{x}": (d,) for x in "qkvo"}
        block |= {"attention_norm.gamma": (d,), "attention_norm.beta": (d,)}
        block |= {"ffn.w_1": (d, d), "ffn.b_1": (d,), "ffn.w_2": (d, d), "ffn.b_2": (d,)}
        block |= {"ffn_norm.gamma": (d,), "ffn_norm.beta": (d,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes


def views(flat, config):
    """Return {name: array}, each a view on its stretch of the flat vector [P]: write, never rebind."""
    parameters, start = {}, 0
    for name, shape in parameter_shapes(config).items():
        size = math.prod(shape)
        parameters[name] = flat[start : start + size].reshape(shape)
        start += size
    return parameters


def parameter_count(config):
    """Return P, the number of parameters."""
    return sum(map(math.prod, parameter_shapes(config).values()))


def init_parameters(config, seed, dtype=np.float32):
    """Draw initial parameters: gamma 1, biases and beta 0, the rest random.

    W_q, W_k and W_v are Xavier-uniform (Glorot and Bengio 2010) as PyTorch's MultiheadAttention draws them, which
    sees one matrix [D, 3D]: U(-a, a), a = sqrt(6 / (D + 3D)), a standard deviation of .088 at D = 64. Embeddings and
    all other matrices are N(0, 0.02). So are those of the authors' softmax models (Kozaki et al. 2026).
    Returns {name: array}, views on one flat NumPy vector. The draws depend on sizes and seed only,
    never on the weighting or the backend: every arm of the study starts from the same weights.
    """
    rng = np.random.default_rng(seed)
    parameters = views(np.zeros(parameter_count(config), dtype), config)
    a = math.sqrt(6 / (4 * config.hidden_size))
    for name, value in parameters.items():
        if name.endswith(("w_q", "w_k", "w_v")):
            value[...] = rng.uniform(-a, a, value.shape)
        elif value.ndim == 2:
            value[...] = rng.normal(0, INIT_STD, value.shape)
        elif name.endswith("gamma"):
            value[...] = 1
    return parameters


def below(mapping, prefix):
    """Return the part of a mapping whose names begin with `prefix`, with the prefix taken off."""
    return {name[len(prefix) :]: value for name, value in mapping.items() if name.startswith(prefix)}


# Batches


class Batch(NamedTuple):
    """Sequences packed row by row, shortest first, with nothing in between."""

    items: object  # [N] the item at each position
    positions: object  # [N] 0 = oldest item kept
    targets: object  # [N] the item that follows; None where there is nothing to learn
    negatives: object  # of the sampled losses: [K] for all positions, or [N] one each; else None
    groups: list  # rectangles for attention
    order: np.ndarray  # [B] which of the given sequences lies at each place, on the host
    lengths: np.ndarray  # [B] ascending, on the host


def pack(flat, starts, lengths, xp=np, with_targets=True, negatives=None):
    """Pack the sequences flat[start : start + length] into a Batch on array module xp.

    flat: integer array of items, on the host; starts, lengths [B] with all lengths >= 1. Targets
    are the items one place later, so that flat must reach one item past each sequence. negatives: as
    long as flat, one for each place in it, or None.
    """
    order = np.argsort(lengths, kind="stable")
    starts, lengths = starts[order], lengths[order]
    ends = np.cumsum(lengths)
    positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)  # 0 1 2 0 1 2 3 ...
    places = positions + np.repeat(starts, lengths)
    return Batch(
        items=to_device(flat[places], xp),
        positions=to_device(positions, xp),
        targets=to_device(flat[places + 1], xp) if with_targets else None,
        negatives=None if negatives is None else to_device(negatives[places], xp),
        groups=make_groups(lengths, plan(xp).rectangles, xp),
        order=order,
        lengths=lengths,
    )


def check_items(flat, config):
    """Raise UserError where an item is not an integer in 0..V-1: a GPU would not notice."""
    if flat.dtype.kind not in "iu" or flat.min() < 0 or flat.max() >= config.n_items:
        raise UserError(f"items must be integers in 0..{config.n_items - 1}")


def pack_list(sequences, config, xp, with_targets):
    """Pack a list of 1-D integer arrays, the last max_length positions of each (see pack).

    With targets, inputs are s[:-1] and targets s[1:], and sequences of one item have nothing to learn.
    Raises UserError for an item outside 0..V-1, or where nothing is left to compute.
    """
    need = 2 if with_targets else 1
    sequences = [np.asarray(s)[-(config.max_length + need - 1) :] for s in sequences if len(s) >= need]
    if not sequences:
        raise UserError(f"no sequence has {need} or more items")
    flat = np.concatenate(sequences)
    check_items(flat, config)
    full = np.array([len(s) for s in sequences])
    return pack(flat, np.cumsum(full) - full, full - (need - 1), xp, with_targets)


# One block


def block(x, p, groups, config, weighting, rng):
    """One transformer block.

    x [N, D], p: the parameters below "blocks.I.", groups from the Batch, rng None = no dropout.
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
    mixed, c["attention"] = attention(q, k, v, groups, config.n_heads, weighting, rate, rng)
    o, c["o"] = linear(mixed, p["attention.w_o"], p["attention.b_o"])
    # 3. residual and layer norm                                                     [N, D]
    o, c["o_dropout"] = dropout(o, rate, rng)
    y, c["attention_norm"] = layer_norm(x + o, p["attention_norm.gamma"], p["attention_norm.beta"])
    # 4. feed-forward (FFN); dropout comes before relu, which commutes with it       [N, D]
    f, c["ffn_1"] = linear(y, p["ffn.w_1"], p["ffn.b_1"])
    f, c["ffn_1_dropout"] = dropout(f, rate, rng)
    f, c["relu"] = relu(f)
    f, c["ffn_2"] = linear(f, p["ffn.w_2"], p["ffn.b_2"])
    f, c["ffn_2_dropout"] = dropout(f, rate, rng)
    # 5. residual and layer norm                                                     [N, D]
    out, c["ffn_norm"] = layer_norm(y + f, p["ffn_norm.gamma"], p["ffn_norm.beta"])
    return out, c


def block_backward(d_out, c, g, groups, weighting):
    """Return d_x [N, D]; add to the gradients g, named as p in block.

    d_out and all d_ here [N, D]. A sum hands its gradient to both summands: that of x + o is at once
    d_x and d_o. Where a value goes two ways (x to attention and residual, y to FFN and residual), its
    gradient is the sum of what comes back, hence each +=.
    """
    # 5. of y + f, so of y (by the residual) and of f
    d_y = layer_norm_backward(d_out, c["ffn_norm"], g["ffn_norm.gamma"], g["ffn_norm.beta"])
    # 4. of f back to y
    d_f = dropout_backward(d_y, c["ffn_2_dropout"])
    d_f = linear_backward(d_f, c["ffn_2"], g["ffn.w_2"], g["ffn.b_2"])
    d_f = relu_backward(d_f, c["relu"])
    d_f = dropout_backward(d_f, c["ffn_1_dropout"])
    d_y += linear_backward(d_f, c["ffn_1"], g["ffn.w_1"], g["ffn.b_1"])
    # 3. of x + o, so of x (by the residual) and of o
    d_x = layer_norm_backward(d_y, c["attention_norm"], g["attention_norm.gamma"], g["attention_norm.beta"])
    d_o = dropout_backward(d_x, c["o_dropout"])
    # 2. of o back to q, k, v
    d_mixed = linear_backward(d_o, c["o"], g["attention.w_o"], g["attention.b_o"])
    d_q, d_k, d_v = attention_backward(d_mixed, c["attention"], groups, weighting)
    # 1. of q, k, v back to x
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
        x, cache = block(x, below(p, f"blocks.{i}."), batch.groups, config, weighting, rng)
        c["blocks"].append(cache)
    return x, c


def backward(d_out, cache, gradients, config, batch):
    """Add the gradients of all parameters to `gradients`, given d_out [N, D]."""
    g, c, d_x = gradients, cache, d_out
    # 2. blocks, last first
    for i, weighting in reversed(list(enumerate(config.weightings))):
        d_x = block_backward(d_x, c["blocks"][i], below(g, f"blocks.{i}."), batch.groups, weighting)
    # 1. embed
    d_x = layer_norm_backward(d_x, c["norm"], g["embedding_norm.gamma"], g["embedding_norm.beta"])
    d_x = dropout_backward(d_x, c["dropout"])
    embedding_backward(d_x, c["positions"], g["position_embedding"])
    embedding_backward(d_x * math.sqrt(config.hidden_size), c["items"], g["item_embedding"])


def add_gradients(parameters, config, batch, scale, gradients, rng=None, loss="ce"):
    """Forward, loss and backward of one packed batch with targets.

    loss: one of LOSSES; all but "ce" need batch.negatives. Adds to `gradients`; returns `scale` times
    the summed loss of the batch's tokens, as a 0-d array on the device. With scale = 1/N, N counting
    the tokens of all micro-batches of a step, their losses and gradients sum to those of the mean.
    """
    x, cache = forward(parameters, config, batch, rng)
    # E serves twice, so with O [N, V] the one-hot rows of the items and e = sqrt(D) O E + P[position],
    #     dL/dE = d_logits^T x  (tied, the output: cross_entropy)  +  sqrt(D) O^T d_e  (the input: backward):
    # both add to the same array.
    tied = parameters["item_embedding"], gradients["item_embedding"]
    if loss == "ce":
        value, d_x = cross_entropy(x, tied[0], batch.targets, scale, tied[1])
    else:
        sampled = sampled_cross_entropy if loss == "sampled" else binary_cross_entropy
        value, d_x = sampled(x, tied[0], batch.targets, batch.negatives, scale, tied[1])
    backward(d_x, cache, gradients, config, batch)
    return value


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
    gradients = views(xp.zeros(parameter_count(config), like.dtype), config)
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
    xp = get_array_module(parameters["item_embedding"])
    batch = pack_list(sequences, config, xp, with_targets=False)
    x, _ = forward(parameters, config, batch)
    ends = np.cumsum(batch.lengths)
    out = [None] * len(sequences)
    for i, start, end in zip(batch.order, ends - batch.lengths, ends, strict=True):
        out[i] = x[start:end]
    return out
