"""The gradient check: every hand-derived gradient against central differences, in float64.

    dL/dw  ~  (L(w + h) - L(w - h)) / 2h,   error O(h^2), h = 1e-5

First every operation alone, then every parameter of the whole model, both in the order of the backward pass: a wrong
gradient spoils all that come after it there, so the first one that is off is the one to look at.

All arrays are random, sequences ragged, dropout on: its masks are drawn again from the same seed at every evaluation,
so the loss is one smooth function of the arrays.

Every entry costs two evaluations. On a GPU a small evaluation takes as long as its launches, so there only SAMPLED
entries of each array are moved.
"""

import numpy as np

from minirec import attention, loss, ops, packing
from minirec.backend import generator, get_array_module, to_device, to_host
from minirec.model import Config, loss_and_gradients
from minirec.parameters import parameter_shapes

STEP = 1e-5
TOLERANCE = 1e-6  # of max |difference| / max |gradient|; absolute where the gradient is identically 0
STD = 0.1
SAMPLED = 8  # entries of each array that are checked on a GPU
LENGTHS = (7, 2, 4, 4, 5, 9)


def central_differences(loss, value, entries=None):
    """Return dL/dvalue on the host, of value's shape; loss() reads value, whose entries are moved and put back.

    entries: index tuples, at which alone it is computed; elsewhere it is 0 then.
    """
    numeric = np.zeros(value.shape)
    for i in np.ndindex(value.shape) if entries is None else entries:
        centre = float(value[i])
        value[i] = centre + STEP
        above = loss()
        value[i] = centre - STEP
        numeric[i] = (above - loss()) / (2 * STEP)
        value[i] = centre
    return numeric


def compared(loss, value, gradient):
    """Return a gradient and its central differences, on the host: all entries, or on a GPU SAMPLED of them.

    Half of these are the largest, which set the scale of an error; half are drawn.
    """
    if isinstance(gradient, np.ndarray):
        return gradient, central_differences(loss, value)
    gradient = to_host(gradient)
    drawn = np.random.default_rng(0).permutation(gradient.size)
    chosen = np.unique(np.r_[np.argsort(-np.abs(gradient), axis=None)[: SAMPLED // 2], drawn[: SAMPLED // 2]])
    entries = [tuple(map(int, np.unravel_index(i, gradient.shape))) for i in chosen]
    return gradient.flat[chosen], central_differences(loss, value, entries).flat[chosen]


def relative_error(gradient, numeric):
    """Return max |difference| / max |gradient|."""
    return np.abs(gradient - numeric).max() / np.abs(numeric).max()


# Every operation alone


def operations(weighting, xp=np):
    """Yield each operation of the model in the order of the backward pass, on a small random example.

    Yields (name, loss, {"d_x": (x, d_x), ...}): loss() is a float that depends on the arrays x, ..., and the operation
    says that its gradients are d_x, .... For an operation with an output, loss() = sum(out * d_out), d_out random.
    """
    rng = np.random.default_rng(0)
    lengths = np.sort(LENGTHS)
    n, d, n_items = int(lengths.sum()), 6, 9
    draw = lambda *shape: to_device(rng.normal(size=shape), xp)
    total = lambda forward: lambda: float((forward()[0] * d_out).sum())
    x, d_out, gamma, beta, w, b = draw(n, d), draw(n, d), draw(d), draw(d), draw(d, d), draw(d)
    index = to_device(rng.integers(n_items, size=n), xp)

    def token_wise(name, forward, **arrays):
        """Check x, ... -> (out, cache), whose backward returns d_x and adds the other gradients to what it is given."""
        now = lambda: forward(*arrays.values())
        _, *others = map(xp.zeros_like, arrays.values())
        d_x = getattr(ops, name)(d_out, now()[1], *others)
        pairs = zip(arrays.values(), (d_x, *others), strict=True)
        return name, total(now), dict(zip((f"d_{array}" for array in arrays), pairs, strict=True))

    table = draw(n_items, d)
    d_table = xp.zeros_like(table)
    _, d_x = loss.cross_entropy(x, table, index, 1 / n, d_table)
    value = lambda: float(loss.cross_entropy(x, table, index, 1 / n, xp.zeros_like(table))[0])
    yield "cross_entropy", value, {"d_x": (x, d_x), "d_items": (table, d_table)}

    yield token_wise("layer_norm_backward", ops.layer_norm, x=x, gamma=gamma, beta=beta)
    yield token_wise("dropout_backward", lambda x: ops.dropout(x, 0.3, generator(xp, 1)), x=x)
    yield token_wise("linear_backward", ops.linear, x=x, w=w, b=b)
    yield token_wise("relu_backward", ops.relu, x=x)

    q, k, v = draw(n, d), draw(n, d), draw(n, d)
    buckets = packing.make_buckets(lengths, 2, xp)  # padded ones
    mix = lambda: attention.attention(q, k, v, buckets, 2, weighting, 0.3, generator(xp, 1))
    d_qkv = attention.attention_backward(d_out, mix()[1], buckets, weighting)
    gradients = {f"d_{name}": (x, d_x) for name, x, d_x in zip("qkv", (q, k, v), d_qkv, strict=True) if d_x is not None}
    yield f"attention_backward, {weighting}", total(mix), gradients

    d_table = xp.zeros_like(table)
    ops.embedding_backward(d_out, index, d_table)
    yield "embedding_backward", total(lambda: ops.embedding(table, index)), {"d_table": (table, d_table)}


def check_operations(weighting, xp=np):
    """Check every operation alone on array module xp: yield (operation, gradient's name, relative error)."""
    for operation, value, gradients in operations(weighting, xp):
        for name, (array, gradient) in gradients.items():
            yield operation, name, relative_error(*compared(value, array, gradient))


# The whole model


def example(attn):
    """Return a small config, random float64 parameters (gammas around 1) and ragged sequences to check on."""
    config, rng = Config(n_items=12, hidden_size=8, max_length=7, dropout=0.3, attn=attn), np.random.default_rng(0)
    around = {name: 1 if name.endswith("gamma") else 0 for name in parameter_shapes(config)}
    parameters = {name: rng.normal(around[name], STD, shape) for name, shape in parameter_shapes(config).items()}
    return config, parameters, [rng.integers(config.n_items, size=n) for n in LENGTHS]


def identically_zero(config, name):
    """Whether a parameter's gradient is 0 whatever the data.

    b_k adds the same to all scores of a row, which softmax ignores; the fixed weightings use
    neither queries nor keys.
    """
    unused = {"softmax": ("b_k",)} | dict.fromkeys(attention.FIXED, ("w_q", "b_q", "w_k", "b_k"))
    return name in [f"blocks.{i}.attention.{n}" for i, w in enumerate(config.weightings) for n in unused[w]]


def gradients(parameters, config, sequences, names=None):
    """Yield (name, gradient, central differences) of all parameters, or of those named in that order (see compared)."""
    xp = get_array_module(parameters["item_embedding"])
    now = lambda: loss_and_gradients(parameters, config, sequences, generator(xp, 1))
    _, by_hand = now()
    for name in names or parameters:
        yield name, *compared(lambda: now()[0], parameters[name], by_hand[name])


def check(attn, xp=np, only=None):
    """Check all parameters, or those named in `only`, under one weighting, on array module xp.

    Yields (name, error, relative), the last parameter first, as in the backward pass: max |difference| / max
    |gradient|, or, where the gradient is identically zero (relative False), the largest absolute value that either
    method gives.
    """
    config, parameters, sequences = example(attn)
    parameters = {name: to_device(value, xp) for name, value in parameters.items()}
    for name, gradient, numeric in gradients(parameters, config, sequences, only or reversed(parameters)):
        if identically_zero(config, name):
            yield name, max(np.abs(gradient).max(), np.abs(numeric).max()), False
        else:
            yield name, relative_error(gradient, numeric), True


def first_fault(operation_errors, parameter_errors):
    """Return one line on the first gradient that is off, in the order of the backward pass; None where none is.

    operation_errors: what check_operations yields; parameter_errors: of several weightings, (name, error).
    """
    connected = "though every operation is right alone; look at how the backward of its block connects them"
    faults = [f"{name}: {part} off by {error:.2g}" for name, part, error in operation_errors if not error < TOLERANCE]
    faults += [f"{name}: off by {error:.2g}, {connected}" for name, error in parameter_errors if not error < TOLERANCE]
    return f"{faults[0]}; everything before it in the backward pass inherits that" if faults else None
