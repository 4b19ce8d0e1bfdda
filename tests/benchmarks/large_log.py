"""Can minirec read, describe and train on twenty million interactions?

    python tests/benchmarks/large_log.py [--interactions 20000000] [--steps 400] [--folder DIR]

A synthetic log is written, CSV with user, item and timestamp, in order of time, as a server would. Users
differ in activity by a log-normal law, items in popularity by Zipf's, and each interaction is drawn on its
own: no two neighbours have anything in common, which is the worst case for a reader's caches. Then

    data     `python cli.py describe FILE` runs on it in a process of its own
    train    the first steps of an epoch are taken, with the sampled loss, and memory is watched meanwhile

Reported are seconds of the clock and of the processor, and memory: the peak of the process that describes;
what training and its workers hold, now and then. The command fails where a limit below is passed.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training import allocated_mb

from minirec import model
from minirec.data.read import read_log
from minirec.training.fit import train
from minirec.training.parallel import usable_cores

CLI = Path(__file__).resolve().parents[2] / "cli.py"
N_USERS, N_ITEMS = 500_000, 200_000
SPREAD = 1.0  # of the logarithm of a user's activity
BEGIN, SECONDS_APART = 1_500_000_000, 3  # of the first interaction, and from one to the next on average
ROWS_AT_A_TIME = 1_000_000
MOST_SECONDS, MOST_GB = 60, 3  # of the command that describes
MOST_GROWTH = 0.02  # of training's memory, from the first tenth of the steps to the last
SAMPLES = 10  # of training's memory


def write_log(path, n, seed=0):
    """Write a CSV of n interactions."""
    rng = np.random.default_rng(seed)
    activity, popularity = rng.lognormal(0, SPREAD, N_USERS), 1 / np.arange(1, N_ITEMS + 1)
    by_activity, by_popularity = (np.cumsum(weights / weights.sum()) for weights in (activity, popularity))
    now = BEGIN
    with open(path, "w") as file:
        file.write("user,item,timestamp\n")
        for size in [ROWS_AT_A_TIME] * (n // ROWS_AT_A_TIME) + [n % ROWS_AT_A_TIME]:
            users, items = (np.searchsorted(cdf, rng.random(size)).tolist() for cdf in (by_activity, by_popularity))
            times = now + np.cumsum(rng.integers(2 * SECONDS_APART + 1, size=size))
            file.writelines(
                f"u{user},i{item},{t}\n" for user, item, t in zip(users, items, times.tolist(), strict=True)
            )
            now = int(times[-1]) if size else now


def describe(path):
    """Run `describe` on the log; return seconds of the clock and of the processor, and the peak memory in GB."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, CLI, "describe", path])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise click.ClickException("the command failed")
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9


def watch_training(path, folder, n_steps):
    """Take n_steps of training and return the memory of all its processes at SAMPLES moments, in MB."""
    log = read_log(path)
    config = model.Config(len(log.items), hidden_size=64, max_length=50)
    settings = {
        "data": {"path": str(path), "sha256": "", "columns": None, "format": None, "split": "leave-one-out"},
        "model": config.__dict__,
        "training": {"loss": "sampled", "negatives": 1024, "epochs": 1, "batch_size": 128, "lr": 1e-3},
        "versions": {},
    }
    settings["data"] |= {"k_core": 1, "drop_repeats": False}
    settings["training"] |= {
        "patience": 1,
        "seed": 0,
        "backend": "numpy",
        "workers": usable_cores(),
        "filter_seen": True,
    }
    taken, samples = 0, []

    def on_step(epoch, i, of, loss):
        nonlocal taken
        taken = i
        if i % max(1, n_steps // SAMPLES) == 0:
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            held = sum(map(allocated_mb, ("self", *children)))
            samples.append(held)
            click.echo(f"  step {i:6,} of {of:,}: {held:8,.0f} MB")

    train(log, settings, folder, on_step=on_step, stop=lambda: taken >= n_steps)
    return samples


@click.command(help=__doc__.split("\n")[0])
@click.option("--interactions", type=click.IntRange(1000), default=20_000_000, show_default=True)
@click.option("--steps", type=click.IntRange(SAMPLES), default=400, show_default=True, help="Of training.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where the log is written, and kept.")
def main(interactions, steps, folder):
    with tempfile.TemporaryDirectory() as temporary:
        path = (folder or Path(temporary)) / f"log-{interactions}.csv"
        if not path.exists():
            write_log(path, interactions)
        click.echo(f"{path}: {path.stat().st_size / 1e6:,.0f} MB")
        seconds, processor, peak = describe(path)
        click.echo(f"data: {seconds:.0f} s, of the processor {processor:.0f} s; at most {peak:.2f} GB")
        click.echo(f"train: the memory that it and its {usable_cores()} workers hold")
        samples = watch_training(path, Path(temporary) / "run", steps)
        growth = max(samples[1:]) / samples[0] - 1
        click.echo(f"train: grown by {growth:.1%} over {steps} steps")
    if seconds > MOST_SECONDS or peak > MOST_GB or growth > MOST_GROWTH:
        raise click.ClickException(f"over a limit: {MOST_SECONDS} s, {MOST_GB} GB, {MOST_GROWTH:.0%} growth")


if __name__ == "__main__":
    main()
