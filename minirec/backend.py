"""Which array library computes: NumPy on the CPU, or CuPy on a GPU.

Everything else is written once, against the functions that the two libraries share; `xp` is the one in use. Where
they differ, the difference lives here. The mark @fused is for a GPU only (gpu.py): pass over it.
"""

import sys

import numpy as np

from minirec.gpu import BACKENDS as BACKENDS
from minirec.gpu import fused
from minirec.gpu import load as load


def get_array_module(x):
    """Return the module that array x belongs to: numpy, or cupy (imported already, since x exists)."""
    return np if isinstance(x, (np.ndarray, np.generic)) else sys.modules["cupy"]


def to_device(x, xp):
    """Return host array x as an array of module xp; one copy on a GPU, none on the CPU."""
    return xp.asarray(x)


def to_host(x):
    """Return array x as a NumPy array; waits for the device where there is one."""
    return x if isinstance(x, (np.ndarray, np.generic)) else x.get()


# Random numbers


@fused
def generator(xp, *key):
    """Return a random generator of module xp whose stream depends on the integers of `key` alone.

    A device generator's state cannot be saved, so nothing keeps one. Every micro-batch derives a new one from
    (seed, step, its number), so that results do not depend on which worker computes it.
    """
    sequence = np.random.SeedSequence(key)
    if xp is np:
        return np.random.Generator(np.random.PCG64DXSM(sequence))
    return xp.random.Generator(xp.random.Philox4x3210(int(sequence.generate_state(1)[0])))


@fused
def random_uint16(rng, n, xp):
    """Return n random 16-bit integers [n]; the generator draws words, and a word holds several of them."""
    word, bits = (xp.uint64, 64) if xp is np else (xp.uint32, 32)  # CuPy's integers end at 63 bits
    return rng.integers(0, 1 << bits, -(-n * 16 // bits), dtype=word).view(xp.uint16)[:n]


# Products and sums


@fused
def matmul(a, b):
    """Return a @ b. A GPU reads transposed operands where they lie, and need not copy them first."""
    return a @ b


def row_sum(x):
    """Return the sum of each row of x [..., n], as [..., 1].

    On the CPU as a product with ones: BLAS adds up many short rows several times faster than NumPy does.
    """
    xp = get_array_module(x)
    return x @ xp.ones((x.shape[-1], 1), x.dtype) if xp is np else x.sum(axis=-1, keepdims=True)


def row_mean(x):
    """Return the mean of each row of x [..., n], as [..., 1]; a product, as in row_sum."""
    xp = get_array_module(x)
    return x @ xp.full((x.shape[-1], 1), 1 / x.shape[-1], x.dtype) if xp is np else x.mean(axis=-1, keepdims=True)


def column_sum(x):
    """Return the sum of each column of x [N, D], as [D]; a product, as in row_sum."""
    xp = get_array_module(x)
    return xp.ones(len(x), x.dtype) @ x if xp is np else x.sum(axis=0)


def scatter_add(target, index, rows):
    """Add rows to target[index], in place, where index may repeat.

    target [V, D], index [N] integers, rows [N, D]. `target[index] += rows` would lose all but one of the repeats.
    On the CPU: sort, sum the rows of each item, add. That is several times faster than numpy.add.at.
    """
    xp = get_array_module(target)
    if xp is not np:
        xp.add.at(target, index, rows)
        return
    order = np.argsort(index, kind="stable")
    ordered = index[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    target[ordered[starts]] += np.add.reduceat(rows[order], starts, axis=0)
