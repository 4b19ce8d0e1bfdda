"""One training step spread over workers: micro-batches whose gradients are summed in a fixed order.

A batch is divided into micro-batches of about equal size. They are dealt to a fixed number of gradient buffers,
whatever the number of workers. A buffer adds up the gradients of its micro-batches in order, and the buffers are then
summed in order. Which worker fills a buffer changes nothing: the result is the same to the last bit on one core or on
many.

Where an MPI launcher started several processes, each of these ranks fills every n-th buffer, with workers of its own
(see mpi.py).

Training workers are processes over shared memory: a step is thousands of short NumPy calls, between which threads would
queue for the interpreter. Ranking and decomposing are a few large calls, for which threads are enough (`worker_map`).
Every worker has one BLAS thread, even when it is alone: more of them gain little inside one small product, and idle
ones spin on the cores that others need.

Symbols: B sequences, P parameters.
"""

import contextlib
import ctypes
import math
import mmap
import multiprocessing
import os
import signal
import sys
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from minirec.backend import generator, to_device
from minirec.data.split import Seen, seen_items, unseen_negatives, windows_end_to_end
from minirec.errors import UserError
from minirec.model import add_gradients
from minirec.optimizer import adam_step
from minirec.packing import micro_batches, pack, plan
from minirec.parameters import parameter_count, unflatten
from minirec.training.mpi import Ranks

VECTORS = ("parameters", "first_moment", "second_moment")
UPDATE_SIZE = 1 << 16  # parameters that Adam updates at a time: they and their moments stay in cache
NEGATIVES = 1 << 16  # the negatives' stream, which no buffer's dropout shares, and which every backend draws alike
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
PR_SET_PDEATHSIG = 1  # from Linux's prctl.h
AHEAD = 4  # results for each thread that worker_map computes before its caller asks for them
MALLOC_KEEPS = 64 << 20  # bytes
SMALLER = "try a smaller --hidden or --max-length, or --loss sampled for many items"
# A forked worker starts at once and shares the log's memory, but not every system's BLAS survives a fork.
PROCESSES = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


def usable_cores():
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def keep_freed_memory():
    """Ask glibc's malloc to keep what is freed instead of returning it to the system.

    Every step frees and takes arrays of the same sizes. Without this, the system hands out each of them anew, page by
    page, and zeroes it. Worker processes inherit the setting.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # other C libraries have none
            libc.mallopt(M_MMAP_THRESHOLD, MALLOC_KEEPS)
            libc.mallopt(M_TRIM_THRESHOLD, MALLOC_KEEPS)


def die_with_parent():
    """Ask Linux to kill this process as soon as its parent is gone: it would go on, and hold the run folder's lock."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def worker_map(n, xp):
    """Yield a `map` of one iterable that runs on n threads, each with one BLAS thread; its results come in order.

    It computes at most AHEAD results a thread before its caller asks for them: a caller that writes results as they
    come holds few of them, however many there are. On a GPU (xp is CuPy) one thread is enough, whatever n.
    """
    keep_freed_memory()
    with threadpool_limits(1, "blas"):
        if n == 1 or xp is not np:
            yield map
            return
        with ThreadPoolExecutor(n) as pool:

            def run(function, values):
                results = (pool.submit(function, value) for value in values)
                waiting = deque(islice(results, AHEAD * n))
                while waiting:
                    yield waiting.popleft().result()
                    waiting.extend(islice(results, 1))

            yield run


class Sampling(NamedTuple):
    """What a sampled loss draws from.

    The item table may then be large, and a step touches few of its rows: those of the batch and of its negatives. They
    are copied to a small table, all is computed on that, and only those rows are updated. Their Adam is lazy, as
    torch.optim.SparseAdam is: an untouched row keeps its moments, where dense Adam would let them decay and go on
    changing the row.
    """

    loss: str  # one of LOSSES but "ce"
    n_negatives: int  # of "sampled"
    seen: Seen | None  # what "bce" avoids
    offsets: np.ndarray  # the log's
    largest_batch: int  # inputs and targets together: how many rows a step may touch

    def rows(self, n_items):
        """Return the number of rows that the small table needs room for."""
        negatives = self.n_negatives if self.loss == "sampled" else self.largest_batch
        return min(n_items, self.largest_batch + negatives)

    def draw(self, rng, n_items, flat, starts, lengths):
        """Return the negatives of a batch: [n_negatives] for all its positions, or one for each item of flat.

        flat: its windows, as from data.split.windows_end_to_end. The last item of a window is a target only and has no
        negative. That item itself stands there, so that no row of the table is touched in vain.
        """
        if self.loss == "sampled":
            return rng.integers(n_items, size=self.n_negatives)
        inputs = np.delete(np.arange(len(flat)), np.cumsum(lengths + 1) - 1)
        users = np.repeat(np.searchsorted(self.offsets, starts, side="right") - 1, lengths)
        negatives = flat.copy()
        negatives[inputs] = unseen_negatives(rng, users, flat[inputs + 1], n_items, self.seen)
        return negatives


def sampling_for(log, split, config, training):
    """Return the Sampling that a loss needs; None for the full cross-entropy.

    With "bce", warns of users who were trained on all items, since none is unseen. Raises UserError where the log has
    one item only.
    """
    if training["loss"] == "ce":
        return None
    seen = None
    if training["loss"] == "bce":
        if len(log.items) < 2:
            raise UserError("--loss bce needs a second item as the negative, and this log has one item: use --loss ce")
        seen = seen_items(log, split)
        n_seen = np.diff(seen.offsets)
        if n_without := int((n_seen == len(log.items)).sum()):
            who = f"{n_without:,} of {len(n_seen):,} users were trained on all {len(log.items):,} items"
            warnings.warn(f"--loss bce: {who}, so their negatives are any items but the target", stacklevel=3)
    largest_batch = training["batch_size"] * (config.max_length + 1)
    return Sampling(training["loss"], training["negatives"], seen, log.offsets, largest_batch)


def shared_floats(n):
    """Return a buffer of n float32 zeros that worker processes share.

    Raises UserError where the machine does not have that much memory: the system would kill the run later.
    """
    size, memory = 4 * n, math.inf
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        if size > memory:
            raise MemoryError
        if PROCESSES.get_start_method() == "fork":
            return mmap.mmap(-1, size)  # belongs to no file: nothing is left behind, no small /dev/shm can overflow
        return PROCESSES.RawArray(ctypes.c_float, n)
    except (MemoryError, OSError):
        raise UserError(f"no {size / 1e9:.1f} GB for parameters, moments and gradients; {SMALLER}") from None


class Worker:
    """One of n workers: it fills every n-th buffer and updates every n-th chunk of the parameters.

    memory: float32 numbers that all workers share, of Adam's vectors and of the buffers; buffers: the numbers of this
    rank's gradient buffers, of all ranks' 0..buffers.stop-1; config: the model's; sequence: all histories end to end,
    on the host; sampling: a Sampling, None for the full cross-entropy; rank: 0..n-1; xp: the array module.
    """

    def __init__(self, memory, buffers, config, sequence, sampling, rank, n, xp=np):
        self.buffers, self.config, self.sequence, self.sampling = buffers, config, sequence, sampling
        self.rank, self.n, self.xp = rank, n, xp
        memory = np.frombuffer(memory, np.float32) if xp is np else memory
        size = len(VECTORS) * parameter_count(config)
        self.vectors = dict(zip(VECTORS, memory[:size].reshape(len(VECTORS), -1), strict=True))  # [P] each
        self.gradients = memory[size:].reshape(len(buffers), -1)  # the buffers, one a row
        self.by_name = unflatten(self.vectors["parameters"], config)
        self.table = None  # the item rows that the latest step touched; None: all

    def compute_gradients(self, starts, lengths, key):
        """Fill this worker's buffers with the gradients of one batch; return their losses, one a buffer.

        starts, lengths [B] of the inputs in `sequence` (see packing.pack); key: integers (seed, step), which seed the
        dropout together with the numbers of buffer and micro-batch.
        """
        scale = 1 / int(lengths.sum())
        dealt = micro_batches(lengths, self.buffers.stop, plan(self.xp).micro_batch_tokens)
        config, parameters, sequence, loss, negatives = self.config, self.by_name, self.sequence, "ce", None
        if self.sampling:
            loss = self.sampling.loss
            config, parameters, sequence, starts, negatives = self._small_table(starts, lengths, key)
        losses, self.gradient_size = [], parameter_count(config)
        for number in range(self.rank, len(self.buffers), self.n):
            buffer, gradient = self.buffers[number], self.gradients[number, : self.gradient_size]
            gradient[...] = 0
            total = 0.0
            for i, micro_batch in enumerate(dealt[buffer]):
                unseen = negatives if loss == "bce" else None  # one for each position
                batch = pack(sequence, starts[micro_batch], lengths[micro_batch], self.xp, negatives=unseen)
                if loss == "sampled":  # the same for all positions
                    batch = batch._replace(negatives=to_device(negatives, self.xp))
                rng = generator(self.xp, *key, buffer, i)
                total = total + add_gradients(parameters, config, batch, scale, unflatten(gradient, config), rng, loss)
            losses.append(total)
        return losses

    def _small_table(self, starts, lengths, key):
        """Copy the item rows of a batch and its negatives to a small table, and number them anew.

        Returns config, parameters, sequence, starts and negatives, all in terms of the small table.
        """
        stream = generator(np, *key, NEGATIVES)
        flat, begins = windows_end_to_end(self.sequence, starts, lengths)
        negatives = self.sampling.draw(stream, self.config.n_items, flat, starts, lengths)
        table, renumbered = np.unique(np.concatenate([flat, negatives]), return_inverse=True)
        self.table = to_device(table, self.xp)
        config = replace(self.config, n_items=len(table))
        parameters = self.by_name | {"item_embedding": self.by_name["item_embedding"][self.table]}
        return config, parameters, renumbered[: len(flat)], begins, renumbered[len(flat) :]

    def sum_up(self):
        """Add this worker's chunks of all buffers to the first."""
        for part in self._chunks(self.gradient_size, UPDATE_SIZE):
            sum_buffers(self.gradients[:, part])

    def update(self, step, learning_rate, buffers):
        """Sum the first `buffers` buffers, in order, and take one Adam step with the sum, in this worker's chunks."""
        vectors, gradients = list(self.vectors.values()), self.gradients[:buffers]
        if self.table is not None:
            d, n_rows = self.config.hidden_size, len(self.table)
            tables = [vector[: self.config.n_items * d].reshape(-1, d) for vector in vectors]
            gradient_tables = gradients[:, : n_rows * d].reshape(-1, n_rows, d)
            for part in self._chunks(n_rows, UPDATE_SIZE // d + 1):
                rows = self.table[part]
                parameters, *moments = copies = [table[rows] for table in tables]  # written back below
                adam_step(parameters, sum_buffers(gradient_tables[:, part]), *moments, step, learning_rate)
                for table, updated in zip(tables, copies, strict=True):
                    table[rows] = updated
            vectors = [vector[self.config.n_items * d :] for vector in vectors]
            gradients = gradients[:, n_rows * d :]
        for part in self._chunks(len(vectors[0]), UPDATE_SIZE):
            parameters, *moments = (vector[part] for vector in vectors)
            adam_step(parameters, sum_buffers(gradients[:, part]), *moments, step, learning_rate)

    def _chunks(self, length, size):
        """Yield this worker's chunks of 0..length-1 as slices; on a GPU, one for all."""
        size = size if self.xp is np else length
        for start in range(self.rank * size, length, self.n * size):
            yield slice(start, min(start + size, length))


def sum_buffers(gradients):
    """Add gradients[1:] to gradients[0], in order, and return that."""
    for other in gradients[1:]:
        gradients[0] += other
    return gradients[0]


def serve(connection, others, *arguments):
    """A worker process, on NumPy: call the methods that the parent sends, until it closes the connection or is gone.

    others: connections of the parent's that this process holds copies of; arguments: those of Worker.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent handles them, after this step
        signal.signal(number, signal.SIG_IGN)
    for other in others:  # else they would stay open after the parent
        other.close()
    with threadpool_limits(1, "blas"), contextlib.suppress(EOFError, OSError):
        worker = Worker(*arguments)
        while True:
            method, arguments = connection.recv()
            try:
                result = getattr(worker, method)(*arguments)
            except Exception as error:
                result = error
            connection.send(result)


class Team(contextlib.ExitStack):
    """All workers of a run, this process among them; a context manager, whose end is theirs.

    config, sequence, sampling, xp: see Worker; n: how many workers, at most one for each buffer (on a GPU: one);
    ranks: the Ranks, each of which has such a team. What all workers see are `vectors`, {name: [P]} of the parameters
    and their moments, and `gradients`, one row a buffer of this rank: all V item rows, or those of a Sampling.
    """

    def __init__(self, config, sequence, xp, n, sampling=None, ranks=None):
        super().__init__()
        keep_freed_memory()
        self.xp, self.ranks = xp, ranks or Ranks()
        buffers = range(self.ranks.rank, max(plan(xp).gradient_buffers, self.ranks.size), self.ranks.size)
        table = replace(config, n_items=sampling.rows(config.n_items)) if sampling else config
        size = len(VECTORS) * parameter_count(config) + len(buffers) * parameter_count(table)
        memory, n = shared_floats(size) if xp is np else xp.zeros(size, xp.float32), min(n, len(buffers))
        shared = (memory, buffers, config, sequence, sampling)
        self.lead = Worker(*shared, 0, n, xp)
        self.vectors, self.parameters = self.lead.vectors, self.lead.vectors["parameters"]
        self.gradients = self.lead.gradients
        self.connections, self.processes = [], []
        self.enter_context(threadpool_limits(1, "blas"))
        for rank in range(1, n):
            ours, theirs = PROCESSES.Pipe()
            self.connections.append(ours)
            others = self.connections if PROCESSES.get_start_method() == "fork" else []
            arguments = (theirs, others, *shared, rank, n)
            process = PROCESSES.Process(target=serve, args=arguments, daemon=True)
            try:
                process.start()
            except OSError as error:
                self.close()
                raise UserError(f"no process for {n} workers ({error.strerror}); try fewer --workers") from None
            self.processes.append(process)
            theirs.close()  # so that the connection breaks if the worker dies
            self.callback(process.join)
            self.callback(ours.close)  # called first: it ends the worker

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
        """Fill all buffers; return this rank's share of the batch's mean loss, 0-d, on the device (see Worker)."""
        losses = self._all("compute_gradients", starts, lengths, key)
        n = len(losses)
        return sum(losses[buffer % n][buffer // n] for buffer in range(len(self.gradients)))

    def update(self, step, learning_rate):
        """Take one Adam step with the sum of the buffers of all ranks (see Worker)."""
        buffers = len(self.gradients)
        if self.ranks.size > 1:
            self._all("sum_up")
            self.ranks.allreduce(self.gradients[0, : self.lead.gradient_size])
            buffers = 1
        self._all("update", step, learning_rate, buffers)
