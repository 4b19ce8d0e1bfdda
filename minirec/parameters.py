"""Sizes of the model, and its parameters: names, shapes, initial values.

Symbol: D hidden size. Parameters are {name: array}. In training the arrays are views on one flat
vector (`unflatten`), so that Adam, a sum over workers or a checkpoint is one operation; everything else accepts any
mapping with these names.
"""

import math
from dataclasses import dataclass

import numpy as np

from minirec.attention import known_weightings
from minirec.errors import UserError

INIT_STD = 0.02  # of embeddings, W_o, W_1, W_2


@dataclass(frozen=True)
class Config:
    """Sizes and settings of the model; the defaults are those of Kozaki et al. (2026) for sparse data.

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


def unflatten(flat, config):
    """Return {name: array}, each a view on its part of a flat vector of all parameters: write into it, do not replace
    it."""
    parameters, start = {}, 0
    for name, shape in parameter_shapes(config).items():
        size = math.prod(shape)
        parameters[name] = flat[start : start + size].reshape(shape)
        start += size
    return parameters


def parameter_count(config):
    """Return the number of all parameters."""
    return sum(map(math.prod, parameter_shapes(config).values()))


def init_parameters(config, seed, dtype=np.float32):
    """Draw initial parameters: gamma 1, biases and beta 0, the rest random with mean 0.

    W_q, W_k and W_v are Xavier-uniform (Glorot and Bengio 2010) as parts of one matrix [D, 3D], which is how PyTorch's
    MultiheadAttention holds them: U(-a, a), a = sqrt(6 / (D + 3D)), a standard deviation of .088 at D = 64. Embeddings
    and all other matrices are normal with standard deviation 0.02. The softmax models of Kozaki et al. (2026) start
    like this.
    Returns {name: array}, views on one flat NumPy vector. The draws depend on sizes and seed only, never on the
    weighting or the backend: all models that the study compares start from the same weights.
    """
    rng = np.random.default_rng(seed)
    parameters = unflatten(np.zeros(parameter_count(config), dtype), config)
    a = math.sqrt(6 / (4 * config.hidden_size))
    for name, value in parameters.items():
        if name.endswith(("w_q", "w_k", "w_v")):
            value[...] = rng.uniform(-a, a, value.shape)
        elif value.ndim == 2:
            value[...] = rng.normal(0, INIT_STD, value.shape)
        elif name.endswith("gamma"):
            value[...] = 1
    return parameters


def sub_dict(mapping, prefix):
    """Return the part of a mapping whose names begin with `prefix`, with the prefix taken off."""
    return {name[len(prefix) :]: value for name, value in mapping.items() if name.startswith(prefix)}
