"""The gradient check: every hand-derived gradient against central differences, in float64.

    dL/dw  ~  (L(w + h) - L(w - h)) / 2h,   error O(h^2), h = 1e-5

All parameters are random (std 0.1), sequences ragged, dropout on: its masks are drawn again from
the same seed at every evaluation, so the loss is one smooth function of the parameters.
"""

import numpy as np

from minirec.backend import generator, to_device, to_host
from minirec.model import Config, init_parameters, loss_and_gradients

STEP = 1e-5
TOLERANCE = 1e-6  # of max |difference| / max |gradient|; absolute where the gradient is identically 0
STD = 0.1
LENGTHS = (7, 2, 4, 4, 5, 9)


def example(attn, dropout=0.3, seed=0):
    """Return a small config, random float64 parameters and ragged sequences to check on."""
    config = Config(n_items=12, hidden_size=8, n_heads=2, max_length=7, dropout=dropout, attn=attn)
    rng = np.random.default_rng(seed)
    parameters = init_parameters(config, seed, np.float64)
    for name, value in parameters.items():
        value[...] = rng.normal(1 if name.endswith("gamma") else 0, STD, value.shape)
    return config, parameters, [rng.integers(config.n_items, size=n) for n in LENGTHS]


def identically_zero(config, name):
    """Whether a parameter's gradient is 0 whatever the data.

    b_k adds the same to all scores of a row, which softmax ignores; the fixed weightings use
    neither queries nor keys.
    """
    if not name.startswith("blocks."):
        return False
    _, block, *rest = name.split(".")
    unused = ("b_k",) if config.weightings[int(block)] == "softmax" else ("w_q", "b_q", "w_k", "b_k")
    return rest[-1] in unused


def central_differences(loss, value):
    """Return dL/dvalue, a host array of value's shape; loss() reads value, whose entries are moved and put back."""
    numeric = np.zeros(value.shape)
    for i in np.ndindex(value.shape):
        centre = float(value[i])
        value[i] = centre + STEP
        above = loss()
        value[i] = centre - STEP
        under = loss()
        value[i] = centre
        numeric[i] = (above - under) / (2 * STEP)
    return numeric


def check(attn, xp=np, only=None):
    """Check all parameters, or those named in `only`, under one weighting, on array module xp.

    Yields (name, error, relative): max |difference| / max |gradient|, or, where the gradient is
    identically zero (relative False), the largest absolute value that either method gives.
    """
    config, parameters, sequences = example(attn)
    parameters = {name: to_device(value, xp) for name, value in parameters.items()}

    def loss():
        return loss_and_gradients(parameters, config, sequences, generator(xp, 1))

    _, gradients = loss()
    for name in only or parameters:
        gradient = to_host(gradients[name])
        numeric = central_differences(lambda: loss()[0], parameters[name])
        if identically_zero(config, name):
            yield name, max(np.abs(gradient).max(), np.abs(numeric).max()), False
        else:
            yield name, np.abs(gradient - numeric).max() / np.abs(numeric).max(), True
