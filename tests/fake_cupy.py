"""A stand-in for CuPy on the CPU that refuses what CuPy refuses, for tests where there is no GPU.

It is a list of rules, not a copy of CuPy: the functions named in FUNCTIONS exist, arrays meet only
arrays and Python numbers, a NumPy array is never taken for one, reading a value on the host is counted as
a synchronisation, and each operation as a launch. It says nothing about a GPU's rounding or speed.
"""

import importlib.machinery
import sys
import types
from collections import Counter
from contextlib import contextmanager

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

FUNCTIONS = (
    "abs add arange broadcast_to concatenate diagonal empty empty_like exp eye full isfinite log logaddexp maximum"
)
FUNCTIONS += " minimum multiply ones ones_like sqrt subtract tanh tri triu where zeros zeros_like"
REDUCTIONS = ("add", "multiply")  # CuPy's only ufuncs with reduce
VIEWS = ("reshape", "transpose", "swapaxes", "view", "ravel")  # cost no launch
METHODS = ("sum", "mean", "max", "min", "any", "all", "astype", "copy")
CONSTANTS = ("inf", "float32", "float64", "uint16", "uint32", "uint64", "int32", "int64", "finfo")

counts = Counter()


class Array(NDArrayOperatorsMixin):
    """A device array: the host cannot look into it but through get(), float(), int() or bool()."""

    def __init__(self, host):
        self._host = host

    shape = property(lambda self: self._host.shape)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    dtype = property(lambda self: self._host.dtype)
    T = property(lambda self: Array(self._host.T))

    def __len__(self):
        return len(self._host)

    def __array__(self, *_, **__):
        raise TypeError("implicit conversion of a device array to NumPy")

    def __iter__(self):
        return (Array(row) for row in self._host)

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **keywords):
        if method not in ("__call__", "at") and not (method == "reduce" and ufunc.__name__ in REDUCTIONS):
            raise TypeError(f"no {ufunc.__name__}.{method} on the device")
        if "where" in keywords or "initial" in keywords:
            raise TypeError("ufuncs on the device take no where= and no initial=")
        counts["launches"] += 1
        if out is not None:
            keywords["out"] = tuple(bare(x) for x in out)
        return wrapped(getattr(ufunc, method)(*map(bare, inputs), **keywords))

    def __getitem__(self, index):
        bare_index = bare_indices(index)
        if any(isinstance(i, np.ndarray) for i in bare_index):
            counts["launches"] += 1
        return wrapped(self._host[bare_index])

    def __setitem__(self, index, value):
        counts["launches"] += 1
        self._host[bare_indices(index)] = bare(value)

    def _synchronise(self, convert):
        counts["synchronisations"] += 1
        return convert(self._host)

    def get(self):
        return self._synchronise(np.copy)

    def __float__(self):
        return self._synchronise(float)

    def __int__(self):
        return self._synchronise(int)

    def __bool__(self):
        return self._synchronise(bool)


def method(name):
    def call(self, *arguments, **keywords):
        counts["launches"] += name not in VIEWS
        return wrapped(getattr(self._host, name)(*map(bare, arguments), **keywords))

    return call


for name in VIEWS + METHODS:
    setattr(Array, name, method(name))


def bare(x):
    """What is inside an Array; a NumPy array or a list in its place is what CuPy refuses."""
    if isinstance(x, Array):
        return x._host
    if isinstance(x, np.ndarray) or isinstance(x, list) and any(isinstance(i, (Array, np.ndarray)) for i in x):
        raise TypeError(f"{type(x).__name__} where a device array is needed")
    return x


def bare_indices(index):
    indices = index if isinstance(index, tuple) else (index,)
    for i in indices:
        if isinstance(i, (list, np.ndarray)):
            raise TypeError(f"a {type(i).__name__} as an index of a device array")
        if isinstance(i, Array):
            if i.dtype == bool:
                raise TypeError("a boolean index synchronises")
    return tuple(bare(i) for i in indices)


def wrapped(x):
    return Array(np.asarray(x)) if isinstance(x, (np.ndarray, np.generic)) else x


def function(name):
    def call(*arguments, **keywords):
        counts["launches"] += name != "broadcast_to"
        if name == "concatenate":
            arguments = ([bare(x) for x in arguments[0]], *arguments[1:])
        if keywords.get("out") is not None:
            keywords["out"] = bare(keywords["out"])
        return wrapped(getattr(np, name)(*map(_bare_or_list, arguments), **keywords))

    return call


def _bare_or_list(x):
    return x if isinstance(x, list) else bare(x)


class Generator:
    """CuPy's generators draw integers, among a few others; their streams are not NumPy's."""

    def __init__(self, bits):
        self._rng = np.random.Generator(np.random.Philox(key=bits))

    def integers(self, *arguments, **keywords):
        counts["launches"] += 1
        return Array(self._rng.integers(*arguments, **keywords))


def asarray(x, dtype=None):
    """The one explicit way to the device."""
    if isinstance(x, Array):
        return x
    counts["uploads"] += 1
    counts["uploaded bytes"] += np.asarray(x).nbytes
    return Array(np.array(x, dtype))


class _Module(types.ModuleType):
    def __getattr__(self, name):
        raise AttributeError(f"the stand-in for CuPy has no {name}: does CuPy have it, and does it synchronise?")


@contextmanager
def installed():
    """Let `import cupy` find the stand-in, with one device, for as long as the context lasts; yield it."""
    cupy = _Module("cupy")
    for name in FUNCTIONS.split():
        setattr(cupy, name, function(name))
    for name in CONSTANTS:
        setattr(cupy, name, getattr(np, name))
    cupy.asarray, cupy.ndarray = asarray, Array
    cupy.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
    cupy.add = types.SimpleNamespace(at=lambda a, i, b: np.add.at(bare(a), bare(i), bare(b)))
    cupy.random = types.SimpleNamespace(Generator=Generator, Philox4x3210=lambda seed: seed)
    runtime = types.SimpleNamespace(getDeviceCount=lambda: 1)
    cupy.cuda = types.SimpleNamespace(runtime=runtime)
    before = sys.modules.get("cupy")
    sys.modules["cupy"] = cupy
    counts.clear()
    try:
        yield cupy
    finally:
        del sys.modules["cupy"]
        if before is not None:
            sys.modules["cupy"] = before
