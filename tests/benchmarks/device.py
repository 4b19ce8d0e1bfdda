"""How long does a training step take on a GPU, beside the same step on this machine's cores?

    python tests/benchmarks/device.py [--data FILE] [--max-length 200 --dropout 0.2] [--batch-size 512]

Steps on the device are timed by its own events, from the first launch of a step to its last, and once more by the
clock, all steps together, which also counts what the host does between them. Both backends train on the
same batches in float32; their dropout masks differ.

Needs a GPU and CuPy: pip install -e '.[gpu]'
"""

import statistics
import sys
import time
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training import LEARNING_RATE, SEED, WARM_UP, aligned, synthetic_log

from minirec import backend
from minirec.attention import known_weightings
from minirec.data.log import read_log
from minirec.data.split import batches, leave_one_out, training_windows
from minirec.errors import UserError
from minirec.model import Config, init_parameters
from minirec.training.parallel import Team, usable_cores


def steps(xp, log, config, batch_size, n):
    """Train n steps after a warm-up; return the milliseconds of each, and of all by the clock, and the last loss."""
    starts, lengths = training_windows(log, leave_one_out(log), config.max_length)
    order, each, epoch = [], [], 0
    while len(order) < WARM_UP + n:
        epoch += 1
        order += batches(len(starts), batch_size, SEED, epoch)
    with Team(config, log.sequence, xp, usable_cores() if xp is np else 1) as team:
        flat = np.concatenate([x.reshape(-1) for x in init_parameters(config, SEED).values()])
        team.parameters[...] = backend.to_device(flat, xp)
        for number, batch in enumerate(order[: WARM_UP + n]):
            if number == WARM_UP:
                wait(xp)
                began = time.perf_counter()
            mark = moment(xp)
            loss = team.compute_gradients(starts[batch], lengths[batch], (SEED, number + 1))
            team.update(number + 1, LEARNING_RATE)
            each.append((mark, moment(xp)))
        wait(xp)
        total = 1e3 * (time.perf_counter() - began)
        return [elapsed(xp, *pair) for pair in each[WARM_UP:]], total / n, float(loss)


def moment(xp):
    """Mark a moment: on the device an event in its queue, else the clock's time."""
    if xp is np:
        return time.perf_counter()
    event = xp.cuda.Event()
    event.record()
    return event


def elapsed(xp, begin, end):
    """Return the milliseconds between two moments."""
    return 1e3 * (end - begin) if xp is np else xp.cuda.get_elapsed_time(begin, end)


def wait(xp):
    if xp is not np:
        xp.cuda.Device().synchronize()


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--data", type=click.Path(exists=True, dir_okay=False), help="A log  [default: synthetic]")
@click.option("--max-length", type=click.IntRange(min=1), default=50)
@click.option("--dropout", type=click.FloatRange(0, 1, max_open=True), default=0.5)
@click.option("--batch-size", type=click.IntRange(min=1), default=128)
@click.option("--steps", "n", type=click.IntRange(min=1), default=50, help="Steps that are timed.")
def main(data, max_length, dropout, batch_size, n):
    """Time training steps on a GPU and on the CPU."""
    try:
        cupy = backend.load("cupy")
        log = read_log(data) if data else synthetic_log()
    except UserError as error:
        raise click.ClickException(str(error)) from None
    rows = [["", "backend", "ms/step", "min", "by the clock", "last loss"]]
    for attn in known_weightings():
        config = Config(len(log.items), max_length=max_length, dropout=dropout, attn=attn)
        for name, xp in (("cupy", cupy), ("numpy", np)):
            each, clock, loss = steps(xp, log, config, batch_size, n)
            times = [f"{x:.2f}" for x in (statistics.median(each), min(each), clock)]
            rows.append([attn, name, *times, f"{loss:.3f}"])
    click.echo("\n".join(aligned(rows)))


if __name__ == "__main__":
    main()
