"""On a GPU, one launch for several: the functions that are marked @fused, once more.

Nothing here is needed to understand the model. A small operation on a GPU is done before the host has launched the
next one, so a step takes as long as its launches. Where the lesson writes a layer norm as nine operations, a GPU gets
one. Each function here takes the place of the marked one of its name: with a kernel of kernels.cu, and with products
that add to their result and read transposed operands where they lie. The tests hold the two equal.

A function here returns NotImplemented where its arguments are not what its kernel reads (contiguous arrays of one
dtype, float32 or float64). Then the marked one computes, as it does where CuPy is a stand-in that runs no kernels.
"""

import functools
import math
from pathlib import Path

import numpy as np

from minirec.backend import get_array_module
from minirec.gpu import TWINS
from minirec.ops import LAYER_NORM_EPS, LayerNormCache
from minirec.optimizer import BETA_1, BETA_2, EPS
from minirec.packing import chunk_rows

SOURCE = Path(__file__).with_name("kernels.cu")
TYPES = {"f": "float", "d": "double"}
ROWS, WARP, STRIPES, THREADS = 4, 32, 16, 256  # as in kernels.cu
MOST_TILES = 1024  # of WARP columns, in column_sums
PART, MOST_PARTS = 256, 64  # rows of a part of column_sums, where that makes no more parts than this


class Device:
    """The compiled kernels and the matrix product of one dtype."""

    def __init__(self, cupy, char):
        self.cupy, self.dtype = cupy, np.dtype(char)
        options = ("--std=c++17", f"-DREAL={TYPES[char]}")
        self.kernel = functools.cache(cupy.RawModule(code=SOURCE.read_text(), options=options).get_function)
        self.numbers("causal_mask", 1, self.empty(1, 1), 1, 0.0)  # a stand-in refuses here
        cublas = cupy.cuda.cublas
        self.gemm = cublas.sgemmStridedBatched if char == "f" else cublas.dgemmStridedBatched
        self.constants = np.array([0, 1], self.dtype)  # kept: the products read them by address
        self.zero, self.one = (self.constants[i:].ctypes.data for i in range(2))

    def rows(self, name, n, *arguments):
        """Launch a kernel with a warp for each of n rows."""
        self.kernel(name)((-(-n // ROWS),), (ROWS * WARP,), arguments)

    def numbers(self, name, n, *arguments):
        """Launch a kernel with a thread for each of n numbers."""
        self.kernel(name)((-(-n // THREADS),), (THREADS,), arguments)

    def reads(self, *arrays):
        """Return whether the kernels can read these arrays: contiguous, of this dtype, and not empty."""
        return all(x.dtype == self.dtype and x.flags.c_contiguous and x.size for x in arrays)

    def empty(self, *shape):
        return self.cupy.empty(shape, self.dtype)


@functools.cache
def device_of(cupy, char):
    """Return the Device of module cupy and a dtype; None where the dtype has none, or a stand-in runs no kernels."""
    if char not in TYPES or not hasattr(cupy, "RawModule"):
        return None
    try:
        return Device(cupy, char)
    except NotImplementedError:
        return None


def twin(function):
    """Let function(device, *arguments) take the place of the marked one of its name, where there is a device.

    Where its array lies is told by the last of `arguments` that is one.
    """

    def call(*arguments):
        like = next(x for x in reversed(arguments) if hasattr(x, "dtype"))
        device = None if isinstance(like, np.ndarray) else device_of(get_array_module(like), like.dtype.char)
        return function(device, *arguments) if device else NotImplemented

    TWINS[function.__name__] = call
    return call


# Products


def layout(x):
    """Return how cuBLAS reads x [..., m, n]: (whether transposed, stride of rows, of matrices); None if it cannot."""
    *outer, row, column = (stride // x.itemsize for stride in x.strides)
    m, n = x.shape[-2:]
    if column == 1 and row >= n:
        transposed, rows = 0, row
    elif row == 1 and column >= m:
        transposed, rows = 1, column
    else:
        return None
    if any(outer[i] != outer[i + 1] * x.shape[i + 1] for i in range(len(outer) - 1)):
        return None
    return transposed, rows, outer[-1] if outer else 0


def product(device, a, b, add_to=None):
    """Return a @ b, or add it to add_to: a [..., m, k], b [..., k, n], one of them perhaps a single matrix."""
    stack = a.shape[:-2] or b.shape[:-2]
    a_layout, b_layout = layout(a), layout(b)
    fits = a_layout and b_layout and a.size and b.size and b.shape[:-2] in ((), stack) and a.shape[-1] == b.shape[-2]
    if not fits or not a.dtype == b.dtype == device.dtype or add_to is not None and not device.reads(add_to):
        return NotImplemented
    (m, k), n = a.shape[-2:], b.shape[-1]
    out = device.empty(*stack, m, n) if add_to is None else add_to
    # cuBLAS counts along columns, so it takes each array for its transpose: out^T = b^T a^T.
    (a_transposed, a_rows, a_stride), (b_transposed, b_rows, b_stride) = a_layout, b_layout
    device.gemm(
        *(device.cupy.cuda.device.get_cublas_handle(), b_transposed, a_transposed, n, m, k, device.one),
        *(b.data.ptr, b_rows, b_stride, a.data.ptr, a_rows, a_stride),
        *(device.zero if add_to is None else device.one, out.data.ptr, n, m * n, math.prod(stack)),
    )
    return out


@twin
def matmul(device, a, b):
    return product(device, a, b)


def column_sums(device, x, sum_x, y=None, sum_xy=None):
    """Add the sums of x's columns to sum_x, and those of x * y to sum_xy: x, y [N, D], sums [D]."""
    n, d = x.shape
    parts = max(1, min(MOST_PARTS, n // PART))
    blocks = (-(-d // WARP), parts)
    device.kernel("column_sums")(blocks, (WARP, STRIPES), (x, y, sum_x, sum_xy, device.empty(parts, 2, d), n, d))


# Random numbers


class Stream:
    """Random words that depend on a seed and on how many were drawn before: a counter, no state on the device."""

    def __init__(self, seed):
        self.seed, self.drawn = seed, 0

    def take(self, n):
        """Return (seed, the first counter) for n 16-bit numbers, which nobody else gets."""
        first = self.drawn
        self.drawn += -(-n // 8)
        return self.seed, first


def generator(xp, *key):
    if xp is np or device_of(xp, "f") is None:
        return NotImplemented
    return Stream(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)))


def random_uint16(rng, n, xp):
    if not isinstance(rng, Stream):
        return NotImplemented
    out = xp.empty(n, xp.uint16)
    device_of(xp, "f").numbers("random_uint16", -(-n // 8), out, n, *rng.take(n))
    return out


TWINS |= {"generator": generator, "random_uint16": random_uint16}


# ops.py


@twin
def linear_backward(device, d_out, cache, d_w, d_b):
    if not device.reads(d_out, d_w, d_b) or d_out.shape[1] > MOST_TILES * WARP or layout(cache.x) is None:
        return NotImplemented
    product(device, cache.x.T, d_out, d_w)
    column_sums(device, d_out, d_b)
    return product(device, d_out, cache.w.T)


@twin
def dropout_mask(device, shape, rate, rng, like):
    if not isinstance(rng, Stream) or rate == 0:
        return NotImplemented
    mask = device.empty(*shape)
    _draw(device, None, None, mask, rate, rng)
    return mask


@twin
def dropout(device, x, rate, rng):
    if not isinstance(rng, Stream) or rate == 0 or not device.reads(x):
        return NotImplemented
    out, mask = device.empty(*x.shape), device.empty(*x.shape)
    _draw(device, x, out, mask, rate, rng)
    return out, mask


def _draw(device, x, out, mask, rate, rng):
    threshold = min(round(rate * 65536), 65535)
    scale = 65536 / (65536 - threshold)
    arguments = (x, out, mask, mask.size, threshold, scale, *rng.take(mask.size))
    device.numbers("dropout", -(-mask.size // 8), *arguments)


@twin
def layer_norm(device, x, gamma, beta):
    if not device.reads(x, gamma, beta):
        return NotImplemented
    n, d = x.shape
    out, normed, sigma = device.empty(n, d), device.empty(n, d), device.empty(n, 1)
    device.rows("layer_norm", n, x, gamma, beta, out, normed, sigma, n, d, LAYER_NORM_EPS)
    return out, LayerNormCache(normed, sigma, gamma)


@twin
def layer_norm_backward(device, d_out, cache, d_gamma, d_beta):
    n, d = d_out.shape
    if not device.reads(d_out, *cache, d_gamma, d_beta) or d > MOST_TILES * WARP:
        return NotImplemented
    column_sums(device, d_out, d_beta, cache.normed, d_gamma)
    d_x = device.empty(n, d)
    device.rows("layer_norm_backward", n, d_out, *cache, d_x, n, d)
    return d_x


# packing.py


def _places(bucket):
    """Return the bucket's places as its kernels take them: (array or None, whether its integers have 64 bits)."""
    return bucket.filled, int(bucket.filled is not None and bucket.filled.itemsize == 8)


@twin
def to_heads(device, x, bucket, n_heads):
    if not device.reads(x):
        return NotImplemented
    out = device.empty(bucket.count, n_heads, bucket.length, x.shape[1] // n_heads)
    sizes = bucket.start, bucket.stop - bucket.start, bucket.count, bucket.length, *out.shape[1::2]
    device.numbers("to_heads", out.size, x, *_places(bucket), out, *sizes)
    return out


@twin
def from_heads(device, x_heads, bucket, out):
    if not device.reads(x_heads, out):
        return NotImplemented
    _, n_heads, length, k = x_heads.shape
    n = bucket.stop - bucket.start
    device.numbers("from_heads", n * n_heads * k, x_heads, *_places(bucket), out, bucket.start, n, length, n_heads, k)


# attention.py


@twin
def causal_mask(device, length, like):
    out = device.empty(length, length)
    device.numbers("causal_mask", out.size, out, length, -math.inf)
    return out


@twin
def softmax(device, scores, mask):
    length = scores.shape[-1]
    if not device.reads(scores) or mask.shape != (length, length) or layout(mask) is None or layout(mask)[0]:
        return NotImplemented
    n = scores.size // length
    device.rows("softmax", n, scores, mask, layout(mask)[1], n, length)
    return scores


@twin
def softmax_backward(device, d_dropped, weights, dropped, d_mixed, mixed):
    if not device.reads(d_dropped, weights, dropped) or not d_dropped.shape == weights.shape == dropped.shape:
        return NotImplemented
    length = d_dropped.shape[-1]
    n = d_dropped.size // length
    device.rows("softmax_backward", n, d_dropped, weights, dropped, n, length)
    return d_dropped


# loss.py


@twin
def cross_entropy(device, x, items, targets, scale, d_items):
    if not device.reads(x, items, d_items):
        return NotImplemented
    xp, scale = device.cupy, float(scale)
    rows, wide = chunk_rows(xp, len(items), x.itemsize), int(targets.itemsize == 8)
    d_x, losses = xp.zeros_like(x), device.empty(len(x))
    for start in range(0, len(x), rows):
        chunk = slice(start, start + rows)
        logits = product(device, x[chunk], items.T)  # [c, V]
        arguments = (logits, targets[chunk], wide, losses[chunk], len(items), scale)
        device.kernel("cross_entropy")((len(logits),), (THREADS,), arguments)  # now scale (p - onehot)
        product(device, logits, items, d_x[chunk])
        product(device, logits.T, x[chunk], d_items)
    return losses.sum(dtype=xp.float64), d_x


# optimizer.py


@twin
def adam_step(device, parameters, gradient, first_moment, second_moment, step, learning_rate):
    arrays = parameters, gradient, first_moment, second_moment
    if not device.reads(*arrays) or len({x.shape for x in arrays}) > 1:
        return NotImplemented
    factors = 1 - BETA_1, 1 - BETA_2, 1 / math.sqrt(1 - BETA_2**step), EPS, learning_rate / (1 - BETA_1**step)
    device.numbers("adam_step", parameters.size, *arrays, parameters.size, *map(float, factors))
