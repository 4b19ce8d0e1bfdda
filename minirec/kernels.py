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
import sys
from pathlib import Path

import numpy as np

from minirec import attention
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
        self.numbers("random_uint16", 1, cupy.empty(8, np.uint16), 8, 0, 0)  # a stand-in refuses here
        cublas = cupy.cuda.cublas
        self.handle = cupy.cuda.device.get_cublas_handle
        self.gemm = cublas.sgemm if char == "f" else cublas.dgemm
        self.gemms = cublas.sgemmStridedBatched if char == "f" else cublas.dgemmStridedBatched
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
        for x in arrays:
            if x.dtype != self.dtype or not x.flags.c_contiguous or not x.size:
                return False
        return True

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


def twin(at):
    """Let function(device, *arguments) take the place of the marked one of its name, where there is a device.

    at: which of `arguments` is an array that tells where they lie.
    """

    def register(function):
        def call(*arguments):
            like = arguments[at]
            device = None if isinstance(like, np.ndarray) else device_of(sys.modules["cupy"], like.dtype.char)
            return function(device, *arguments) if device else NotImplemented

        TWINS[function.__name__] = call
        return call

    return register


# Products


@functools.lru_cache(maxsize=4096)
def layout(shape, strides, itemsize):
    """Return how cuBLAS reads an array [..., m, n]: (transposed or not, stride of rows, of matrices), or None.

    strides: in bytes; those returned are in numbers.
    """
    *outer, row, column = (stride // itemsize for stride in strides)
    m, n = shape[-2:]
    if column == 1 and row >= n:
        transposed, rows = 0, row
    elif row == 1 and column >= m:
        transposed, rows = 1, column
    else:
        return None
    if 0 in shape or any(outer[i] != outer[i + 1] * shape[i + 1] for i in range(len(outer) - 1)):
        return None
    return transposed, rows, outer[-1] if outer else 0


def layout_of(x):
    return layout(x.shape, x.strides, x.itemsize)


def product(device, a, b, add_to=None):
    """Return a @ b, or add it to add_to: a [..., m, k], b [..., k, n], one of them perhaps a single matrix."""
    a_shape, b_shape = a.shape, b.shape
    stack = a_shape[:-2] or b_shape[:-2]
    a_layout, b_layout = layout_of(a), layout_of(b)
    fits = a_layout and b_layout and b_shape[:-2] in ((), stack) and a_shape[-1] == b_shape[-2]
    if not fits or not a.dtype == b.dtype == device.dtype or add_to is not None and not device.reads(add_to):
        return NotImplemented
    (m, k), n = a_shape[-2:], b_shape[-1]
    out, beta = (device.empty(*stack, m, n), device.zero) if add_to is None else (add_to, device.one)
    # cuBLAS counts along columns, so it takes each array for its transpose: out^T = b^T a^T.
    (a_transposed, a_rows, a_stride), (b_transposed, b_rows, b_stride) = a_layout, b_layout
    sizes = device.handle(), b_transposed, a_transposed, n, m, k, device.one
    a, b = (a.data.ptr, a_rows), (b.data.ptr, b_rows)
    if stack:
        out_strides = n, m * n, math.prod(stack)
        device.gemms(*sizes, *b, b_stride, *a, a_stride, beta, out.data.ptr, *out_strides)
    else:
        device.gemm(*sizes, *b, *a, beta, out.data.ptr, n)
    return out


@twin(0)
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


@twin(0)
def linear_backward(device, d_out, cache, d_w, d_b):
    if not device.reads(d_out, d_w, d_b) or d_out.shape[1] > MOST_TILES * WARP or None in map(layout_of, cache):
        return NotImplemented
    product(device, cache.x.T, d_out, d_w)
    column_sums(device, d_out, d_b)
    return product(device, d_out, cache.w.T)


@twin(3)
def dropout_mask(device, shape, rate, rng, like):
    if not isinstance(rng, Stream) or rate == 0:
        return NotImplemented
    mask = device.empty(*shape)
    _draw(device, None, None, mask, rate, rng)
    return mask


@twin(0)
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


@twin(0)
def layer_norm(device, x, gamma, beta):
    if not device.reads(x, gamma, beta):
        return NotImplemented
    n, d = x.shape
    out, normed, sigma = device.empty(n, d), device.empty(n, d), device.empty(n, 1)
    device.rows("layer_norm", n, x, gamma, beta, out, normed, sigma, n, d, LAYER_NORM_EPS)
    return out, LayerNormCache(normed, sigma, gamma)


@twin(0)
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


@twin(0)
def to_heads(device, x, bucket, n_heads):
    if not device.reads(x):
        return NotImplemented
    out = device.empty(bucket.count, n_heads, bucket.length, x.shape[1] // n_heads)
    sizes = bucket.start, bucket.stop - bucket.start, bucket.count, bucket.length, *out.shape[1::2]
    device.numbers("to_heads", out.size, x, *_places(bucket), out, *sizes)
    return out


@twin(0)
def from_heads(device, x_heads, bucket, out):
    if not device.reads(x_heads, out):
        return NotImplemented
    _, n_heads, length, k = x_heads.shape
    n = bucket.stop - bucket.start
    device.numbers("from_heads", n * n_heads * k, x_heads, *_places(bucket), out, bucket.start, n, length, n_heads, k)


# attention.py


@functools.lru_cache(maxsize=16)
def constant(function, device, *arguments):
    """Return what function(*arguments, like) computes, which depends on sizes alone and is the same in every step."""
    return function.__wrapped__(*arguments, device.empty(1))


@twin(1)
def causal_mask(device, length, like):
    return constant(attention.causal_mask, device, length)


@twin(2)
def fixed_weights(device, weighting, length, like):
    return constant(attention.fixed_weights, device, weighting, length)


@twin(0)
def softmax(device, scores, mask):
    length = scores.shape[-1]
    mask_layout = layout_of(mask)
    if not device.reads(scores) or mask.shape != (length, length) or mask_layout is None or mask_layout[0]:
        return NotImplemented
    n = scores.size // length
    device.rows("softmax", n, scores, mask, mask_layout[1], n, length)
    return scores


@twin(0)
def softmax_backward(device, d_dropped, weights, dropped, d_mixed, mixed):
    if not device.reads(d_dropped, weights, dropped) or not d_dropped.shape == weights.shape == dropped.shape:
        return NotImplemented
    length = d_dropped.shape[-1]
    n = d_dropped.size // length
    device.rows("softmax_backward", n, d_dropped, weights, dropped, n, length)
    return d_dropped


# loss.py


@twin(0)
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


@twin(0)
def adam_step(device, parameters, gradient, first_moment, second_moment, step, learning_rate):
    arrays = parameters, gradient, first_moment, second_moment
    if not device.reads(*arrays) or len({x.shape for x in arrays}) > 1:
        return NotImplemented
    factors = 1 - BETA_1, 1 - BETA_2, 1 / math.sqrt(1 - BETA_2**step), EPS, learning_rate / (1 - BETA_1**step)
    device.numbers("adam_step", parameters.size, *arrays, parameters.size, *map(float, factors))
