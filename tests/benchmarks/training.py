"""How long does a training step take, beside the same model in PyTorch?

    python tests/benchmarks/training.py [--data FILE] [--attn uniform] ...

First the PyTorch references (see pytorch_sasrec) are checked to compute minirec's loss and
gradients. Then minirec and the references train on the same batches, each in its own process, one
step at a time in turn, so that whatever else the machine does falls on all of them alike. Between
two turns there is a pause, after which the threads of the last one have stopped spinning.
Reported are wall-clock times as each process measures its own steps, from the log's array to the
updated parameters. Everything runs in float32 on the CPU.

PyTorch is not a dependency of minirec: pip install torch --index-url https://download.pytorch.org/whl/cpu

Symbols: B sequences, L positions, N tokens, D hidden size, V items.
"""

import importlib.util
import multiprocessing
import os
import re
import signal
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from minirec.data.log import Log
from minirec.data.read import read_log
from minirec.data.split import batches, leave_one_out, training_windows
from minirec.errors import UserError
from minirec.model import Config, init_parameters
from minirec.training.parallel import Team, usable_cores

BATCH_SIZE, LEARNING_RATE, SEED = 128, 1e-3, 0
TOLERANCE = 1e-10  # of the check, relative, in float64
PAUSE = 0.05  # seconds between two turns; OpenMP's threads spin for about 10 ms after work
DO_NOT_SPIN = {"OPENBLAS_THREAD_TIMEOUT": "4"}  # OpenBLAS's, where several, would spin for about 100 ms
WARM_UP = 3  # steps with each number of threads, before the timing
PRODUCT = 2048  # the peak is the rate of a PRODUCT^3 matrix product
LAST = 5  # steps whose mean is the last loss
WATCHED = 3  # steps after the timing during which the memory is sampled, every SAMPLE seconds
SAMPLE = 0.002
# A large block goes back to the system when it is freed, and is fetched, zeroed, again in the next
# step. These settings of glibc's malloc make a process keep what it once had.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(1 << 28),
}


# What is trained


@dataclass(frozen=True)
class Problem:
    """A model and the batches to train it on, as every process gets them."""

    config: Config
    sequence: np.ndarray  # [n] all histories end to end
    starts: np.ndarray  # [U] of the training inputs in it
    lengths: np.ndarray  # [U]
    batches: list  # for each step, indices [B] into starts and lengths


def beauty_lengths(rng, n):
    """5 plus a heavy tail: quartiles 5, 6 or 7, 9; 99 % below 40."""
    return 5 + (6.5 * rng.pareto(2.5, n)).astype(int)


def ml_1m_lengths(rng, n):
    """20 plus a heavy tail: median 94, mean about 165."""
    return 20 + np.exp(rng.normal(4.3, 1.2, n)).astype(int)


SHAPES = {  # users, items, interactions of each user, most interactions of one user
    "beauty": (22_363, 12_101, beauty_lengths, 204),  # Amazon's, 5-core: about 197,000 interactions
    "ml-1m": (6_040, 3_416, ml_1m_lengths, 2_277),  # MovieLens: about a million
}


def synthetic_log(seed=0, shape="beauty"):
    """Return a Log of a real one's shape, one of SHAPES.

    Popularity is Zipf's with a flattened head, and each item is drawn independently of the ones before it.
    """
    n_users, n_items, lengths, longest = SHAPES[shape]
    rng = np.random.default_rng(seed)
    counts = np.minimum(lengths(rng, n_users), longest)
    popularity = 1 / (np.arange(n_items) + 20) ** 0.8
    sequence = rng.choice(n_items, counts.sum(), p=popularity / popularity.sum()).astype(np.int32)
    names = [[str(i) for i in range(n)] for n in (n_users, n_items)]
    return Log(*names, np.concatenate([[0], np.cumsum(counts)]), sequence)


def make_problem(log, config, n_steps):
    """Return the Problem of the first n_steps batches, epoch after epoch, as minirec.train takes them."""
    starts, lengths = training_windows(log, leave_one_out(log), config.max_length)
    if not len(starts):
        raise UserError("no user has two interactions besides those held out: nothing to train on")
    steps, epoch = [], 0
    while len(steps) < n_steps:
        epoch += 1
        steps += batches(len(starts), BATCH_SIZE, SEED, epoch)
    return Problem(config, log.sequence, starts, lengths, steps[:n_steps])


def training_flops(config, lengths):
    """Return the floating-point operations of the matrix products of one training step.

    lengths [B] of the inputs. Counted is what the model asks for at valid positions, forward and
    backward, whatever an implementation adds by padding or saves by causality:

        linear D -> D, 4 of them in a block, 6 with query and key   2 N D^2 forward, twice that backward
        logits D -> V                                               2 N D V forward, twice that backward
        A v, A a full L x L                                         2 L^2 D forward, twice that backward
        q k^T, learned weights only                                 2 L^2 D forward, twice that backward

    but fixed weights need no gradient: there A v costs the same once more backward, not twice.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    n, pairs, d = int(lengths.sum()), int((lengths**2).sum()), config.hidden_size
    flops = 6 * n * d * config.n_items
    for weighting in config.weightings:
        learned = weighting == "softmax"
        flops += (6 if learned else 4) * 6 * n * d * d
        flops += (6 if learned else 2) * 2 * pairs * d
    return flops


# The contenders, each run in a process of its own. A trainer is a context that yields
# step(number, threads) -> loss, with number counting from 0.


@contextmanager
def train_minirec(problem):
    """Train as minirec.train does, with a worker on every usable core."""
    p = problem
    with Team(p.config, p.sequence, np, usable_cores()) as team:
        team.parameters[...] = np.concatenate([x.reshape(-1) for x in init_parameters(p.config, SEED).values()])

        def step(number, threads):
            batch = p.batches[number]
            loss = team.compute_gradients(p.starts[batch], p.lengths[batch], (SEED, number + 1))
            team.update(number + 1, LEARNING_RATE)
            return loss

        yield step


@contextmanager
def train_pytorch(problem, reference):
    """Train a reference ("usual" or "tuned") from minirec's initial parameters."""
    import torch
    from pytorch_sasrec import build

    torch.manual_seed(SEED)
    p, model = problem, build(reference, problem.config, init_parameters(problem.config, SEED))
    optimizer = model.optimizer(LEARNING_RATE)

    def step(number, threads):
        torch.set_num_threads(threads)
        batch = p.batches[number]
        optimizer.zero_grad()
        loss = model(p.sequence, p.starts[batch], p.lengths[batch])
        loss.backward()
        optimizer.step()
        return loss.detach()

    yield step


def train_usual(problem):
    return train_pytorch(problem, "usual")


def train_tuned(problem):
    return train_pytorch(problem, "tuned")


@contextmanager
def multiply_numpy(problem):
    """No trainer: a step is one large product by NumPy, with all threads of its BLAS."""
    a, b = np.random.default_rng(0).random((2, PRODUCT, PRODUCT), dtype=np.float32)
    out = np.empty_like(a)
    yield lambda number, threads: np.matmul(a, b, out=out)[0, 0]


@contextmanager
def multiply_pytorch(problem):
    """The same by PyTorch, whose BLAS may be another."""
    import torch

    a, b = torch.rand(2, PRODUCT, PRODUCT)
    out = torch.empty_like(a)

    def step(number, threads):
        torch.set_num_threads(threads)
        return torch.mm(a, b, out=out)[0, 0]

    yield step


def serve(connection, trainer, problem):
    """The child's loop: receive (number, threads), take that step, send back (seconds, loss).

    Before the first it sends its process id and those of its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and that ends the children
    try:
        with trainer(problem) as step:
            connection.send([os.getpid(), *(worker.pid for worker in multiprocessing.active_children())])
            while True:
                request = connection.recv()
                began = time.perf_counter()
                loss = float(step(*request))
                connection.send((time.perf_counter() - began, loss))
    except (EOFError, ConnectionError):
        pass  # the parent is gone


@contextmanager
def environment(settings):
    """Set environment variables, which a process started meanwhile inherits."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@dataclass
class Contender:
    """The parent's end of one trainer's process, and what was measured of it."""

    name: str
    trainer: object
    settings: dict = field(default_factory=dict)  # of its environment
    thread_counts: tuple = (usable_cores(),)  # to choose from in the warm-up
    connection: object = None  # once it has started
    threads: int = 0
    warm_up: dict = field(default_factory=dict)  # {threads: [seconds]}
    seconds: list = field(default_factory=list)
    losses: list = field(default_factory=list)  # of all steps
    allocated: list = field(default_factory=list)  # MB, samples
    resident: float = float("nan")  # MB

    def start(self, problem):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, self.trainer, problem))
        with environment(self.settings):
            self.process.start()
        other.close()
        self.pids = self.receive()

    def stop(self):
        if self.connection:
            self.connection.close()
            self.process.join()

    def receive(self):
        with self.alive():
            return self.connection.recv()

    @contextmanager
    def alive(self):
        """Say so where the process is gone when something is sent to it or awaited from it."""
        try:
            yield
        except (EOFError, ConnectionError):
            self.process.join()
            raise click.ClickException(
                f"{self.name}: its process ended early, with status {self.process.exitcode} (-9: out of memory?)"
            ) from None

    def send(self, number, threads):
        with self.alive():
            self.connection.send((number, threads))

    def step(self, number, threads):
        """Take one step after a pause; return its seconds."""
        time.sleep(PAUSE)
        self.send(number, threads)
        seconds, loss = self.receive()
        self.losses.append(loss)
        return seconds

    def warm(self, number):
        """Take an untimed step, with each number of threads in turn."""
        threads = self.thread_counts[number % len(self.thread_counts)]
        self.warm_up.setdefault(threads, []).append(self.step(number, threads))

    def choose_threads(self):
        """Settle on the number of threads whose best step of the warm-up was the fastest."""
        self.threads = min(self.warm_up, key=lambda threads: min(self.warm_up[threads]))

    def time(self, number):
        self.seconds.append(self.step(number, self.threads))

    def watch(self, number):
        """Take an untimed step and sample the memory all the while."""
        self.send(number, self.threads)
        done = False
        while not done:
            self.allocated.append(sum(map(allocated_mb, self.pids)))
            done = self.connection.poll(SAMPLE)
        self.losses.append(self.receive()[1])
        self.resident = sum(map(peak_resident_mb, self.pids))


# Memory of another process, NaN where the system does not tell


def proc_mb(path, *names):
    """Return the sum of some figures in a file of /proc, where they stand in kB, in MB."""
    try:
        found = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path(path).read_text(), re.MULTILINE))
        return sum(int(found[name]) for name in names) / 1024
    except (OSError, KeyError):
        return float("nan")


def allocated_mb(pid):
    """Return what a process has allocated now, its libraries' files left out.

    Of memory shared by n processes it counts 1/n, so that the workers of one trainer can be summed.
    """
    return proc_mb(f"/proc/{pid}/smaps_rollup", "Pss_Anon", "Pss_Shmem")


def peak_resident_mb(pid):
    """Return the most a process ever had in memory, libraries and shared memory in full."""
    return proc_mb(f"/proc/{pid}/status", "VmHWM")


# The run


def largest_difference(attn):
    """Return the largest error of the check, as (error, reference, name). Run in a process of its own."""
    from pytorch_sasrec import REFERENCES, differences

    found = [(reference, differences(reference, attn)) for reference in REFERENCES]
    return max((error, reference, name) for reference, errors in found for name, error in errors.items())


def check(attn):
    """Stop where a reference differs from minirec."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        error, reference, name = pool.submit(largest_difference, attn).result()
    if not error < TOLERANCE:
        raise click.ClickException(f"{reference} PyTorch differs from minirec in {name}: {error:.1e}")
    say(f"check: loss and gradients agree in float64, largest relative difference {error:.1e}")


def say(text):
    click.echo(text, err=True)


def thread_counts(cores):
    """All cores, half of them, ... 1: a PyTorch contender takes what serves it best."""
    return tuple(sorted({cores >> i for i in range(cores.bit_length())}))


def race(contenders, problem, n_warm, n_timed):
    """Warm up all contenders, let each settle on its threads, time n_timed steps of each in turn."""
    for contender in contenders:
        say(f"starting {contender.name}")
        contender.start(problem)
    say(f"{n_warm} steps to warm up, {n_timed} timed, {WATCHED} to sample the memory")
    for number in range(n_warm):
        for contender in contenders:
            contender.warm(number)
    for contender in contenders:
        contender.choose_threads()
    for number in range(n_warm, n_warm + n_timed):
        first = number % len(contenders)  # nobody always follows the same neighbour
        for contender in contenders[first:] + contenders[:first]:
            contender.time(number)
    for contender in contenders:
        for number in range(n_warm + n_timed, n_warm + n_timed + WATCHED):
            contender.watch(number)


def table(trainers, peak, flops):
    """Return the lines of the result. peak: operations a second; flops [steps] of the timed steps."""
    heads = "|cores|ms/step|min|/ minirec|of peak|peak MB|VmHWM MB|first loss|last loss".split("|")
    own = statistics.median(trainers[0].seconds)
    rows = [heads]
    for t in trainers:
        median = statistics.median(t.seconds)
        rows.append(
            [
                t.name,
                str(t.threads),
                f"{1e3 * median:.0f}",
                f"{1e3 * min(t.seconds):.0f}",
                f"{median / own:.2f}",
                f"{statistics.median(f / s for f, s in zip(flops, t.seconds, strict=True)) / peak:.0%}",
                f"{max(t.allocated):.0f}",
                f"{t.resident:.0f}",
                f"{t.losses[0]:.3f}",
                f"{statistics.mean(t.losses[-LAST:]):.3f}",
            ]
        )
    return aligned(rows)


def aligned(rows):
    """Return rows of texts as lines of equal columns: the first flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--data", type=click.Path(exists=True, dir_okay=False), help="A log  [default: a synthetic one]")
@click.option("--max-length", type=click.IntRange(min=1), default=50, help="Latest items kept.")
@click.option("--dropout", type=click.FloatRange(0, 1, max_open=True), default=0.5)
@click.option("--attn", type=click.Choice(["softmax", "uniform"]), default="softmax", help="Attention weighting.")
@click.option("--steps", type=click.IntRange(min=1), default=20, help="Steps to time of each contender.")
def main(data, max_length, dropout, attn, steps):
    """Time training steps of minirec and of two PyTorch references on the same batches."""
    if importlib.util.find_spec("torch") is None:
        raise click.ClickException(
            "PyTorch is not installed: pip install torch --index-url https://download.pytorch.org/whl/cpu"
        )
    counts = thread_counts(usable_cores())
    n_warm = WARM_UP * len(counts)
    try:
        log = read_log(data) if data else synthetic_log()
        config = Config(len(log.items), max_length=max_length, dropout=dropout, attn=attn)
        problem = make_problem(log, config, n_warm + steps + WATCHED)
    except UserError as error:
        raise click.ClickException(str(error)) from None
    check(attn)
    trainers = [
        Contender("minirec", train_minirec),
        Contender("PyTorch, usual", train_usual, thread_counts=counts),
        Contender("PyTorch, tuned", train_tuned, thread_counts=counts),
        Contender("PyTorch, tuned, malloc raised", train_tuned, KEEP_MEMORY, counts),
    ]
    products = [
        Contender("product, NumPy", multiply_numpy, DO_NOT_SPIN),
        Contender("product, PyTorch", multiply_pytorch),
    ]
    contenders = [*trainers, *products]
    try:
        race(contenders, problem, n_warm, steps)
    finally:
        for contender in contenders:
            contender.stop()

    peak = 2 * PRODUCT**3 / min(min(product.seconds) for product in products)
    lengths = [problem.lengths[batch] for batch in problem.batches[n_warm : n_warm + steps]]
    flops = [training_flops(config, x) for x in lengths]
    click.echo(
        f"{Path(data).name if data else 'synthetic log of the shape of Beauty'}: {len(log.users)} users, "
        f"{config.n_items} items; {attn}, dropout {dropout:g}, {BATCH_SIZE} sequences a batch, the last {max_length} "
        f"items; {statistics.mean(x.sum() for x in lengths):.0f} tokens and {statistics.mean(flops) / 1e9:.2f} GFLOP "
        f"a step; peak {peak / 1e9:.0f} GFLOP/s on {usable_cores()} cores; medians of {steps} steps\n"
    )
    click.echo("\n".join(table(trainers, peak, flops)))


if __name__ == "__main__":
    main()
