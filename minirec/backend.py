"""Which array library computes: NumPy on the CPU, or CuPy on a GPU.

The only file that imports CuPy, and only when it is asked for. Everything else is written once, against the
functions that the two libraries share; `xp` is the one in use. Where they differ, the difference lives here.
"""

import importlib.util
import sys
from contextlib import contextmanager

import numpy as np

from minirec.errors import UserError

BACKENDS = ("numpy", "cupy")


def load(name):
    """Return the array module for a backend.

    name: "numpy" or "cupy". Raises UserError where CuPy or a GPU is missing, or the two do not fit.
    """
    if name == "numpy":
        return np
    if importlib.util.find_spec("cupy") is None:
        raise UserError(
            "--backend cupy: CuPy is not installed; pip install 'cupy-cuda12x' (for CUDA 12), or use --backend numpy"
        )
    with _or_say("CuPy cannot be imported", "reinstall the one that fits your CUDA, such as 'cupy-cuda12x'"):
        import cupy
    with _or_say("no usable GPU", "check nvidia-smi"):
        devices = cupy.cuda.runtime.getDeviceCount()
    if devices == 0:
        raise UserError("--backend cupy: no GPU found; check nvidia-smi, or use --backend numpy")
    with _or_say("CuPy cannot use the GPU", "install the CuPy that fits the driver's CUDA, such as 'cupy-cuda12x'"):
        cupy.ones(2) @ cupy.ones(2)  # needs the compiler and the BLAS of its flavour
    return cupy


@contextmanager
def _or_say(what, remedy):
    """Turn any error, whose classes are CuPy's own and may not even load, into one line."""
    try:
        yield
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--backend cupy: {what} ({reason}); {remedy}, or use --backend numpy") from None


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


def generator(xp, *key):
    """Return a random generator of module xp whose stream depends on the integers of `key` alone.

    A device generator's state cannot be saved, so nothing keeps one. Every micro-batch derives a new one from
    (seed, step, its number), so that results do not depend on which worker computes it.
    """
    sequence = np.random.SeedSequence(key)
    if xp is np:
        return np.random.Generator(np.random.PCG64DXSM(sequence))
    return xp.random.Generator(xp.random.Philox4x3210(int(sequence.generate_state(1)[0])))


def random_uint16(rng, n, xp):
    """Return n random 16-bit integers [n]; the generator draws words, and a word holds several of them."""
    word, bits = (xp.uint64, 64) if xp is np else (xp.uint32, 32)  # CuPy's integers end at 63 bits
    return rng.integers(0, 1 << bits, -(-n * 16 // bits), dtype=word).view(xp.uint16)[:n]


# Sums


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
