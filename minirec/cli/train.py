"""`train`: one model."""

import os
import shlex
import signal
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import click
from click.core import ParameterSource

from minirec.cli import options
from minirec.cli.common import INTERRUPTED, Command, load_log, log_source, on_terminal, progress, say, say_json
from minirec.cli.inspect import metrics_table, remark_on_counts
from minirec.data.describe import remarks_on_targets
from minirec.data.split import training_windows
from minirec.errors import UserError
from minirec.parameters import Config
from minirec.training import runs
from minirec.training.fit import load, print_epoch, workers_for
from minirec.training.fit import train as train_model
from minirec.training.mpi import launched_rank, launched_ranks
from minirec.training.progress import best
from minirec.training.runs import SELECTED_BY
from minirec.training.settings import SIZES, Training, make_settings, model_config

DEFAULT_DATA = "household"


@click.command(cls=Command)
@click.option("--data", metavar="FILE", default=DEFAULT_DATA, help="The log: a file, or the name of an embedded one.")
@options.log
@click.option("--attn", type=options.WEIGHTING, default=Config.attn, help="The attention weighting.")
@click.option("--max-length", type=options.SIZE, default=Config.max_length, help="Latest items of a history to keep.")
@click.option("--hidden", type=options.SIZE, default=Config.hidden_size, help="Hidden size D.")
@click.option("--blocks", type=click.IntRange(1, 1000), default=Config.n_blocks, help="Transformer blocks.")
@click.option("--heads", type=options.SIZE, default=Config.n_heads, help="Attention heads: a divisor of --hidden.")
@click.option("--dropout", type=options.SHARE, default=Config.dropout, help="Share of values dropped in training.")
@options.of(Training, "loss", "negatives", "epochs", "batch_size", "lr", "patience", "seed")
@options.filter_seen(Training.filter_seen)
@options.backend
@options.workers
@click.option(
    "--mpi-buffers",
    type=click.Choice(["host", "device"]),
    default="host",
    help="Under mpiexec with --backend cupy: device, where the MPI library can read a GPU's memory.",
)
@click.option("--out", type=options.PATH, help="The run folder [default: a new one below runs/].")
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped: --out, or the newest.")
@options.as_json
@click.pass_context
def train(ctx, out, resume, as_json, mpi_buffers, **chosen):
    """Train one model, and keep the epoch that is best on validation.

    The run folder holds the model and all that is needed to go on. Ctrl-C stops after the current step.

    \b
    python cli.py train --data ratings.csv --attn uniform
    python cli.py train --resume
    mpiexec -n 4 python cli.py train --out runs/large     each batch over four processes

    Open MPI starts more processes than there are cores only with mpiexec --oversubscribe.
    """
    began = time.perf_counter()
    ranks = launched_ranks(mpi_buffers)
    if resume:
        folder = out or runs.newest_folder("resume", ("config.json",))
        _take_over(ctx, chosen, folder)
    else:
        folder = out or ranks.broadcast(lambda: runs.new_folder(runs.log_name(chosen["data"]), chosen["attn"]))
    source, chosen["workers"] = log_source(chosen["data"], chosen), chosen["workers"] or workers_for(ranks)
    try:
        settings = make_settings(source, 1, chosen)
    except UserError as error:
        raise click.UsageError(str(error)) from None
    log = load_log(source)
    settings["model"]["n_items"] = len(log.items)
    config, split = model_config(settings), runs.split_log(log, settings)
    say(f"{source.path}: {len(log.users):,} users, {len(log.items):,} items, {len(log.sequence):,} interactions")
    parts = [len(training_windows(log, split, config.max_length)[0]), len(split.valid.users), len(split.test.users)]
    if min(parts) < len(log.users):
        say("of the users, {:,} are trained on, {:,} have a validation target, {:,} a test target".format(*parts))
    for line in remarks_on_targets(log, split, chosen["filter_seen"]):
        say(line)
    say(f"{config.attn} attention, {config.n_blocks} blocks, D = {config.hidden_size} -> {folder}")

    try:
        # Ranks would not stop at the same step: an interrupt ends them all at once.
        with interruptible() if ranks.size == 1 else nullcontext(threading.Event()) as asked_to_stop:
            records, complete, _ = _train_with_progress(log, settings, folder, resume, asked_to_stop, ranks)
    except MemoryError:  # CuPy's is one too
        half = f"--batch-size {max(1, chosen['batch_size'] // 2)}"
        raise UserError(f"out of memory; start a new run with {half}, or a smaller --max-length or --hidden") from None
    if ranks.rank > 0:
        return
    if not complete:
        say(f"stopped; go on with: python cli.py train --resume --out {folder}")
        ctx.exit(INTERRUPTED)
    if asked_to_stop.is_set():
        say("training has come to its end; only the test is left")

    kept = best(records)
    model = replace(load(folder, backend=chosen["backend"]), read_log=lambda: log)
    test = model.evaluate(workers=chosen["workers"], progress=partial(progress, "ranking"))
    counted, *_ = (test.pop(name) for name in ("baselines", "attn", "filter_seen"))
    remark_on_counts(test, counted)
    say(f"{time.perf_counter() - began:.0f} s; kept epoch {kept['epoch']} of {len(records)}, the best on validation")
    if as_json:
        totals = {name: sum(record[name] for record in records) for name in ("steps", "train_seconds")}
        valid = {name: value for name, value in kept.items() if "@" in name}
        result = {"run": str(folder), "epochs": len(records), "best_epoch": kept["epoch"], "loss": kept["loss"]}
        say_json(result | totals | {"valid": valid, "test": test, "baselines": counted})
    else:
        click.echo(metrics_table("test", {config.attn: test} | counted))
        named = "" if folder.parent == runs.RUNS else f" {shlex.quote(str(folder))}"  # the newest there needs no name
        say(f"next: python cli.py evaluate{named} --attn uniform; python cli.py decompose{named}")


def _take_over(ctx, chosen, folder):
    """Set the options that were not typed to what the run in a folder was started with, and verify its log."""
    typed = {name for name in chosen if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT}
    if not os.path.exists(folder / "config.json"):
        if not typed:
            raise UserError(f"{folder}: no run to go on with; start it with the options that it is to have")
        say(f"{folder}: no run to go on with yet, so one is started")
        return
    settings = runs.load_settings(folder)
    source = runs.find_log(folder, settings, chosen["data"] if "data" in typed else None)
    before = settings["training"] | settings["data"] | {"data": source.path}
    before |= {option: settings["model"][name] for option, name in SIZES.items()}
    chosen |= {name: before[name] for name in set(chosen) - typed - {"workers"}}


@contextmanager
def interruptible():
    """Yield an event that the first Ctrl-C, or SIGTERM, sets; a second one interrupts at once."""
    asked_to_stop = threading.Event()

    def on_signal(*_):
        if asked_to_stop.is_set():
            raise KeyboardInterrupt
        asked_to_stop.set()
        say("\nstopping after this step; press Ctrl-C again to stop at once")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked_to_stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train_with_progress(log, settings, folder, resume, asked_to_stop, ranks):
    """Train under a bar that shows epoch, step, loss and validation; without a terminal, a line an epoch."""
    terminal, drawn, records = on_terminal(), time.perf_counter(), []
    with progress("training", settings["training"]["epochs"]) as update:

        def on_step(epoch, i, n_steps, loss):
            nonlocal drawn
            if terminal and time.perf_counter() - drawn > 0.5:  # reading the loss waits for a GPU: not at every step
                drawn = time.perf_counter()
                valid = f", valid {SELECTED_BY} {best(records)[SELECTED_BY]:.4f}" if records else ""
                update(0, f"epoch {epoch} step {i}/{n_steps} loss {float(loss):.3f}{valid}")

        def on_epoch(record):
            records.append(record)
            if terminal:
                update(1)
            elif not launched_rank():
                print_epoch(record)

        return train_model(log, settings, folder, resume, on_step, on_epoch, asked_to_stop.is_set, ranks)
