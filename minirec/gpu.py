"""The door to a GPU: finding one with its CuPy, and marking what a GPU should do in one launch.

The only file that imports CuPy, and only when it is asked for.
"""

import ctypes
import functools
import importlib.util
from contextlib import contextmanager, suppress

import numpy as np

from minirec.errors import UserError

BACKENDS = ("numpy", "cupy")
PACKAGES = {12: "cupy-cuda12x", 13: "cupy-cuda13x"}  # by CUDA; the extras gpu and gpu13 of setup.cfg install them
DRIVERS = ("libcuda.so.1", "nvcuda.dll")


def load(name):
    """Return the array module for a backend.

    name: "numpy" or "cupy". Raises UserError where CuPy or a GPU is missing, or the two do not fit.
    """
    if name == "numpy":
        return np
    if importlib.util.find_spec("cupy") is None:
        raise UserError(f"--backend cupy: CuPy is not installed; {fitting_install()}, or use --backend numpy")
    with _or_say("CuPy cannot be imported", f"reinstall it: {fitting_install()}"):
        import cupy
    with _or_say("no usable GPU", "check nvidia-smi"):
        devices = cupy.cuda.runtime.getDeviceCount()
    if devices == 0:
        raise UserError("--backend cupy: no GPU found; check nvidia-smi, or use --backend numpy")
    with _or_say("CuPy cannot use the GPU", f"install the CuPy that fits the driver's CUDA: {fitting_install()}"):
        cupy.ones(2) @ cupy.ones(2)  # needs the compiler and the BLAS of its flavour
    return cupy


def driver_cuda():
    """Return the newest CUDA that the driver is for, such as 12.8; None where there is no driver.

    A driver runs programs of older versions too, but a CuPy of a newer one than this fails.
    """
    for name in DRIVERS:
        with suppress(OSError, AttributeError):
            version = ctypes.c_int()
            if ctypes.CDLL(name).cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value:
                return version.value // 1000 + version.value % 1000 // 10 / 10
    return None


def fitting_install():
    """Return the command that installs the CuPy for this machine's driver, or all where no driver tells."""
    cuda = driver_cuda()
    fitting = [major for major in PACKAGES if cuda and major <= cuda]
    if not fitting:
        return " or ".join(f"pip install {x} (CUDA {major})" for major, x in PACKAGES.items()) + ", as nvidia-smi shows"
    return f"pip install {PACKAGES[max(fitting)]} (the driver is for CUDA {cuda})"


@contextmanager
def _or_say(what, remedy):
    """Turn any error, whose classes are CuPy's own and may not even load, into one line."""
    try:
        yield
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--backend cupy: {what} ({reason}); {remedy}, or use --backend numpy") from None


TWINS = {}  # {name: function}, of kernels.py


def fused(plain):
    """Mark a function that kernels.py has once more for a GPU, with fewer launches.

    It is computed as it stands on the CPU, and where its twin of the same name returns NotImplemented. To a GPU a
    small operation costs its launch, so a layer norm of nine operations should be one.
    """

    @functools.wraps(plain)
    def either(*arguments):
        twin = None if isinstance(arguments[0], np.ndarray) else TWINS.get(plain.__name__)
        out = twin(*arguments) if twin else NotImplemented
        return plain(*arguments) if out is NotImplemented else out

    return either
