"""How do the time and the memory of a training step grow?

    python tests/benchmarks/growth.py [--axis items] ... [--plot growth.png]

One setting of a step is varied at a time:

    items     the number of items V, with the full cross-entropy and with the sampled one
    length    the sequences' length L, all of them full, with softmax and with uniform attention
    batch     the number of sequences in a batch
    workers   the number of worker processes, up to the usable cores or one a buffer

Every setting runs in a fresh process, one after the other. A step is timed in its two halves: the
gradients (forward, loss, backward) and the update (the sum over buffers, and Adam). Afterwards come a
few steps that are not timed, during which the memory is sampled: all that the process and its workers
have allocated, the interpreter and its libraries' own memory included. Everything runs in float32 on
the CPU; items are drawn by a flattened Zipf's law, independently of each other.

--plot needs matplotlib: pip install matplotlib

Symbols: B sequences, L positions, N tokens, V items, K negatives, P parameters.
"""

import functools
import importlib.util
import statistics
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training import BATCH_SIZE, LEARNING_RATE, SEED, WATCHED, Contender, Problem, aligned, say, synthetic_log

from minirec.data.split import leave_one_out, training_windows
from minirec.packing import plan
from minirec.parameters import INIT_STD, Config, unflatten
from minirec.training.parallel import Sampling, Team, usable_cores
from minirec.training.ranking import chunks

NEGATIVES = 1024  # K of the sampled loss
WARM_UP = 3  # steps before the timing
ROWS = 1 << 14  # of a matrix that are initialised at a time
GRADIENTS, UPDATE, BOTH = "gradients", "update", "both"  # which part of a step to take


# The settings


@dataclass(frozen=True)
class Setting:
    """One point of an axis; the defaults are of the size of Beauty (Amazon, 5-core)."""

    x: int  # where on the axis
    series: str  # which of the axis' lines
    n_items: int = 12_101
    max_length: int = 50
    full: bool = False  # all sequences max_length long; else as long as those of synthetic_log
    attn: str = "softmax"
    loss: str = "ce"
    batch_size: int = BATCH_SIZE
    workers: int = usable_cores()


SHORT = {"series": "short sequences"}
LONG = {"series": "long sequences", "n_items": 3_416, "max_length": 200, "full": True}  # of the size of ML-1M
SIZES = {"short": "up to 50 positions, V = 12,101", "long": "all of 200 positions, V = 3,416"}


def items_axis():
    for n in (1_000, 10_000, 100_000, 1_000_000):
        yield Setting(n, f"sampled, K = {NEGATIVES}", n_items=n, loss="sampled")
    for n in (1_000, 10_000, 100_000):
        yield Setting(n, "ce", n_items=n)


def length_axis():
    for attn in ("softmax", "uniform"):
        for n in (25, 50, 100, 200, 400):
            yield Setting(n, attn, n_items=LONG["n_items"], max_length=n, full=True, attn=attn)


def batch_axis():
    for sizes in (SHORT, LONG):
        for n in (16, 64, 128, 512):
            yield Setting(n, batch_size=n, **sizes)


def workers_axis():
    useful = min(usable_cores(), plan(np).gradient_buffers)  # a worker owns whole buffers: more of them would be idle
    for sizes in (SHORT, LONG):
        for n in range(1, useful + 1):
            yield Setting(n, workers=n, **sizes)


@dataclass(frozen=True)
class Axis:
    """What is varied, and what is held fixed meanwhile."""

    settings: object  # () -> Settings
    label: str
    fixed: str


AXES = {
    "items": Axis(items_axis, "items V", f"{BATCH_SIZE} sequences of up to 50 positions, softmax"),
    "length": Axis(length_axis, "length L (positions)", f"{BATCH_SIZE} full sequences, V = 3,416"),
    "batch": Axis(batch_axis, "batch size B (sequences)", f"softmax; short: {SIZES['short']}; long: {SIZES['long']}"),
    "workers": Axis(
        workers_axis,
        "worker processes",
        f"{BATCH_SIZE} sequences, softmax; short: {SIZES['short']}; long: {SIZES['long']}",
    ),
}


# What is trained


@functools.cache
def typical_lengths():
    """Return the lengths [U] of the training inputs of synthetic_log, 50 positions at most."""
    log = synthetic_log()
    return training_windows(log, leave_one_out(log), 50)[1]


def make_problem(setting, n_steps):
    """Return the Problem of n_steps batches, each of sequences of its own."""
    rng = np.random.default_rng(SEED)
    config = Config(setting.n_items, max_length=setting.max_length, attn=setting.attn)
    n = n_steps * setting.batch_size
    lengths = np.full(n, setting.max_length)
    if not setting.full:
        lengths = np.minimum(rng.choice(typical_lengths(), n), setting.max_length)
    ends = np.cumsum(lengths + 1)  # an input has one item more, its last target
    popularity = 1 / (np.arange(setting.n_items) + 20) ** 0.8
    sequence = rng.choice(setting.n_items, ends[-1], p=popularity / popularity.sum()).astype(np.int32)
    return Problem(config, sequence, ends - lengths - 1, lengths, list(np.arange(n).reshape(n_steps, -1)))


def initialise(team, config):
    """Set a team's parameters and moments [P] as before a first step.

    The draws of init_parameters, but a few rows at a time: its arrays would stay with the process
    and count as the step's memory. The moments are written too, as by a run, so that their pages exist.
    """
    rng = np.random.default_rng(SEED)
    for name, value in unflatten(team.parameters, config).items():
        if value.ndim == 2:
            for rows in chunks(len(value), ROWS):
                value[rows] = rng.normal(0, INIT_STD, value[rows].shape)
        else:
            value[...] = name.endswith("gamma")
    for name in ("first_moment", "second_moment"):
        team.vectors[name][...] = 0


@contextmanager
def train_by_halves(problem, loss, workers):
    """A trainer (see training.py), asked not for a number of threads but for a part of a step."""
    p, sampling = problem, None
    if loss != "ce":
        largest_batch = len(p.batches[0]) * (p.config.max_length + 1)
        sampling = Sampling(loss, NEGATIVES, None, None, largest_batch)  # None: who had what matters to bce alone
    with Team(p.config, p.sequence, np, workers, sampling) as team:
        initialise(team, p.config)

        def step(number, part):
            value, batch = 0.0, p.batches[number]
            if part != UPDATE:
                value = team.compute_gradients(p.starts[batch], p.lengths[batch], (SEED, number + 1))
            if part != GRADIENTS:
                team.update(number + 1, LEARNING_RATE)
            return value

        yield step


# The measurement


@dataclass
class Growth:
    """What was measured at one setting."""

    setting: Setting
    tokens: float  # N, the mean over the timed steps
    gradients: list  # seconds of each step's first half
    update: list  # and of its second
    peak_mb: float

    def ms(self, seconds):
        return 1e3 * statistics.median(seconds)

    @property
    def step(self):
        return list(map(sum, zip(self.gradients, self.update, strict=True)))


def measure(setting, n_timed):
    """Run one setting in a process of its own."""
    problem = make_problem(setting, WARM_UP + n_timed + WATCHED)
    trainer = partial(train_by_halves, loss=setting.loss, workers=setting.workers)
    child = Contender(f"{setting.series} at {setting.x}", trainer)
    seconds = {GRADIENTS: [], UPDATE: []}
    try:
        child.start(problem)
        for number in range(WARM_UP + n_timed):
            for part, found in seconds.items():
                child.send(number, part)
                found.append(child.receive()[0])
        child.threads = BOTH  # what a watched step is asked for
        for number in range(WARM_UP + n_timed, len(problem.batches)):
            child.watch(number)
    finally:
        child.stop()
    timed = problem.batches[WARM_UP : WARM_UP + n_timed]
    tokens = statistics.mean(problem.lengths[batch].sum() for batch in timed)
    return Growth(setting, float(tokens), *(found[WARM_UP:] for found in seconds.values()), max(child.allocated))


def table(axis, results):
    """Return the lines of one axis' results."""
    rows = [["", AXES[axis].label, "tokens", "gradients ms", "update ms", "ms/step", "min", "us/token", "peak MB"]]
    for r in results:
        rows.append(
            [
                r.setting.series,
                f"{r.setting.x:,}",
                f"{r.tokens:,.0f}",
                f"{r.ms(r.gradients):.1f}",
                f"{r.ms(r.update):.1f}",
                f"{r.ms(r.step):.1f}",
                f"{1e3 * min(r.step):.1f}",
                f"{1e3 * r.ms(r.step) / r.tokens:.1f}",
                f"{r.peak_mb:.0f}",
            ]
        )
    return aligned(rows)


# The figure

SHADES = (("black", "o", "-"), ("0.5", "s", "--"))  # colour, marker and line of an axis' first and second series


def plot(results, path):
    """Draw {axis: results} as small multiples, an axis a column: time above, memory below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    figure, panels = plt.subplots(2, len(results), figsize=(3.1 * len(results) + 0.6, 5.4), squeeze=False)
    for (axis, found), (above, below) in zip(results.items(), panels.T, strict=True):
        series = list(dict.fromkeys(r.setting.series for r in found))
        for name, (colour, marker, line) in zip(series, SHADES[: len(series)], strict=True):
            own = [r for r in found if r.setting.series == name]
            x = [r.setting.x for r in own]
            style = {"color": colour, "marker": marker, "markersize": 4, "linestyle": line}
            above.plot(x, [r.ms(r.step) for r in own], label=name, **style)
            below.plot(x, [r.peak_mb for r in own], **style)
        ticks = sorted({r.setting.x for r in found})
        for panel in (above, below):
            panel.set_xscale("log")
            if axis != "items":  # its powers of ten label themselves
                panel.set_xticks(ticks, map(str, ticks))
                panel.set_xticks([], minor=True)
            if panel is above or axis == "items":
                panel.set_yscale("log")
                panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                panel.yaxis.set_major_formatter("{x:g}")
                panel.yaxis.set_minor_locator(NullLocator())
            else:
                panel.set_ylim(bottom=0)
            panel.grid(color="0.9", linewidth=0.6)
            panel.set_axisbelow(True)
            panel.spines[["top", "right"]].set_visible(False)
        above.legend(frameon=False, fontsize="small")
        below.set_xlabel(AXES[axis].label)
    panels[0, 0].set_ylabel("time of a step (ms, median)")
    panels[1, 0].set_ylabel("memory during a step (MB, peak)")
    figure.align_ylabels()
    figure.tight_layout()
    figure.savefig(path, format="png", dpi=150)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--axis", "axes", type=click.Choice(list(AXES)), multiple=True, help="Vary this alone.  [default: all]")
@click.option("--steps", type=click.IntRange(min=1), default=10, help="Steps to time at each setting.")
@click.option("--plot", "picture", type=click.Path(dir_okay=False, writable=True), help="Draw a figure too, a PNG.")
def main(axes, steps, picture):
    """Time training steps and sample their memory while one setting at a time grows."""
    if picture and importlib.util.find_spec("matplotlib") is None:
        raise click.ClickException("--plot: matplotlib is not installed: pip install matplotlib")
    if picture and not Path(picture).absolute().parent.is_dir():
        raise click.ClickException(f"--plot {picture}: there is no such folder; make it first")
    click.echo(f"{usable_cores()} cores; medians of {steps} steps")
    results = {}
    for axis in axes or AXES:
        results[axis] = []
        for setting in AXES[axis].settings():
            say(f"{axis}: {setting.series} at {setting.x:,}")
            results[axis].append(measure(setting, steps))
        heading = f"against {AXES[axis].label}: {AXES[axis].fixed}"
        click.echo("\n".join(["", heading, "", *table(axis, results[axis])]))
    if picture:
        plot(results, picture)
        say(f"wrote {picture}")


if __name__ == "__main__":
    main()
