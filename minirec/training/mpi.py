"""The processes that an MPI launcher started, as one team: `mpiexec -n 4 python cli.py train`.

Each of these ranks computes a part of a batch's gradient, and one Allreduce adds the parts up. Then all ranks take the
same Adam step. This is the only file of training that imports MPI, and only where a launcher started this process.
"""

import contextlib
import os
import sys

import numpy as np

from minirec.backend import get_array_module, to_device, to_host
from minirec.errors import UserError

LAUNCHED = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")  # the environment variables in which launchers put a rank


def launched_rank():
    """Return this process's rank where an MPI launcher started it, else None. MPI itself is not imported."""
    return next((int(os.environ[name]) for name in LAUNCHED if name in os.environ), None)


class Ranks:
    """The processes of an MPI run, this one among them; without a communicator, this one alone.

    buffers: "host" to pass device arrays to MPI by way of the host, "device" where the MPI library can
    read a GPU's memory.
    """

    def __init__(self, communicator=None, buffers="host"):
        self.communicator, self.buffers = communicator, buffers
        self.rank, self.size = (communicator.rank, communicator.size) if communicator else (0, 1)

    def allreduce(self, x):
        """Replace array x by its sum over all ranks, in place."""
        if self.size == 1:
            return
        from mpi4py import MPI

        passed, xp = x if self.buffers == "device" else to_host(x), get_array_module(x)
        if xp is not np:
            xp.cuda.get_current_stream().synchronize()
        self.communicator.Allreduce(MPI.IN_PLACE, passed)
        if passed is not x:
            x[...] = to_device(passed, xp)

    def gather(self, value):
        """Return the values of all ranks, in order, on each of them."""
        return self.communicator.allgather(value) if self.size > 1 else [value]

    def broadcast(self, compute):
        """Return compute() of rank 0 on all ranks."""
        value = compute() if self.rank == 0 else None
        return self.communicator.bcast(value) if self.size > 1 else value


def launched_ranks(buffers="host"):
    """Return the Ranks that a launcher started, or this process alone.

    Raises UserError where there was a launcher and mpi4py is missing.
    """
    if launched_rank() is None:
        return Ranks()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        found = f"an MPI launcher, but no mpi4py ({str(error).splitlines()[0]})"
        raise UserError(f"started by {found}: pip install mpi4py") from None
    return Ranks(MPI.COMM_WORLD, buffers)


def abort():
    """End all ranks, this one among them, if a launcher started them: the others would wait for this one for ever."""
    if launched_rank() is None:
        return
    with contextlib.suppress(ImportError, RuntimeError):  # without MPI the launcher sees to it
        from mpi4py import MPI

        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(1)
