"""One training step spread over workers: lanes of micro-batches whose gradients are summed.

A batch is cut into micro-batches of about equal size, and these are dealt to a fixed number of
lanes, whatever the number of workers. A lane runs its micro-batches in order and adds up its own
gradient; the lanes are then summed in order. Which worker ran a lane changes nothing, so the
result is the same to the last bit on one core or on many.

Training workers are processes over shared memory: a step is thousands of short NumPy calls, and
threads would queue for the interpreter between them. Ranking and decomposing are few, large calls,
for which threads do (`worker_map`). Every worker has one BLAS thread, also when it is alone: more of
them gain little inside one small product, and idle ones spin on the cores that others need.

Symbols: B sequences, P parameters.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import threadpool_limits

from minirec.backend import generator, plan
from minirec.errors import UserError
from minirec.model import add_gradients, pack, parameter_count, views
from minirec.optimizer import adam_step

UPDATE_SIZE = 1 << 16  # parameters that Adam updates at a time: they and their moments stay in cache
# A forked worker starts at once and shares the log's memory, but not every system's BLAS survives a fork.
PROCESSES = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


def usable_cores():
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@contextlib.contextmanager
def worker_map(n, xp):
    """Yield a `map` that runs on n threads, each with one BLAS thread; its results come in order.

    On a GPU (xp is CuPy) one thread is enough to feed the device, whatever n.
    """
    with threadpool_limits(1, "blas"):
        if n == 1 or xp is not np:
            yield map
            return
        pool = ThreadPoolExecutor(n)
        try:
            yield pool.map
        finally:
            pool.shutdown(cancel_futures=True)


def cut(lengths, lanes, micro_batch_tokens):
    """Deal a batch to lanes.

    lengths [B] of the sequences. They are sorted by length (equal lengths make dense groups for
    attention) and cut into lanes * r micro-batches of about equal token counts; lane i gets every
    lanes-th of them from the i-th on, so that each has long and short ones.
    Returns, for each lane, a list of index arrays into `lengths`.
    """
    order = np.argsort(lengths, kind="stable")
    ordered = lengths[order]
    total = int(ordered.sum())
    n = lanes * -(-total // (lanes * micro_batch_tokens))
    middles = np.cumsum(ordered) - ordered / 2  # where the middle of each sequence falls, in tokens
    piece = (middles * n / total).astype(int)
    pieces = [order[piece == i] for i in range(n)]
    return [[p for p in pieces[lane::lanes] if len(p)] for lane in range(lanes)]


class Memory:
    """What all workers see: parameters, moments and a gradient a lane, flat; on the CPU in shared memory."""

    NAMES = ("parameters", "first_moment", "second_moment")

    def __init__(self, config, xp):
        self.lanes, self.size = plan(xp).lanes, parameter_count(config)
        n = len(self.NAMES) + self.lanes
        if xp is np:
            self.shared = PROCESSES.RawArray(ctypes.c_float, n * self.size)
        else:
            self.shared = xp.zeros(n * self.size, xp.float32)

    def arrays(self):
        """Return {"parameters", "first_moment", "second_moment": [P], "gradients": [lanes, P]}, all views."""
        whole = self.shared
        if not hasattr(whole, "reshape"):
            whole = np.frombuffer(whole, np.float32)
        rows = whole.reshape(-1, self.size)
        return dict(zip(self.NAMES, rows)) | {"gradients": rows[len(self.NAMES) :]}


class Worker:
    """One of n: it computes every n-th lane and updates every n-th slice of the parameters."""

    def __init__(self, memory, config, sequence, xp, rank, n):
        self.__dict__.update(memory.arrays())
        self.config, self.sequence, self.xp, self.rank, self.n = config, sequence, xp, rank, n
        self.views = views(self.parameters, config)

    def compute_gradients(self, starts, lengths, key):
        """Fill this worker's lanes with the gradients of one batch; return their losses, one a lane.

        starts, lengths [B] of the inputs in `sequence` (see model.pack); key: integers (seed, step)
        that, with lane and micro-batch, seed the dropout.
        """
        scale = 1 / int(lengths.sum())
        pieces = cut(lengths, len(self.gradients), plan(self.xp).micro_batch_tokens)
        losses = []
        for lane in range(self.rank, len(pieces), self.n):
            self.gradients[lane] = 0
            gradients = views(self.gradients[lane], self.config)
            loss = 0.0
            for i, piece in enumerate(pieces[lane]):
                batch = pack(self.sequence, starts[piece], lengths[piece], self.xp)
                rng = generator(self.xp, *key, lane, i)
                loss = loss + add_gradients(self.views, self.config, batch, scale, gradients, rng)
            losses.append(loss)
        return losses

    def update(self, step, learning_rate):
        """Sum the lanes, in order, and take one Adam step with the sum, in this worker's slices."""
        size = UPDATE_SIZE if self.xp is np else len(self.parameters)
        for start in range(self.rank * size, len(self.parameters), self.n * size):
            part = slice(start, start + size)
            gradient = self.gradients[0, part]
            for other in self.gradients[1:, part]:
                gradient += other
            moments = self.first_moment[part], self.second_moment[part]
            adam_step(self.parameters[part], gradient, *moments, step, learning_rate)


def serve(connection, others, *worker):
    """A worker process: do what the parent sends until it closes the connection, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    for other in others:  # copies of the parent's ends, which would keep the connections open after it
        other.close()
    with threadpool_limits(1, "blas"), contextlib.suppress(EOFError, OSError):
        worker = Worker(*worker)
        while True:
            method, arguments = connection.recv()
            try:
                result = getattr(worker, method)(*arguments)
            except Exception as error:
                result = error
            connection.send(result)


class Team:
    """All workers of a run, this process among them; a context manager.

    config: the model's; sequence: all histories end to end, on the host; xp: the array module; n: how
    many workers, at most one a lane (on a GPU: one). The arrays of `memory` are here as attributes.
    """

    def __init__(self, config, sequence, xp, n):
        memory = Memory(config, xp)
        n = min(n, memory.lanes)
        self.lead = Worker(memory, config, sequence, xp, 0, n)
        self.__dict__.update(memory.arrays())
        self.connections, self.processes = [], []
        for rank in range(1, n):
            ours, theirs = PROCESSES.Pipe()
            self.connections.append(ours)
            others = self.connections if PROCESSES.get_start_method() == "fork" else []
            arguments = (theirs, others, memory, config, sequence, xp, rank, n)
            self.processes.append(PROCESSES.Process(target=serve, args=arguments, daemon=True))
            self.processes[-1].start()
            theirs.close()  # so that the connection breaks if the worker dies

    def __enter__(self):
        self.limits = threadpool_limits(1, "blas")
        return self

    def __exit__(self, *_):
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join()
        self.limits.restore_original_limits()

    def _all(self, method, *arguments):
        """Call a method on every worker; return the results in the order of ranks."""
        try:
            for connection in self.connections:
                connection.send((method, arguments))
            results = [getattr(self.lead, method)(*arguments)]
            results += [connection.recv() for connection in self.connections]
        except (EOFError, OSError):
            raise UserError("a worker process died (out of memory?); go on with --resume and fewer --workers") from None
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def compute_gradients(self, starts, lengths, key):
        """Fill all lanes; return the batch's mean loss, a 0-d array on the device (see Worker)."""
        losses = self._all("compute_gradients", starts, lengths, key)
        n = len(losses)
        return sum(losses[lane % n][lane // n] for lane in range(len(self.gradients)))

    def update(self, step, learning_rate):
        """Take one Adam step with the sum of the lanes (see Worker)."""
        self._all("update", step, learning_rate)
