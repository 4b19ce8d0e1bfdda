"""How long does a training step take on a GPU, beside PyTorch's on the same device and this machine's cores?

    python tests/benchmarks/device.py [--data FILE] [--shape ml-1m --max-length 200 --dropout 0.2] [--batch-size 512]
    python tests/benchmarks/device.py --profile ...    where the time of a step goes, on the device and on the host
    python tests/benchmarks/device.py --analysis ...   evaluate and decompose, on the device and on the CPU

Contenders train on the same batches, in float32, from the same parameters; their dropout masks differ.

    cupy     minirec on the GPU            torch    the tuned reference of pytorch_sasrec on the GPU, eager
    numpy    minirec on all cores          compiled the same under torch.compile

A step is timed twice: by the device's own events, from its first launch to its last, and by the clock, all steps
together, which also counts what the host does between them. Needs a GPU and CuPy (pip install -e '.[gpu]'),
and PyTorch with CUDA for its contenders.
"""

import cProfile
import importlib.util
import io
import pstats
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training import LEARNING_RATE, SEED, SHAPES, WARM_UP, aligned, synthetic_log

from minirec import backend, decompose
from minirec.attention import known_weightings
from minirec.data.read import read_log
from minirec.data.split import batches, leave_one_out, training_windows
from minirec.errors import UserError
from minirec.model import Config, init_parameters
from minirec.training import ranking
from minirec.training.parallel import Team, usable_cores, worker_map

CONTENDERS = ("cupy", "torch", "compiled", "numpy")
PROFILED = 20  # steps


# The contenders: contexts that yield step(number, starts, lengths) -> loss, for inputs in log.sequence


@contextmanager
def train_minirec(xp, log, config):
    with Team(config, log.sequence, xp, usable_cores() if xp is np else 1) as team:
        flat = np.concatenate([x.reshape(-1) for x in init_parameters(config, SEED).values()])
        team.parameters[...] = backend.to_device(flat, xp)

        def step(number, starts, lengths):
            loss = team.compute_gradients(starts, lengths, (SEED, number + 1))
            team.update(number + 1, LEARNING_RATE)
            return loss

        yield step


@contextmanager
def train_torch(compiled, log, config):
    import torch
    from pytorch_sasrec import build

    torch.manual_seed(SEED)
    model = build("tuned", config, init_parameters(config, SEED)).to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = model.optimizer(LEARNING_RATE)
    loss_of = torch.compile(model.loss, dynamic=True) if compiled else model.loss

    def step(number, starts, lengths):
        optimizer.zero_grad()
        loss = loss_of(*model.lay_out(log.sequence, starts, lengths))
        loss.backward()
        optimizer.step()
        return loss.detach()

    yield step


def contender(name, cupy, log, config):
    if name in ("torch", "compiled"):
        return train_torch(name == "compiled", log, config)
    return train_minirec(cupy if name == "cupy" else np, log, config)


# Their clocks


def moment(name, cupy):
    """Mark a moment: an event in the device's queue, else the clock's time."""
    if name == "numpy" or not on_a_gpu(name):
        return time.perf_counter()
    if name == "cupy":
        event = cupy.cuda.Event()
    else:
        import torch

        event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(name, cupy, begin, end):
    """Return the milliseconds between two moments."""
    if isinstance(begin, float):
        return 1e3 * (end - begin)
    return cupy.cuda.get_elapsed_time(begin, end) if name == "cupy" else begin.elapsed_time(end)


def wait(name, cupy):
    if name == "cupy":
        cupy.cuda.Device().synchronize()
    elif name != "numpy" and on_a_gpu(name):
        import torch

        torch.cuda.synchronize()


def on_a_gpu(name):
    if name == "cupy":
        return True
    import torch

    return torch.cuda.is_available()


def schedule(log, config, batch_size, n):
    """Return n pairs (starts, lengths), the training inputs of each step."""
    starts, lengths = training_windows(log, leave_one_out(log), config.max_length)
    order, epoch = [], 0
    while len(order) < n:
        epoch += 1
        order += batches(len(starts), batch_size, SEED, epoch)
    return [(starts[batch], lengths[batch]) for batch in order[:n]]


def time_steps(name, cupy, log, config, batch_size, n):
    """Train n steps after a warm-up; return the milliseconds of each, and of all by the clock, and the last loss."""
    inputs, moments = schedule(log, config, batch_size, WARM_UP + n), []
    with contender(name, cupy, log, config) as step:
        for number, (starts, lengths) in enumerate(inputs):
            if number == WARM_UP:
                wait(name, cupy)
                began = time.perf_counter()
            begin = moment(name, cupy)
            loss = step(number, starts, lengths)
            moments.append((begin, moment(name, cupy)))
        wait(name, cupy)
        total = 1e3 * (time.perf_counter() - began)
        return [elapsed(name, cupy, *pair) for pair in moments[WARM_UP:]], total / n, float(loss)


def speed(cupy, log, config, weightings, contenders, batch_size, n):
    """Print the table of all contenders under each weighting."""
    rows = [["", "contender", "ms/step", "min", "by the clock", "last loss"]]
    for attn in weightings:
        for name in contenders:
            if name in ("torch", "compiled") and attn not in ("softmax", "uniform"):
                continue  # the reference has no others
            try:
                each, clock, loss = time_steps(name, cupy, log, config(attn), batch_size, n)
            except Exception as error:
                if name != "compiled":
                    raise
                click.echo(f"torch.compile does not work here: {str(error).splitlines()[0]}", err=True)
                continue
            times = [f"{x:.2f}" for x in (statistics.median(each), min(each), clock)]
            rows.append([attn, name, *times, f"{loss:.3f}"])
    click.echo("\n".join(aligned(rows)))


# Where the time goes


def profile(cupy, log, config, batch_size):
    """Print the kernels and their time, where PyTorch's profiler sees them, and the host's time by function."""
    inputs = schedule(log, config, batch_size, WARM_UP + 2 * PROFILED)
    with contender("cupy", cupy, log, config) as step:
        for number, pair in enumerate(inputs[:WARM_UP]):
            step(number, *pair)
        wait("cupy", cupy)
        if importlib.util.find_spec("torch") and on_a_gpu("torch"):
            from torch.profiler import ProfilerActivity
            from torch.profiler import profile as torch_profile

            with torch_profile(activities=[ProfilerActivity.CUDA]) as recorded:
                for number, pair in enumerate(inputs[WARM_UP : WARM_UP + PROFILED], WARM_UP):
                    step(number, *pair)
                wait("cupy", cupy)
            kernels = [e for e in recorded.key_averages() if getattr(e, "self_device_time_total", 0) > 0]
            kernels.sort(key=lambda e: -e.self_device_time_total)
            count = sum(e.count for e in kernels) / PROFILED
            busy = sum(e.self_device_time_total for e in kernels) / PROFILED
            click.echo(f"a step: {count:.0f} kernels and copies, {busy / 1e3:.2f} ms busy on the device, of which")
            for e in kernels[:16]:
                each = e.self_device_time_total / PROFILED
                click.echo(f"  {each / 1e3:7.3f} ms {e.count / PROFILED:6.1f} times  {e.key[:90]}")
        host = cProfile.Profile()
        began = time.perf_counter()
        host.enable()
        for number, pair in enumerate(inputs[WARM_UP + PROFILED :], WARM_UP + PROFILED):
            step(number, *pair)
        host.disable()
        queued = time.perf_counter() - began
        wait("cupy", cupy)
        text = io.StringIO()
        pstats.Stats(host, stream=text).sort_stats("tottime").print_stats(45)
        click.echo(
            f"{1e3 * queued / PROFILED:.2f} ms a step on the host, under its profiler; functions by their own time"
        )
        click.echo("\n".join(line[:130] for line in text.getvalue().splitlines() if line.strip()))


def analysis(cupy, log, config):
    """Print the seconds of evaluating and decomposing all users on the device and on the CPU's cores."""
    test, parameters = leave_one_out(log).test, init_parameters(config, SEED)
    histories = [log.sequence[a:b] for a, b in zip(test.starts, test.stops, strict=True)]
    rows, seconds = [["", "cupy s", "numpy s", "times faster"]], {}
    for xp in (cupy, np):
        p = {name: backend.to_device(value, xp) for name, value in parameters.items()}
        with worker_map(usable_cores() if xp is np else 1, xp) as run:
            for name, work in (
                ("evaluate", lambda p=p, run=run: list(ranking.rank_targets(p, config, log.sequence, test, run=run))),
                ("decompose", lambda p=p, run=run: decompose.decompose(p, config, histories, run)),
            ):
                if xp is not np:
                    work()  # loads and compiles
                began = time.perf_counter()
                work()
                seconds[name, xp is np] = time.perf_counter() - began
    for name in ("evaluate", "decompose"):
        device, cpu = seconds[name, False], seconds[name, True]
        rows.append([name, f"{device:.3f}", f"{cpu:.3f}", f"{cpu / device:.1f}"])
    click.echo("\n".join(aligned(rows)))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--data", type=click.Path(exists=True, dir_okay=False), help="A log  [default: synthetic]")
@click.option("--shape", type=click.Choice(list(SHAPES)), default="beauty", help="Of the synthetic log.")
@click.option("--max-length", type=click.IntRange(min=1), default=50)
@click.option("--dropout", type=click.FloatRange(0, 1, max_open=True), default=0.5)
@click.option("--batch-size", type=click.IntRange(min=1), default=128)
@click.option("--attn", "weightings", multiple=True, type=click.Choice(known_weightings()), help="[default: all]")
@click.option("--contender", "contenders", multiple=True, type=click.Choice(CONTENDERS), default=("cupy", "numpy"))
@click.option("--steps", "n", type=click.IntRange(min=1), default=50, help="Steps that are timed.")
@click.option("--profile", "wanted", flag_value="profile", help="Where a step's time goes, instead of the table.")
@click.option("--analysis", "wanted", flag_value="analysis", help="Evaluate and decompose, instead of training.")
def main(data, shape, max_length, dropout, batch_size, weightings, contenders, n, wanted):
    """Time minirec on a GPU."""
    try:
        cupy = backend.load("cupy")
        log = read_log(data) if data else synthetic_log(shape=shape)
    except UserError as error:
        raise click.ClickException(str(error)) from None
    config = lambda attn: Config(len(log.items), max_length=max_length, dropout=dropout, attn=attn)
    weightings = weightings or known_weightings()
    if wanted == "profile":
        profile(cupy, log, config(weightings[0]), batch_size)
    elif wanted == "analysis":
        analysis(cupy, log, config(weightings[0]))
    else:
        speed(cupy, log, config, weightings, contenders, batch_size, n)


if __name__ == "__main__":
    main()
