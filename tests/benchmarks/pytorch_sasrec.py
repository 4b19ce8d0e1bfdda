"""SASRec in PyTorch, twice: the references that minirec's speed and gradients are compared with.

Both are exactly the model of minirec.model (post-LN, tied logits over V items, no padding class)
with the same parameters; they differ in how a batch is laid out and what runs on it:

    usual   as public repositories do it: every sequence left-padded to max_length, a padding mask,
            attention spelled out, logits at every position, padded or not
    tuned   right-padded to the longest sequence of the batch, where causality hides the padding;
            fused attention, logits at valid positions only, fused Adam

Symbols: B sequences, L positions of the padded batch, N tokens (valid positions), D hidden size,
H heads, K = D/H, V items. Position 0 is the oldest item kept, wherever the padding lies.
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from minirec.model import Config, loss_and_gradients
from minirec.ops import LAYER_NORM_EPS
from minirec.parameters import parameter_shapes

IGNORED = -1  # the target at a padded position

# The model that both share


class Block(nn.Module):
    """One transformer block; how it attends is handed in with each call."""

    def __init__(self, config, weighting):
        super().__init__()
        d = config.hidden_size
        self.weighting, self.n_heads = weighting, config.n_heads
        self.attention = nn.ModuleDict({name: nn.Linear(d, d) for name in "qkvo"})
        self.attention_norm = nn.LayerNorm(d, eps=LAYER_NORM_EPS)
        self.ffn = nn.ModuleDict({name: nn.Linear(d, d) for name in "12"})
        self.ffn_norm = nn.LayerNorm(d, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def heads(self, name, x):
        """The query, key or value of x [B, L, D] -> [B, H, L, K]."""
        return self.attention[name](x).unflatten(2, (self.n_heads, -1)).transpose(1, 2)

    def forward(self, x, attend):
        """x [B, L, D]; attend(q, k, v), or attend(None, None, v) where weights are fixed -> [B, L, D]."""
        q = k = None
        if self.weighting == "softmax":
            q, k = self.heads("q", x), self.heads("k", x)
        mixed = attend(q, k, self.heads("v", x))  # [B, H, L, K]
        o = self.attention["o"](mixed.transpose(1, 2).flatten(2))
        y = self.attention_norm(x + self.dropout(o))
        f = self.ffn["2"](torch.relu(self.dropout(self.ffn["1"](y))))
        return self.ffn_norm(y + self.dropout(f))


class SASRec(nn.Module):
    """Parameters and token-wise layers; a subclass lays out the batch and attends.

    config: a minirec.model.Config whose weightings are softmax or uniform.
    """

    def __init__(self, config):
        super().__init__()
        d = config.hidden_size
        self.config = config
        self.item_embedding = nn.Embedding(config.n_items, d)
        self.position_embedding = nn.Embedding(config.max_length, d)
        self.embedding_norm = nn.LayerNorm(d, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config, weighting) for weighting in config.weightings])

    def encode(self, items, positions, attend):
        """items, positions [B, L] -> x [B, L, D]."""
        e = self.item_embedding(items) * math.sqrt(self.config.hidden_size)
        x = self.embedding_norm(self.dropout(e + self.position_embedding(positions)))
        for block in self.blocks:
            x = block(x, attend)
        return x


def padded(flat, starts, lengths, width, left):
    """Lay the sequences flat[start : start + length] out as a rectangle of `width` positions.

    flat: integers, reaching one item past each sequence (the last target); starts, lengths [B].
    Returns items, positions, targets (IGNORED where padded) and valid, tensors [B, width].
    """
    positions = np.arange(width) - (width - lengths[:, None] if left else 0)  # [B, width]
    valid = (positions >= 0) & (positions < lengths[:, None])
    positions = np.where(valid, positions, 0)
    places = starts[:, None] + positions
    items = np.where(valid, flat[places], 0)
    targets = np.where(valid, flat[places + 1], IGNORED)
    return (*(torch.from_numpy(x.astype(np.int64)) for x in (items, positions, targets)), torch.from_numpy(valid))


# The two references


class Usual(SASRec):
    """Left-padded to max_length, explicit attention under a mask, logits everywhere."""

    def optimizer(self, learning_rate):
        return torch.optim.Adam(self.parameters(), lr=learning_rate)

    def forward(self, flat, starts, lengths):
        """Mean loss over the valid positions of a batch (see padded)."""
        items, positions, targets, valid = padded(flat, starts, lengths, self.config.max_length, left=True)
        causal = torch.ones(items.shape[1], items.shape[1], dtype=torch.bool).tril()
        visible = causal & valid[:, None, None, :] & valid[:, None, :, None]  # [B, 1, L, L]
        x = self.encode(items, positions, lambda q, k, v: self.attend(q, k, v, visible))
        logits = x @ self.item_embedding.weight.T  # [B, L, V]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    def attend(self, q, k, v, visible):
        """q, k, v [B, H, L, K] (q and k None: uniform), visible [B, 1, L, L] -> [B, H, L, K]."""
        if q is None:
            weights = visible.to(v.dtype)
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)  # padded queries see nothing
            weights = weights.expand(-1, v.shape[1], -1, -1)
        else:
            scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])  # [B, H, L, L]
            # The lowest finite number, not -inf: a padded query sees nothing, and must not become NaN.
            scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
            weights = torch.softmax(scores, dim=-1)
        return self.dropout(weights) @ v


class Tuned(SASRec):
    """Right-padded to the longest of the batch, fused attention, logits at valid positions only."""

    def __init__(self, config):
        super().__init__(config)
        steps = torch.arange(1, config.max_length + 1)
        average = torch.ones(config.max_length, config.max_length).tril().double() / steps[:, None]
        self.register_buffer("average", average)  # [max_length, max_length], double until the model is cast

    def optimizer(self, learning_rate):
        return torch.optim.Adam(self.parameters(), lr=learning_rate, fused=True)

    def forward(self, flat, starts, lengths):
        """Mean loss over the valid positions of a batch (see padded)."""
        return self.loss(*self.lay_out(flat, starts, lengths))

    def lay_out(self, flat, starts, lengths):
        """Return items, positions [B, L], rows and targets [N] of the valid positions, on the model's device."""
        items, positions, targets, valid = padded(flat, starts, lengths, int(lengths.max()), left=False)
        rows = valid.flatten().nonzero()[:, 0]  # found on the host, so that a GPU need not be waited for
        device = self.item_embedding.weight.device
        return tuple(x.to(device) for x in (items, positions, rows, targets[valid]))

    def loss(self, items, positions, rows, targets):
        """Mean loss of what lay_out returns."""
        x = self.encode(items, positions, self.attend)
        logits = x.flatten(0, 1).index_select(0, rows) @ self.item_embedding.weight.T  # [N, V]
        return F.cross_entropy(logits, targets)

    def attend(self, q, k, v):
        """q, k, v [B, H, L, K] (q and k None: uniform) -> [B, H, L, K]; no padded key comes before a valid query."""
        rate = self.config.dropout if self.training else 0.0
        if q is not None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=rate)
        weights = self.average[: v.shape[2], : v.shape[2]]
        return (self.dropout(weights.expand(*v.shape[:3], -1)) if rate else weights) @ v


REFERENCES = {"usual": Usual, "tuned": Tuned}

# Between minirec's parameters and PyTorch's


def minirec_tensors(model):
    """Return {minirec's name: (parameter, whether PyTorch keeps it transposed)}."""
    own, found = dict(model.named_parameters()), {}
    for name in parameter_shapes(model.config):
        path, _, last = name.rpartition(".")
        if last.startswith(("w_", "b_")):  # minirec: x @ w; nn.Linear: x @ weight.T
            place = f"{path}.{last[2:]}." + ("weight" if last[0] == "w" else "bias")
        elif last in ("gamma", "beta"):
            place = f"{path}." + ("weight" if last == "gamma" else "bias")
        else:
            place = f"{name}.weight"
        found[name] = own.pop(place), last.startswith("w_")
    assert not own, f"parameters that minirec does not have: {', '.join(own)}"
    return found


def build(reference, config, parameters):
    """Return a reference ("usual" or "tuned") with a copy of minirec's parameters, in their dtype."""
    model = REFERENCES[reference](config)
    model.to(torch.from_numpy(parameters["item_embedding"]).dtype)
    with torch.no_grad():
        for name, (own, transposed) in minirec_tensors(model).items():
            own.copy_(torch.from_numpy(parameters[name].T if transposed else parameters[name]))
    return model


def reference_loss_and_gradients(reference, parameters, config, sequences, dropout=False):
    """As minirec.model.loss_and_gradients, computed by a reference: a float and {name: array}."""
    windows = [s[-(config.max_length + 1) :] for s in sequences]
    full = np.array([len(s) for s in windows])
    model = build(reference, config, parameters).train(dropout)
    loss = model(np.concatenate(windows), np.cumsum(full) - full, full - 1)
    loss.backward()
    gradients = {}
    for name, (own, transposed) in minirec_tensors(model).items():
        gradient = torch.zeros_like(own) if own.grad is None else own.grad  # None: uniform's query and key
        gradients[name] = (gradient.T if transposed else gradient).numpy()
    return float(loss.detach()), gradients


def example(attn, seed=0, dropout=0.5):
    """Return parameters, config and sequences for a check: small, ragged, in float64.

    All parameters are drawn wide, biases and norms too, so that no gradient is too small to compare
    (but the key bias's, which is 0). The longest sequences exceed max_length; items repeat.
    """
    rng = np.random.default_rng(seed)
    config = Config(n_items=23, hidden_size=12, n_blocks=2, n_heads=3, max_length=7, dropout=dropout, attn=attn)
    parameters = {name: rng.normal(0, 0.4, shape) for name, shape in parameter_shapes(config).items()}
    sequences = [rng.integers(config.n_items, size=n) for n in (5, 2, 8, 3, 11, 5, 7, 20, 2)]
    return parameters, config, sequences


def differences(reference, attn, seed=0):
    """Compare a reference with minirec in float64 without dropout.

    Returns {name: error} for "loss" and every named gradient: the largest difference, as a fraction
    of the tensor's largest entry, or of 1e-4 of the largest of all where that is more (b_k's gradient
    is 0, and its rounding noise must not be measured by itself).
    """
    parameters, config, sequences = example(attn, seed)
    loss, gradients = loss_and_gradients(parameters, config, sequences)
    other_loss, other = reference_loss_and_gradients(reference, parameters, config, sequences)
    floor = 1e-4 * max(np.abs(g).max() for g in gradients.values())
    errors = {"loss": abs(other_loss - loss) / loss}
    for name, g in gradients.items():
        errors[name] = float(np.abs(other[name] - g).max() / max(np.abs(g).max(), floor))
    return {name: math.inf if math.isnan(error) else error for name, error in errors.items()}  # NaN hides from max
