#!/usr/bin/env python3
"""The command line of minirec: options and printing, no maths. `python cli.py --help` shows the way."""

import codecs
import csv
import difflib
import importlib
import io
import json
import math
import os
import platform
import re
import shlex
import signal
import sys
import threading
import time
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
from click.core import ParameterSource

import minirec
from minirec import backend, files
from minirec.attention import known_weightings
from minirec.backend import load as load_backend
from minirec.data import planted
from minirec.data import public as cataloguing
from minirec.data.describe import count_unreachable, describe
from minirec.data.log import FORMATS, k_core, read_log, renumbered
from minirec.data.split import SPLITS, Targets, training_windows
from minirec.decompose import RATIOS, contributions, summarise
from minirec.decompose import decompose as decompose_sequences
from minirec.errors import UserError
from minirec.lesson import gradcheck as checking
from minirec.lesson import trace as tracing
from minirec.loss import LOSSES
from minirec.model import Config
from minirec.report import page as reporting
from minirec.studies import grid as studying
from minirec.studies.statistics import JUDGED_BY, METRICS, mean_g
from minirec.training import runs
from minirec.training.baselines import rank_baselines
from minirec.training.fit import SELECTED_BY, best
from minirec.training.fit import train as train_model
from minirec.training.parallel import abort, launched_rank, launched_ranks, usable_cores, worker_map
from minirec.training.ranking import CUTOFFS, MISS, metrics, rank_targets
from minirec.training.ranking import recommend as recommend_items

DEFAULT_DATA = "household"
TRAINING_OPTIONS = ("loss", "negatives", "epochs", "batch_size", "lr", "patience", "seed", "backend", "filter_seen")
EPOCHS, EPOCHS_EMBEDDED = 200, 100  # of a study: the embedded datasets must show their regimes in minutes
MANY_REPEATS = 0.2  # of the targets; where more are items that the user had before, people buy again
SIZE = click.IntRange(1, 1 << 24)
LONGEST_NAME = 60  # characters of a folder that is named after a log, of a name in a message
FEW = 3  # names that a message shows of many
INTERRUPTED = 130  # the shell's exit status after Ctrl-C
THE_WAY = """\
python cli.py study                      is learned attention needed? three embedded datasets, some minutes
python cli.py study --data ratings.csv   the same question, asked of your own log
python cli.py --help                     all commands; each has a --help of its own"""


class Number(click.FloatRange):
    """A range that NaN and infinity lie outside of; click's own lets NaN through."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def escape_what_cannot_be_shown():
    """Let stdout and stderr escape the characters that their encoding lacks: "\\xe9", not an error in mid-output.

    click takes a stream in ASCII for misconfigured, and writes UTF-8 to it. Under another name, ASCII is left as it is.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            is_ascii = codecs.lookup(stream.encoding).name == "ascii"
            stream.reconfigure(encoding=STRICT_ASCII if is_ascii else None, errors="backslashreplace")


def _find_strict_ascii(name):
    """Return the codec ASCII for the name STRICT_ASCII, None for any other, as codecs.register wants it."""
    if name != STRICT_ASCII:
        return None
    codec = codecs.lookup("ascii")
    return codecs.CodecInfo(*codec, codec.incrementalencoder, codec.incrementaldecoder, name=STRICT_ASCII)


STRICT_ASCII = "minirec_ascii"
codecs.register(_find_strict_ascii)


class Commands(click.Group):
    """A group whose commands end in one line for whatever a person can mend, never in a traceback."""

    def main(self, *args, **options):
        escape_what_cannot_be_shown()
        return super().main(*args, **options)

    def list_commands(self, ctx):
        return list(self.commands)  # in the order in which a newcomer meets them, not by letter

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (UserError, MemoryError, OSError, UnicodeError) as error:
            if isinstance(error, BrokenPipeError):
                raise  # the reader of stdout has had enough; click ends quietly
            message = "out of memory; try a smaller --batch-size, --max-length or --hidden"
            message = message if isinstance(error, MemoryError) else one_line(error)
            if launched_rank() is None:
                raise click.ClickException(message) from None
            if launched_rank() > 0:
                time.sleep(2)  # the first rank may have the same to say
            click.echo(f"Error: rank {launched_rank()}: {message}", err=True)
            abort()
            ctx.exit(1)
        except KeyboardInterrupt:
            say("stopped")
            abort()
            ctx.exit(INTERRUPTED)


def one_line(error):
    """Return an error's message without line breaks and control characters, which names in it may hold."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))


def say(text):
    """Print to stderr, where progress and remarks go: stdout is for results. Of several ranks, the first one speaks."""
    if not launched_rank():
        click.echo(text, err=True)


def say_json(value):
    """Print the one JSON object that --json promises."""
    click.echo(json.dumps(value, allow_nan=False))


def comma_list(text):
    return tuple(part.strip() for part in text.split(",")) if text else None


def on_terminal():
    """Whether stderr is a terminal that this process may draw on; a closed one is none."""
    return not launched_rank() and sys.stderr is not None and sys.stderr.isatty()


@contextmanager
def progress(label, length, least=0):
    """Yield update(n, text), which moves a bar on stderr; without a terminal, or below `least`, nothing is drawn."""
    if not on_terminal() or length < least:
        yield lambda n, text=None: None
        return
    with click.progressbar(length=length, label=label, file=sys.stderr, item_show_func=lambda text: text) as bar:
        yield bar.update


@contextmanager
def reading(path):
    """Yield what data.read_log calls with the bytes that it has read; a bar for files that take a while."""
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    with progress(f"reading {path}", size, least=1 << 24) as update:
        yield update


def run_argument(command):
    return click.argument("run", required=False, type=click.Path(path_type=Path))(command)


data_option = click.option("--data", help="Where the run's log lies now, if it was moved.")
any_data_option = click.option(
    "--data", help="Where the run's log lies now, or another log to take; items are matched by name."
)
backend_option = click.option("--backend", type=click.Choice(backend.BACKENDS), default="numpy", show_default=True)
workers_option = click.option(
    "--workers", type=click.IntRange(min=1), help="How many work at a time [default: all usable cores]."
)


def filter_seen_option(default):
    """Return the option that says whether items that a user has had are candidates; None: as the run was trained."""
    words = "Rank only items that the user has not had; where people buy again, all items."
    words += " [default: as trained]" if default is None else ""
    return click.option("--filter-seen/--no-filter-seen", default=default, show_default=bool(default), help=words)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object, nothing else, on stdout.")


class Run:
    """A finished run as the commands need it: settings, log, parameters. Nothing is read before it is used."""

    def __init__(self, folder, command, backend_name="numpy", data=None):
        self.folder = folder or runs.newest_folder(command)
        if not folder:
            say(f"run {self.folder}")
        self.settings = runs.load_settings(self.folder)
        self.config = runs.model_config(self.settings)
        self.xp = backend.load(backend_name)
        self.parameters = runs.load_parameters(self.folder, self.config, self.xp)
        self.data, self.another = data, False

    def log(self, source=None):
        """Return the log that the run was trained on; source: as from runs.find_log, if that was asked already."""
        source = source or runs.find_log(self.folder, self.settings, self.data)
        with reading(source["path"]) as update:
            return runs.load_run_log(self.folder, self.settings, source, update)

    def any_log(self, to_split):
        """Return the log that --data names, or the one that the run was trained on.

        Another one is read as that one was; `another` and settings["data"] then tell of it. to_split: whether it must
        hold enough to be split, and is filtered for that; else all its users and items stay.
        """
        trained_on, source = self.settings["data"], runs.find_log(self.folder, self.settings, self.data, another=True)
        self.another = source["sha256"] != trained_on["sha256"]
        if not self.another:
            return self.log(source)
        if not to_split and source["k_core"] > 1:
            say(f"the run's --k-core {source['k_core']} is not applied: users with fewer items get recommendations too")
        self.settings |= {"data": source if to_split else source | {"k_core": 1}}
        with reading(source["path"]) as update, self.telling_settings():
            log = runs.load_log(self.settings["data"], update, to_split)
        remark(log, source["path"], "")
        say(
            f"{source['path']}: another log than {self.folder} was trained on, read as {log.read_as or 'embedded'}: "
            f"{len(log.users):,} users, {len(log.items):,} items, {len(log.sequence):,} interactions"
        )
        return log

    @contextmanager
    def telling_settings(self):
        """Add to an error about another log what it is read and split by: its command has no options for that."""
        try:
            yield
        except UserError as error:
            if not self.another:
                raise
            source = self.settings["data"]
            names = ("columns", "format", "split", "k_core", "drop_repeats")
            words = _given(source | {"columns": ",".join(source["columns"] or ())}, *names) or " no options"
            how = f"--data {source['path']} is read and split as the log of {self.folder}, with{words}"
            raise UserError(f"{error}; {how}") from None

    def items(self):
        return runs.load_items(self.folder, self.config)

    def filter_seen(self, wanted):
        """Return whether items that the user has had are no candidates; wanted None: as trained."""
        trained = self.settings["training"]["filter_seen"]
        if wanted is None and not trained:
            say("as the run was trained, items that the user has had are candidates (--filter-seen removes them)")
        return trained if wanted is None else wanted


@click.group(
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(minirec.__version__, prog_name="minirec")
@click.pass_context
def main(ctx):
    """SASRec in plain NumPy/CuPy: is learned attention weighting needed, on your data?

    \b
    python cli.py study                     the answer for the embedded datasets, with figures
    python cli.py train                     one model, on an embedded dataset
    python cli.py evaluate --attn uniform   the same model with its attention replaced by an average
    python cli.py decompose                 how much does it mix positions?
    """
    if ctx.invoked_subcommand is None:
        click.echo(THE_WAY)
    warnings.simplefilter("ignore", RuntimeWarning)  # overflow and NaN are caught, and named, where they matter
    warnings.showwarning = lambda message, *_: say(one_line(message))
    if launched_rank() is None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # what batch systems send: as Ctrl-C
    if launched_rank() and ctx.invoked_subcommand not in ("train", "study"):
        ctx.exit()  # the first rank is enough for it


def log_options(command):
    """Add the options that say how a log is read, filtered and split."""
    for option in reversed(LOG_OPTIONS):
        command = option(command)
    return command


LOG_OPTIONS = [
    click.option("--format", type=click.Choice(FORMATS), help="The log's format [default: recognised by content]."),
    click.option("--columns", metavar="USER,ITEM[,TIME]", help="Its columns, where their names are not recognised."),
    click.option(
        "--split",
        type=click.Choice(list(SPLITS)),
        default="leave-one-out",
        show_default=True,
        help="What is held out: each user's last items, or the last tenth of all interactions.",
    ),
    click.option(
        "--k-core", type=SIZE, default=1, show_default=True, help="Keep users and items with at least so many entries."
    ),
    click.option("--drop-repeats", is_flag=True, help="Count an item that follows itself once."),
]


def reading_options(path, options):
    """Return how a log is read, filtered and split, as runs.load_log takes it."""
    source = {"path": path, "columns": comma_list(options["columns"])}
    return source | {name: options[name] for name in ("format", "split", "k_core", "drop_repeats")}


def log_source(path, options):
    """Return the "data" of a run's settings, its fingerprint taken."""
    source = reading_options(path, options) | {"sha256": runs.fingerprint(path)}
    if not runs.is_planted(path):
        source["path"] = os.path.abspath(path)
    return source


def load_log(source):
    """Return the log that is asked for, under a bar where it is large; a table without times is remarked on."""
    with reading(source["path"]) as update:
        log = runs.load_log(source, update)
    remark(log, source["path"])
    return log


def remark(log, path, remedy="; --columns USER,ITEM,TIME names one"):
    """Say what a person may not expect of a log."""
    if log.times is None and log.read_as.startswith("csv"):
        say(f"{path}: no column of times, so the file's order counts{remedy}")


def few(names):
    """Return a list of names as text: the first ones, long ones cut, then how many more there are."""
    shown = ", ".join(repr(name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME] + "...") for name in names[:FEW])
    return shown + (f" and {len(names) - FEW:,} more" if len(names) > FEW else "")


def versions():
    return {"minirec": minirec.__version__, "python": platform.python_version(), "numpy": np.__version__}


@main.command()
@click.option("--data", default=DEFAULT_DATA, show_default=True, help="A log of interactions, or the embedded dataset.")
@log_options
@backend_option
@click.option(
    "--attn", type=click.Choice(known_weightings()), default="softmax", show_default=True, help="Attention weighting."
)
@click.option(
    "--loss",
    type=click.Choice(LOSSES),
    default="ce",
    show_default=True,
    help="ce: all items; sampled: softmax over target and --negatives; bce: one unseen negative a position.",
)
@click.option("--negatives", type=SIZE, default=1024, show_default=True, help="For --loss sampled.")
@click.option("--epochs", type=click.IntRange(min=1), default=200, show_default=True, help="At most so many.")
@click.option("--batch-size", type=SIZE, default=128, show_default=True, help="Sequences a step.")
@click.option("--max-length", type=SIZE, default=50, show_default=True, help="Latest items kept.")
@click.option("--hidden", type=SIZE, default=64, show_default=True, help="Hidden size D.")
@click.option("--blocks", type=click.IntRange(1, 1000), default=2, show_default=True)
@click.option("--heads", type=SIZE, default=2, show_default=True, help="They divide --hidden.")
@click.option("--dropout", type=Number(0, 1, max_open=True), default=0.5, show_default=True)
@click.option("--lr", type=Number(0, min_open=True), default=1e-3, show_default=True, help="Learning rate of Adam.")
@click.option("--patience", type=click.IntRange(min=1), default=10, show_default=True, help="Epochs without a gain.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@workers_option
@filter_seen_option(True)
@click.option(
    "--mpi-buffers",
    type=click.Choice(["host", "device"]),
    default="host",
    show_default=True,
    help="device: under mpiexec with a GPU, where MPI reads its memory.",
)
@click.option("--out", type=click.Path(path_type=Path), help="The run folder [default: a new one below runs/].")
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped: --out, or the newest.")
@json_option
@click.pass_context
def train(ctx, out, resume, as_json, mpi_buffers, **options):
    """Train one model, and keep the epoch that is best on validation.

    \b
    python cli.py train --data ratings.csv --attn uniform
    mpiexec -n 4 python cli.py train --out runs/large     each batch over four processes

    Open MPI starts more processes than there are cores only with mpiexec --oversubscribe.
    """
    began = time.perf_counter()
    ranks = launched_ranks(mpi_buffers)
    if ranks.size > 1 and not (out or resume):
        out = ranks.share(lambda: runs.new_folder(log_name(options["data"]), options["attn"]))
    folder = out or (runs.newest_folder("resume", ("config.json",)) if resume else None)
    given = ctx.get_parameter_source("data") is not ParameterSource.DEFAULT
    before = runs.load_settings(folder) if resume and os.path.exists(folder / "config.json") else None
    if before:
        _take_over(ctx, options, before)
        runs.find_log(folder, before, options["data"] if given else None)
    elif resume and all(ctx.get_parameter_source(name) is ParameterSource.DEFAULT for name in options):
        raise UserError(f"{folder}: no run to go on with; start it with the options that it is to have")
    elif resume:
        say(f"{folder}: no run to go on with yet, so one is started")
    source = log_source(options["data"], options)
    sizes = [options[name] for name in ("hidden", "blocks", "heads", "max_length", "dropout", "attn")]
    try:
        Config(1, *sizes)
    except UserError as error:
        raise click.UsageError(str(error)) from None
    log = load_log(source)
    config = Config(len(log.items), *sizes)
    workers = options["workers"] or max(1, usable_cores() // ranks.size)
    settings = {
        "data": source,
        "model": asdict(config),
        "training": {name: options[name] for name in TRAINING_OPTIONS}
        | {"workers": workers, "protocol": runs.PROTOCOL},
        "versions": versions(),
    }
    folder = folder or runs.new_folder(log_name(options["data"]), config.attn)
    split = runs.split_log(log, settings)
    say(f"{options['data']}: {len(log.users):,} users, {len(log.items):,} items, {len(log.sequence):,} interactions")
    parts = [len(training_windows(log, split, config.max_length)[0]), len(split.valid.users), len(split.test.users)]
    if min(parts) < len(log.users):
        say("of the users, {:,} are trained on, {:,} have a validation target, {:,} a test target".format(*parts))
    if options["filter_seen"]:
        remark_on_repeats(count_unreachable(log, split.test), len(split.test.users))
    say(f"{config.attn} attention, {config.n_blocks} blocks, D = {config.hidden_size} -> {folder}")

    try:
        # Ranks would not stop at the same step: an interrupt ends them all at once.
        with interruptible() if ranks.size == 1 else nullcontext(threading.Event()) as asked_to_stop:
            records, complete = _train_with_progress(log, settings, folder, resume, asked_to_stop, ranks)
    except MemoryError:  # CuPy's is one too
        half = f"--batch-size {max(1, options['batch_size'] // 2)}"
        raise UserError(f"out of memory; start a new run with {half}, or a smaller --max-length or --hidden") from None
    if ranks.rank > 0:
        return
    if not complete:
        say(f"stopped; go on with: python cli.py train --resume --out {folder}")
        ctx.exit(INTERRUPTED)
    if asked_to_stop.is_set():
        say("training has come to its end; only the test is left")

    chosen = best(records)
    run = Run(folder, "train", options["backend"])
    test, counted = _evaluate(run, log, config, "test", options["filter_seen"], workers)
    say(f"{time.perf_counter() - began:.0f} s; kept epoch {chosen['epoch']} of {len(records)}, the best on validation")
    if as_json:
        totals = {name: sum(record[name] for record in records) for name in ("steps", "train_seconds")}
        valid = {name: value for name, value in chosen.items() if "@" in name}
        result = {"run": str(folder), "epochs": len(records), "best_epoch": chosen["epoch"], "loss": chosen["loss"]}
        say_json(result | totals | {"valid": valid, "test": test, "baselines": counted})
    else:
        click.echo(metrics_table("test", {config.attn: test} | counted))
        say("next: python cli.py evaluate --attn uniform; python cli.py decompose; python cli.py recommend")


def _take_over(ctx, options, settings):
    """Set the options that were not given on the command line to what a run was started with."""
    model, data = settings["model"], settings["data"]
    source = {name: data[name] for name in ("format", "split", "k_core", "drop_repeats")}
    before = (
        settings["training"]
        | source
        | {
            "data": data["path"],
            "columns": ",".join(data["columns"] or ()) or None,
            "hidden": model["hidden_size"],
            "blocks": model["n_blocks"],
            "heads": model["n_heads"],
            "max_length": model["max_length"],
            "dropout": model["dropout"],
            "attn": model["attn"],
        }
    )
    for name in options:
        if ctx.get_parameter_source(name) is ParameterSource.DEFAULT and name != "workers":
            options[name] = before[name]


def log_name(path):
    """Return a short name for a log, fit for a folder."""
    return re.sub(r"[^\w-]", "_", Path(path).name.split(".")[0])[:LONGEST_NAME] or "log"


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
    """Train under a bar that shows epoch, loss, validation and speed; without a terminal, a line an epoch."""
    epochs, shown, records = settings["training"]["epochs"], {"at": time.perf_counter(), "steps": 0}, []
    terminal = on_terminal()
    with progress("training", epochs) as update:

        def on_step(epoch, i, n_steps, loss):
            now = time.perf_counter()
            shown["steps"] += 1
            if terminal and now - shown["at"] > 0.5:  # reading the loss waits for a GPU: not at every step
                speed = shown["steps"] / (now - shown["at"])
                valid = f", valid {SELECTED_BY} {best(records)[SELECTED_BY]:.4f}" if records else ""
                update(0, f"epoch {epoch} step {i}/{n_steps} loss {float(loss):.3f}{valid}, {speed:.0f} steps/s")
                shown.update(at=now, steps=0)

        def on_epoch(record):
            records.append(record)
            if terminal:
                update(1)
            else:
                say(
                    f"epoch {record['epoch']:3d}  loss {record['loss']:.4f}  valid HR@10 {record['HR@10']:.4f} "
                    f"{SELECTED_BY} {record[SELECTED_BY]:.4f}  {record['train_seconds']:.1f} s"
                )

        stop = asked_to_stop.is_set if ranks.size == 1 else None
        return train_model(log, settings, folder, resume, on_step, on_epoch, stop, ranks)


def remark_on_repeats(unreachable, n_targets):
    """Say how many targets filter-seen makes impossible, if any; where there are many, name the option to keep them."""
    if unreachable:
        many = unreachable > MANY_REPEATS * n_targets
        say(
            f"{unreachable:,} of {n_targets:,} targets are items the user had before: with --filter-seen they cannot "
            "be hit and count as misses" + ("; where people buy again, use --no-filter-seen" if many else "")
        )


def _evaluate(run, log, config, part, filter_seen, workers):
    """Return metrics of a run on one part of a log, with how many targets cannot be hit for what reason, and
    {baseline: metrics} of the rankings by counts; none for another log than that whose training part was trained on."""
    with run.telling_settings():
        split = runs.split_log(log, run.settings)
        wanted = getattr(split, part)
        if not len(wanted.users):
            raise UserError(f"{run.settings['data']['path']}: no user has a target for {part}")
    sequence, cases, ranked, missed = log.sequence, wanted, np.arange(len(wanted.users)), {}
    if run.another:
        sequence, cases, ranked, missed = _known_cases(run, log, wanted)
    ranks, done = np.full(len(wanted.users), MISS), 0
    with worker_map(workers or usable_cores(), run.xp) as run_map, progress("ranking", len(ranked)) as update:
        for chunk in rank_targets(run.parameters, config, sequence, cases, filter_seen, run_map):
            ranks[ranked[done : done + len(chunk)]] = chunk
            done += len(chunk)
            update(len(chunk))
    unreachable, result = int((ranks[ranked] >= MISS).sum()), metrics(ranks)
    counted = {} if run.another else _count(log, split, part, filter_seen, result[SELECTED_BY])
    return {"split": part} | result | {"users": len(ranks), "unreachable": unreachable} | missed, counted


def _count(log, split, part, filter_seen, reached):
    """Return {baseline: metrics} of the rankings by counts; say which of them beat `reached`, the model's metric."""
    ranks = rank_baselines(log, split, getattr(split, part), filter_seen)
    counted = {name: metrics(found) for name, found in ranks.items()}
    if better := {name: m[SELECTED_BY] for name, m in counted.items() if m[SELECTED_BY] > reached}:
        names = " and ".join(f"{name} ({value:.4f})" for name, value in better.items())
        say(f"counting beats the model: {part} {SELECTED_BY} {reached:.4f}, by {names}")
    return counted


def _known_cases(run, log, cases):
    """Return, of the cases of another log, those that the run's model can rank; say how many others there are.

    They come as sequence and Targets in the model's numbering, and as places among all cases; then the numbers of
    the others as {what is unknown: so many}.
    """
    known, moved = _known_part(run, log, run.items())
    starts, stops = moved[cases.starts], moved[cases.stops]
    has_target, has_history = moved[cases.stops + 1] > stops, stops > starts
    ranked = np.flatnonzero(has_target & has_history)
    missed = {"unknown_targets": int((~has_target).sum()), "unknown_histories": int((has_target & ~has_history).sum())}
    for count, what in zip(missed.values(), ("targets are", "histories before a known target are all"), strict=True):
        if count:
            say(f"{count:,} of {len(starts):,} {what} unknown to the model: they count as misses")
    return known.sequence, Targets(cases.users[ranked], starts[ranked], stops[ranked]), ranked, missed


def _known_part(run, log, items):
    """Return what data.renumbered does of another log than the run's, and say how much is left out."""
    known, moved = renumbered(log, items)
    path, left_out = run.settings["data"]["path"], len(log.sequence) - len(known.sequence)
    if not len(known.sequence):
        raise UserError(
            f"{path}: the model of {run.folder} knows none of its {len(log.items):,} items, such as "
            f"{log.items[0]!r}; those that it knows look like {items[0]!r}"
        )
    if left_out:
        n_unknown = len(set(log.items).difference(items))
        say(
            f"{n_unknown:,} of its {len(log.items):,} items are unknown to the model: "
            f"left out, with {left_out:,} of {len(log.sequence):,} interactions"
        )
    return known, moved


def metrics_table(part, columns):
    """Return metrics as lines of text, a row a cutoff; columns: {what ranked: its metrics}, the baselines last."""
    names, width = ("HR", "NDCG", "MRR"), 24
    lines = [
        f"{part:<6}" + "".join(f"{title[:width]:>{width}}" for title in columns),
        f"{'':<6}" + "".join(f"{name:>{width // len(names)}}" for name in names) * len(columns),
    ]
    for k in CUTOFFS:
        cells = (f"{values[f'{name}@{k}']:{width // len(names)}.4f}" for values in columns.values() for name in names)
        lines.append(f"{'@' + str(k):>6}" + "".join(cells))
    return "\n".join(lines)


@main.command()
@click.option("--data", multiple=True, help="A log; give it once a log [default: the embedded datasets].")
@log_options
@click.option("--attn", type=click.Choice(known_weightings()), multiple=True, help="Weightings [default: all].")
@click.option("--seeds", type=click.IntRange(1, 1000), default=3, show_default=True, help="Runs of each weighting.")
@click.option("--epochs", type=click.IntRange(min=1), help="At most so many [default: 200; embedded datasets 100].")
@click.option("--patience", type=click.IntRange(min=1), default=10, show_default=True, help="Epochs without a gain.")
@click.option("--max-length", type=SIZE, help="Latest items kept [default: 200 for long histories, else 50].")
@click.option("--dropout", type=Number(0, 1, max_open=True), help="[default: 0.2 for dense logs, else 0.5].")
@backend_option
@filter_seen_option(True)
@click.option("--workers", type=click.IntRange(min=1), help="Runs at a time [default: all usable cores].")
@click.option("--out", type=click.Path(path_type=Path), help="[default: runs/study, or runs/study-LOG].")
@json_option
def study(data, attn, seeds, workers, out, as_json, **options):
    """Is learned attention needed on this data? The verdict.

    A grid of runs: trains every attention weighting with the same seeds, measures how much the
    trained models mix positions, and names each log's regime, with statistics and figures. Started again, it
    goes on where it was stopped.

    \b
    python cli.py study
    python cli.py study --data ratings.csv --seeds 5
    mpiexec -n 5 python cli.py study      four runs at a time, on one machine or several

    Open MPI starts more processes than there are cores only with mpiexec --oversubscribe.
    """
    weightings = tuple(dict.fromkeys(attn)) or known_weightings()
    if not {"softmax", "uniform"} <= set(weightings):
        raise click.UsageError("a study compares softmax with uniform: --attn must name both.")
    try:
        importlib.import_module("scipy.stats")
    except ImportError:  # now, not after the runs
        raise UserError("a study needs scipy for its statistics: pip install 'minirec[study]'") from None
    load_backend(options["backend"])  # or say now what it lacks
    datasets = []
    for path in data or planted.DATASETS:
        if not data and not runs.is_planted(path):
            raise UserError(f"{path} is a file here: study it with --data {path}, or the embedded {path} elsewhere")
        dataset = _study_dataset(path, options)
        if dataset.name in [other.name for other in datasets]:
            raise click.UsageError(f"two logs are called {dataset.name}: rename one, or study it with another --out.")
        datasets.append(dataset)
    out = out or runs.RUNS / "-".join(["study", *(dataset.name for dataset in datasets if data)])[:LONGEST_NAME]
    files.make_folder(out)
    with nullcontext() if launched_rank() else files.locked(out) as lock:
        jobs = studying.grid(datasets, weightings, seeds, out)
        try:
            failures = _run_grid(jobs, (workers or usable_cores()) if options["backend"] == "numpy" else 0, lock)
        except KeyboardInterrupt:
            say("\nstopped; the same command goes on from here")
            raise click.exceptions.Exit(INTERRUPTED) from None
        say("summing up")
        results, rows = studying.collect(jobs)
        if not results:
            raise UserError(f"no dataset has a finished run of each weighting: {failures[0]}")
        everything = studying.write_results(out, results, rows)
        times = studying.times(jobs)
        studying.write_times(out, times)
        _show_study(results, everything, times, jobs, out, as_json)
    if failures:
        raise UserError(f"{len(failures)} of {len(jobs)} runs failed; the same command tries them again")


def _show_study(results, everything, times, jobs, out, as_json):
    """Print the results of a study, then draw them."""
    if as_json:
        say_json({"datasets": results})
    else:
        for name, result in results.items():
            click.echo(study_table(name, result, times[name]))
        click.echo("\n".join(["", *(studying.verdict(name, result) for name, result in results.items())]))
    written = ["study.json", "study.csv", "times.json"]
    try:
        from minirec.studies import plots as figures

        written += [
            path.name for path in figures.study_pictures(results, everything, studying.learning_curves(jobs), out)
        ]
    except ImportError:
        say("no figures: they need matplotlib; pip install 'minirec[study]'")
    say(f"wrote {out}: {', '.join(written)}")
    if any(result["mean_g"] is None for result in results.values()):
        say("without an effect size, which needs seeds that differ, a log has no point in rq3.png")


def _study_dataset(path, options):
    """Read a log, choose what was not given, and say what is studied."""
    source = log_source(path, options)
    log = load_log(source)
    length, rate = studying.sensible(log)
    length, rate = options["max_length"] or length, rate if options["dropout"] is None else options["dropout"]
    epochs = options["epochs"] or (EPOCHS_EMBEDDED if runs.is_planted(path) else EPOCHS)
    settings = {
        "data": source,
        "model": asdict(Config(len(log.items), max_length=length, dropout=rate)),
        "training": {param.name: param.default for param in train.params if param.name in TRAINING_OPTIONS}
        | {"epochs": epochs, "protocol": runs.PROTOCOL}
        | {name: options[name] for name in ("patience", "backend", "filter_seen")},
        "versions": versions(),
    }
    split = runs.split_log(log, settings)
    say(
        f"{log_name(path)}: {len(log.users):,} users, {len(log.items):,} items, {len(log.sequence):,} interactions; "
        f"{len(split.test.users):,} test users; the last {length} items, dropout {rate}, {epochs} epochs at most"
    )
    if options["filter_seen"]:
        remark_on_repeats(count_unreachable(log, split.test), len(split.test.users))
    if not len(split.test.users) or not len(training_windows(log, split, length)[0]):
        raise UserError(f"{path}: too small for a {source['split']} split: no user to test on, or nothing to train on")
    return studying.Dataset(log_name(path), log, settings)


def _run_grid(jobs, n_processes, lock):
    """Run what is left of a grid, under a bar or with a line a run; return what failed, as lines."""
    left = [job for job in jobs if studying.load_analysis(job) is None]
    if len(left) < len(jobs):
        say(f"{len(jobs) - len(left)} of {len(jobs)} runs are finished already")
    costs = {job.folder: len(job.dataset.log.sequence) for job in left}  # of an epoch
    done, lengths, failures = dict.fromkeys(costs, 0.0), {}, []
    began, terminal, ended, shown = time.perf_counter(), on_terminal(), 0, 0
    with progress("training", sum(costs.values())) as update:

        def report(job, event, value):
            nonlocal ended, shown
            epochs = lengths.setdefault((job.dataset.name, job.attn), [])  # of the runs of this kind
            if event == "epoch":  # early stopping ends most runs: the earlier ones of the kind say when
                last = value["epoch"]
                expected = np.mean(epochs) if epochs else job.settings()["training"]["epochs"]
                done[job.folder] = costs[job.folder] * min(last / expected, 0.95)
            else:
                done[job.folder] = costs[job.folder]
                ended += 1
            if event == "failed":
                failures.append(f"{job}: {one_line(value)}")
                say(f"failed: {failures[-1]}")
                return
            if event == "done":
                last = studying.load_analysis(job)[0]["epochs"]
                epochs.append(last)
            if terminal:
                now = int(sum(done.values()))
                update(now - shown, f"{job}: epoch {last}")
                shown = now
            elif event == "done":
                share = sum(done.values()) / sum(costs.values())
                rest = (time.perf_counter() - began) * (1 / share - 1)
                say(f"[{ended}/{len(left)}] {job}: {last} epochs; about {rest / 60:.0f} min left")

        if launched_rank() is None:
            studying.run_grid(left, n_processes, report, lock)
        elif not studying.run_grid_over_ranks(left, report):
            raise click.exceptions.Exit
    return failures


def study_table(name, result, times):
    """Return a dataset's arms, baselines and effects as lines of text."""

    def line(title, cells, last=""):
        return f"  {title:<29}" + "".join(f"{cell:>15}" for cell in cells) + (last and f"{last:>9}")

    n = len(result["seeds"])
    lines = ["", line(f"{name} (mean ± std of {n} seed{'s' * (n > 1)})", METRICS, "ms/user")]
    for attn, values in result["metrics"].items():
        cells = [
            f"{v['mean']:.4f}" + (f" ±{v['std']:.4f}" if v["std"] is not None else "") for v in map(values.get, METRICS)
        ]
        lines.append(line(attn, cells, f"{np.median(times[attn]['milliseconds']):.2f}"))
    others = {"softmax, uniform put in": result["substitution"]["all"]}
    others |= {f"  only in {block}": v for block, v in result["substitution"].items() if block != "all"}
    others |= {f"{attn}, history shuffled": v for attn, v in result["shuffled"].items()}
    others |= {f"{baseline} (counts)": v for baseline, v in result["baselines"].items()}
    lines += [line(title, [f"{values[c]:.4f}" for c in METRICS]) for title, values in others.items()]
    for what, (a, b) in studying.COMPARED.items():
        if what in result:
            lines += effect_lines(f"{what}, {a} - {b}", result[what])
    mixing = result["mixing"]
    blocks = ", ".join(f"block {i} {block['attn_res_ln']['mean']:.3f}" for i, block in enumerate(mixing["blocks"]))
    entropy = mixing["all"]["entropy"]["mean"]
    lines.append(
        f"  mixing ratio {result['mixing_ratio']:.3f} ({blocks}; latest position "
        f"{mixing['latest']['attn_res_ln']['mean']:.3f}); entropy of A {'-' if entropy is None else f'{entropy:.3f}'}"
    )
    limit = result["epochs_at_most"]
    if cut := [attn for attn, epochs in result["epochs"].items() if max(epochs) >= limit]:
        lines.append(f"  {', '.join(cut)}: ended by the limit of {limit} epochs, and might still improve (--epochs)")
    if result["unreachable"]:
        lines.append(
            f"  {result['unreachable']:,} of {result['test_users']:,} targets are items the user had before: misses"
        )
    if not result["filter_seen"]:
        lines.append("  items that the user had before are candidates (--no-filter-seen)")
    return "\n".join(lines)


def effect_lines(title, comparisons):
    """Return what one effect of a study comes to, as lines of text."""
    c, g = comparisons[JUDGED_BY], mean_g([c["hedges_g"] for c in comparisons.values()])
    relative = "" if c["relative"] is None else f" ({c['relative']:+.1%})"
    lines = [f"  {title}: {JUDGED_BY} {c['difference']:+.4f}{relative}"]
    undefined = [name for name, comparison in comparisons.items() if comparison["hedges_g"] is None]
    if g is not None:
        lines[0] += f"; Hedges' g {g:+.2f}, the mean of {len(comparisons) - len(undefined)} metrics"
    if undefined:
        lines[0] += f"; g undefined for {', '.join(undefined)}: no spread over seeds"
    lines[0] += "" if c["p"] is None else f"; paired t-test p = {c['p']:.2g}"
    intervals = {over: c[f"interval_{over}"] for over in ("seeds", "users") if c[f"interval_{over}"]}
    texts = [f"{low:+.4f} to {high:+.4f} over {over}" for over, (low, high) in intervals.items()]
    return [*lines, f"    95 % intervals: {', '.join(texts)}"]


@main.command()
@run_argument
@any_data_option
@click.option("--split", type=click.Choice(["valid", "test"]), default="test", show_default=True)
@filter_seen_option(None)
@click.option("--attn", type=click.Choice(known_weightings()), help="Replace the trained weighting.")
@click.option("--attn-blocks", metavar="I,J", help="Replace it in these blocks only; 0 is the first.")
@backend_option
@workers_option
@json_option
def evaluate(run, data, split, filter_seen, attn, attn_blocks, backend, workers, as_json):
    """How well does a model rank? HR, NDCG and MRR over all items.

    Beside the model stand two rankings by counts, which learn nothing: popularity, and transitions, how often an item
    followed the user's last one. --attn replaces the attention weights of the trained model: does it need those that it
    learned? Another log with --data is split as the run's; targets that the model does not know are misses, and counts
    of what it was trained on are not at hand.

    \b
    python cli.py evaluate runs/household-softmax-1 --attn uniform --attn-blocks 1
    python cli.py evaluate --data today.csv
    """
    if attn_blocks is not None and not attn:
        raise click.UsageError("--attn-blocks says where; --attn must say what to put there.")
    run = Run(run, "evaluate", backend, data)
    config = run.config
    if attn:
        config = replace(config, attn=_substitute(config, attn, attn_blocks))
    filter_seen = run.filter_seen(filter_seen)
    result, counted = _evaluate(run, run.any_log(to_split=True), config, split, filter_seen, workers)
    remark_on_repeats(result["unreachable"], result["users"])
    if as_json:
        say_json(result | {"attn": list(config.weightings), "filter_seen": filter_seen, "baselines": counted})
    else:
        weightings = "+".join(config.weightings if len(set(config.weightings)) > 1 else config.weightings[:1])
        click.echo(metrics_table(split, {weightings: result} | counted))


def _substitute(config, attn, attn_blocks):
    """Return the weightings of all blocks with `attn` in the blocks named "0,1", or everywhere."""
    if attn_blocks is None:
        return (attn,) * config.n_blocks
    weightings = list(config.weightings)
    for text in attn_blocks.split(","):
        text = text.strip()
        if text not in map(str, range(config.n_blocks)):
            raise click.UsageError(f"--attn-blocks: {text!r} is no block; this run has 0 to {config.n_blocks - 1}.")
        weightings[int(text)] = attn
    return tuple(weightings)


@main.command()
@run_argument
@data_option
@click.option("--out", type=click.Path(path_type=Path), help="Write decomposition.npz and heatmaps to this folder.")
@backend_option
@workers_option
@json_option
def decompose(run, data, out, backend, workers, as_json):
    """How much do the attention blocks mix positions?

    The ratio is |mixed| / (|mixed| + |kept|) over the test users' histories: 0 keeps each position as
    it is, 1 replaces it by the others. Shown for the attention output alone (Attn), with the residual
    (AttnRes) and after the layer norm (AttnResLN, the paper's figure).

    \b
    python cli.py decompose --out decomposition     with arrays and heatmaps
    """
    run = Run(run, "decompose", backend, data)
    log = run.log()
    wanted = runs.split_log(log, run.settings).test
    histories = [log.sequence[a:b] for a, b in zip(wanted.starts, wanted.stops, strict=True)]
    n_tokens = int(np.minimum(wanted.stops - wanted.starts, run.config.max_length).sum())
    with worker_map(workers or usable_cores(), run.xp) as run_map, progress("decomposing", n_tokens) as update:
        result = decompose_sequences(run.parameters, run.config, histories, run_map, update)
    summary = summarise(result)
    if out:
        users = np.array([log.users[u] for u in wanted.users])
        _write_decomposition(out, result, users)
    if as_json:
        say_json(summary)
        return
    rows = [(f"block {i}", values) for i, values in enumerate(summary["blocks"])]
    rows += [(name.replace("_", " "), summary[name]) for name in ("all", "without_first", "latest")]
    names = {"attn": "Attn", "attn_res": "AttnRes", "attn_res_ln": "AttnResLN", "entropy": "entropy of A"}
    click.echo(f"{'mean (median)':>14}" + "".join(f"{name:>18}" for name in names.values()))
    for title, values in rows:
        cells = (values[name] for name in names)
        texts = (f"{v['mean']:.3f} ({v['median']:.3f})" if v["n"] else "-" for v in cells)
        click.echo(f"{title:>14}" + "".join(f"{text:>18}" for text in texts))


def _write_decomposition(folder, result, users):
    """Write decomposition.npz and, where matplotlib is there, heatmaps.png."""
    from minirec.studies import plots as figures

    files.make_folder(folder)
    arrays = {"users": users[result["sequences"]], "positions": result["positions"]}
    for i, block in enumerate(result["blocks"]):
        arrays |= {f"blocks.{i}.{name}": block[name] for name in (*RATIOS, "entropy", "attention", "contribution")}
    files.write_arrays(folder / "decomposition.npz", arrays)
    say(f"wrote {folder / 'decomposition.npz'}")
    try:
        figures.heatmaps(result, folder / "heatmaps.png")
        say(f"wrote {folder / 'heatmaps.png'}")
    except ImportError:
        say("no heatmaps: they need matplotlib; pip install 'minirec[study]'")


@main.command()
@run_argument
@any_data_option
@click.option("--user", help="A user of the log [default: its first].")
@click.option("--history", metavar="A,B,C", help="Item ids, oldest first, instead of a user.")
@click.option("--users", metavar="FILE", help="The users that a file names, one a line; needs --out.")
@click.option("--all", "everyone", is_flag=True, help="All users of the log; needs --out.")
@click.option("--top", type=click.IntRange(min=1), default=10, show_default=True, help="How many items.")
@click.option("--explain", is_flag=True, help="Show which history items the prediction is made of.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="The CSV file for --all and --users.")
@filter_seen_option(None)
@backend_option
@workers_option
@json_option
def recommend(run, data, user, history, users, everyone, top, explain, out, filter_seen, backend, workers, as_json):
    """Which items does a model rank highest, and why?

    Users and histories are those of the log that the model was trained on, or of another one with --data: what
    the model does not know of it is left out.

    \b
    python cli.py recommend --history "item 3,item 17" --explain
    python cli.py recommend --all --out recommendations.csv
    python cli.py recommend --all --out recommendations.csv --data today.csv
    """
    many = everyone or users is not None
    if (user is not None) + (history is not None) + (users is not None) + everyone > 1:
        raise click.UsageError("choose one of --user, --history, --users and --all.")
    if many != bool(out):
        raise click.UsageError("--all and --users need --out FILE.csv, and --out needs one of them.")
    if explain and (many or as_json):
        raise click.UsageError("--explain is a table of one history, not for --all, --users or --json.")
    if data and history is not None:
        raise click.UsageError("--data is for users of a log; --history needs none.")
    run = Run(run, "recommend", backend, data)
    items, filter_seen = run.items(), run.filter_seen(filter_seen)
    if many:
        summary = _recommend_many(run, items, users, top, out, filter_seen, workers)
        if as_json:
            say_json(summary)
        return
    if history is not None:
        sequence, left_out = _known_items(history, items)
        result = {"history": [items[i] for i in sequence]}
    else:
        user, sequence, left_out = _user_history(run, items, user)
        result = {"user": user}
    ((order, scores),) = recommend_items(run.parameters, run.config, [sequence], top, filter_seen=filter_seen)
    if np.isneginf(scores[0]).all():
        say("nothing to recommend: the history holds every item")
    best = [
        {"item": items[item], "score": float(score)}
        for item, score in zip(order[0], scores[0], strict=True)
        if score > -np.inf
    ]
    if as_json:
        say_json(result | {"left_out": left_out, "recommendations": best})
        return
    for rank, row in enumerate(best, 1):
        click.echo(f"{rank:4d}  {row['item']:<30} {row['score']:8.3f}")
    if explain:
        _explain(run, sequence, items)


def _known_items(history, items):
    """Return the item numbers of a history "a,b,c", and how many of its names are unknown, which are skipped."""
    numbers = {name: i for i, name in enumerate(items)}
    try:  # an id with a comma can be quoted; a line break separates too
        fields = [field for row in csv.reader(re.split("[\r\n]+", history)) for field in row if field.strip()]
    except csv.Error as error:
        raise UserError(f"--history: cannot be read ({error})") from None
    names = [field if field in numbers else field.strip() for field in fields]
    most_commas = max(name.count(",") for name in items)
    for start in range(len(names)):
        for stop in range(start + 2, min(start + 1 + most_commas, len(names)) + 1):
            joined = ",".join(fields[start:stop]).strip()
            if joined in numbers and not all(name in numbers for name in names[start:stop]):
                quoted = shlex.quote('"' + joined.replace('"', '""') + '"')
                raise UserError(f"--history: {joined!r} is one item, whose commas need quotes: --history {quoted}")
    unknown = [name for name in names if name not in numbers]
    known = np.array([numbers[name] for name in names if name in numbers], int)
    if unknown and len(known):
        say(f"skipped, not in the training log: {few(unknown)}")
    if not len(known):
        near = difflib.get_close_matches(names[0], items, 1) if names else []
        like = f"items look like {(near or items)[0]!r}"
        raise UserError(f"--history: none of its items is in the training log: {few([history])}; {like}")
    return known, len(unknown)


def _known_histories(run, items):
    """Return the log to recommend from in the run's numbering of items, and the lengths [U] of its whole histories."""
    log = run.any_log(to_split=False)
    lengths = np.diff(log.offsets)
    return (_known_part(run, log, items)[0] if run.another else log), lengths


def _user_history(run, items, user):
    """Return a user's name, their history in the run's numbering of items, and how many items of it are left out."""
    log, lengths = _known_histories(run, items)
    path = run.settings["data"]["path"]
    user = log.users[0] if user is None else user
    if user not in log.users:
        near = difflib.get_close_matches(user, log.users, 1)
        raise UserError(f"no user {user!r} in {path}" + (f"; did you mean {near[0]!r}?" if near else ""))
    number = log.users.index(user)
    sequence = log.history(number)
    left_out = int(lengths[number]) - len(sequence)
    if not len(sequence):
        raise UserError(
            f"nothing to recommend to user {user!r} of {path}: all {left_out} items are unknown to the model"
        )
    say(f"user {user}, {len(sequence)} items" + (f"; unknown to the model: {left_out} more" if left_out else ""))
    return user, sequence, left_out


def _recommend_many(run, items, names_path, top, out, filter_seen, workers):
    """Write user,rank,item,score for all users of the log, or for those that a file names; return what --json says.

    They are written as they are ranked: nothing here grows with their number but a number for each.
    """
    for path in filter(None, (names_path, run.data or run.settings["data"]["path"])):
        if os.path.exists(path) and os.path.exists(out) and os.path.samefile(path, out):
            raise UserError(f"{out}: is read from; choose another --out")
    log, _ = _known_histories(run, items)
    users, unknown = np.arange(len(log.users)), 0
    if names_path is not None:
        users, unknown = _named_users(names_path, log, run.settings["data"]["path"])
    known = np.diff(log.offsets)[users] > 0
    if not known.all():
        names = [log.users[u] for u in users[~known]]
        text = f"no list for {len(names):,} of {len(users):,} users, of whose items the model knows none: {few(names)}"
        if not known.any():
            raise UserError(text)
        say(text)
    shown = users[known]
    written = files.write(out, lambda file: _write_lists(file, run, log, items, shown, top, filter_seen, workers))
    if without := int(known.sum()) - written:
        say(f"no list for {without:,} of {len(users):,} users, who have had every item")
    say(f"wrote {out}: {written:,} users")
    return {"out": str(out), "users": written, "left_out": len(users) - written + unknown}


def _write_lists(file, run, log, items, users, top, filter_seen, workers):
    """Write the rows of some users, by their numbers in the log, to a file; return for how many there was a list."""
    writer = csv.writer(SimpleNamespace(write=lambda text: file.write(text.encode())), lineterminator="\n")
    writer.writerow(("user", "rank", "item", "score"))
    histories = (log.history(u) for u in users)
    done = written = 0
    with worker_map(workers or usable_cores(), run.xp) as run_map, progress("recommending", len(users)) as update:
        for order, scores in recommend_items(run.parameters, run.config, histories, top, run_map, filter_seen):
            chunk = users[done : done + len(order)]  # no iterator: zip would take a user too many from it
            for user, row, row_scores in zip(chunk, order, scores, strict=True):
                for rank, (item, score) in enumerate(zip(row, row_scores, strict=True), 1):
                    if score > -np.inf:
                        writer.writerow((log.users[user], rank, items[item], f"{score:.4f}"))
                written += row_scores[0] > -np.inf
            done += len(order)
            update(len(order))
    return int(written)


def _named_users(path, log, log_path):
    """Return the numbers of the users that a file names, one a line, in its order; and how many names are no user's."""
    lines = [line for line in files.read_lines(path) if line.strip()]
    if not lines:
        raise UserError(f"{path}: names no user; one a line is expected")
    readings = {line: (line, line.strip(), _unquoted(line)) for line in lines}
    wanted = {name for names in readings.values() for name in names}
    numbers = {name: u for u, name in enumerate(log.users) if name in wanted}
    found = {line: next((numbers[n] for n in names if n in numbers), None) for line, names in readings.items()}
    unknown = [line for line, u in found.items() if u is None]
    users = np.array(list(dict.fromkeys(u for u in found.values() if u is not None)), int)
    if not len(users):
        raise UserError(f"{path}: none of its names is a user of {log_path}: {few(unknown)}")
    if unknown:
        say(f"{path}: {len(unknown):,} names are no users of {log_path}: {few(unknown)}")
    if again := sum(found[line] is not None for line in lines) - len(users):
        say(f"{path}: {again:,} of {len(lines):,} lines name a user again, who gets one list")
    return users, len(unknown)


def _unquoted(line):
    """Return a name without blanks around it and the quotes that a csv file gives it."""
    text = line.strip()
    return text[1:-1].replace('""', '"') if len(text) > 1 and text[0] == text[-1] == '"' else text


def _explain(run, sequence, items, most=10):
    """Print the AttnResLN contribution norms to the latest position, as shares a block."""
    shares = [norms[-1] / max(norms[-1].sum(), 1e-30) for norms in contributions(run.parameters, run.config, sequence)]
    recent = sequence[-run.config.max_length :]
    click.echo(f"\n{'share of the last position':<36}" + "".join(f"{'block ' + str(i):>9}" for i in range(len(shares))))
    for j in sorted(range(len(recent)), key=lambda j: -sum(share[j] for share in shares))[:most]:
        ago = len(recent) - 1 - j
        name = f"{items[recent[j]]} ({ago} back)" if ago else f"{items[recent[j]]} (latest)"
        click.echo(f"      {name:<30}" + "".join(f"{share[j]:9.1%}" for share in shares))


@main.command()
@run_argument
@data_option
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="[default: report.html in the folder].")
def report(run, data, out):
    """What is a prediction made of? A page to look into.

    Writes one HTML file that needs no network. Of a run: its metrics, how much it mixes, and predictions to take
    apart, with what attention weight says of each history item beside what the item contributes. Of a study's
    folder: its verdict, tables and pictures.

    \b
    python cli.py report runs/household-softmax-1
    python cli.py report runs/study --out study.html
    """
    folder = run or runs.newest_folder("report", ("checkpoint.npz", "study.json"))
    if not run:
        say(f"run {folder}")
    if (folder / "study.json").exists():
        if data:
            raise click.UsageError("--data is for the log of a run; the page of a study needs none.")
        found = reporting.describe_study(folder)
    else:
        run = Run(folder, "report", data=data)
        found = reporting.describe_run(folder, run.settings, run.parameters, run.log(), progress)
    page = reporting.page(found)
    # A link is followed where a person named it, never where it lay in a folder that may be a stranger's.
    write, out = (files.write, out) if out else (files.replace, folder / "report.html")
    write(out, lambda file: file.write(page))
    say(f"wrote {out}: {len(page) / 1e6:.2f} MB; open it in a browser")


@main.command()
@click.option("--attn", type=click.Choice(known_weightings()), help="One weighting [default: all].")
@backend_option
def gradcheck(attn, backend):
    """Are the hand-derived gradients right? Central differences tell.

    First every operation alone, then every parameter of a small model, in the order of the backward pass. Each number
    is max |difference| / max |gradient|. A gradient that is zero by construction is checked absolutely, and marked
    0+. If one is off, the first one is named: it is the one to mend.

    \b
    python cli.py gradcheck --attn softmax
    """
    weightings = (attn,) if attn else known_weightings()
    xp = load_backend(backend)
    operations, parameters = {}, {}
    with progress("checking", 2 * len(weightings)) as update:
        for weighting in weightings:  # only attention differs from weighting to weighting
            operations |= {
                (operation, name): error for operation, name, error in checking.check_operations(weighting, xp)
            }
            update(1)
        for weighting in weightings:
            for name, error, relative in checking.check(weighting, xp):
                parameters.setdefault(name, []).append((error, relative))
            update(1)
    click.echo(f"{'operation':<32}{'gradient':>14}{'off by':>14}")
    names = [operation.split(",")[0] for operation, _ in operations]
    for operation, name in sorted(operations, key=lambda key: names.index(key[0].split(",")[0])):
        click.echo(f"{operation:<32}{name:>14}{operations[operation, name]:14.1e}")
    click.echo(f"\n{'parameter':<32}" + "".join(f"{w:>14}" for w in weightings))
    block = None
    for name, cells in parameters.items():
        if (found := re.match(r"blocks\.(\d+)\.", name)) and found[1] != block:
            block = found[1]
            click.echo(f"block {block}")
        short = name.removeprefix(f"blocks.{block}.")
        title = short if short == name else f"  {short}"
        click.echo(f"{title:<32}" + "".join(f"{'' if relative else '0+':>5}{error:9.1e}" for error, relative in cells))
    named = [(*key, error) for key, error in operations.items()]
    largest = [(name, max(error for error, _ in cells)) for name, cells in parameters.items()]
    if fault := checking.first_fault(named, largest):
        raise UserError(fault)
    worst = max(error for *_, error in [*named, *largest])
    click.echo(f"\nall below {checking.TOLERANCE:.0e}; the largest is {worst:.1e}")


@main.command()
@click.option("--attn", type=click.Choice(known_weightings()), default="softmax", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=tracing.SEED, show_default=True, help="Of the parameters.")
def trace(attn, seed):
    """What does the model compute? Every number of one tiny step.

    To be read beside the code: three users, D = 4, two heads, one block; the forward, all gradients beside
    central differences, the same parameters under other attention weightings, and one position taken apart.

    \b
    python cli.py trace | less
    python cli.py trace --attn uniform
    """
    for step in tracing.steps(attn, seed):
        click.echo("\n".join(tracing.lines(step)))


class FirstWordGroup(click.Group):
    """A group whose first word may also be a FILE: what is no command's name is described."""

    def resolve_command(self, ctx, args):
        if args[0] in self.commands:
            return super().resolve_command(ctx, args)
        return "FILE", describe_file, args


class NamedByItsArgument(click.Command):
    """A command that is called by its argument alone: the argument stands where a name would."""

    def collect_usage_pieces(self, ctx):
        return [self.options_metavar]


@main.group(
    "data",
    cls=FirstWordGroup,
    options_metavar="",
    subcommand_metavar="FILE | COMMAND [OPTIONS]",
    context_settings={"ignore_unknown_options": True},  # those before FILE are of the command that describes it
)
def data_group():
    """Describe a log before training on it, or fetch a public one.

    \b
    python cli.py data ratings.csv            what is in it, and what a study would make of it
    python cli.py data ratings.csv --help     how to say what its columns are called
    python cli.py data ./fetch                a file that is called like a command
    """


@data_group.command()
@click.argument("name", required=False)
@click.option("--out", type=click.Path(path_type=Path), default="datasets", show_default=True, help="The folder.")
def fetch(name, out):
    """Fetch a public log as OUT/NAME.csv; without NAME, list what there is.

    A transfer that breaks off goes on with the same command. What may not be downloaded directly, or was
    downloaded already, is taken from the folder under its publisher's file name.

    \b
    python cli.py data fetch ml-100k
    """
    entries = cataloguing.read_catalogue(cataloguing.CATALOGUE)
    if name is None:
        click.echo("\n".join(catalogue_table(entries.values())))
        return
    if name not in entries:
        near = difflib.get_close_matches(name, entries, 1, 0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"no {name!r} in the catalogue{hint} (python cli.py data fetch lists it)")
    entry = entries[name]
    say(f"{entry.title}, {entry.page}; licence: {entry.licence}")
    try:
        path, before = cataloguing.fetch(entry, out, progress, lambda text: say(one_line(text)))
    except KeyboardInterrupt:
        say("\nstopped; the same command goes on from here")
        raise click.exceptions.Exit(INTERRUPTED) from None
    say(f"{path} is there already; remove it to fetch it again" if before else f"wrote {path}")
    with reading(path) as update:
        log = read_log(path, "csv", None, update)
    click.echo(counts_line(log, entry.counts))
    core = ""
    if entry.k_core:
        core = f" --k-core {entry.k_core['k']}"
        click.echo(f"with{core}: {counts_line(k_core(log, entry.k_core['k']), entry.k_core)}")
    path = shlex.quote(str(path))
    say(f"next: python cli.py data {path}{core}; python cli.py study --data {path}{core}")


def counts_line(log, published):
    """Return the counts of a log as text, beside the published ones."""
    found = {"users": len(log.users), "items": len(log.items), "interactions": len(log.sequence)}
    text = ", ".join(f"{count:,} {what}" for what, count in found.items())
    if published is None:
        return text
    if found.items() <= published.items():
        return f"{text}: as published ({published['from']})"
    return (
        f"{text}; NOT the published {', '.join(f'{published[what]:,} {what}' for what in found)} ({published['from']})"
    )


def catalogue_table(entries):
    """Return the catalogue as lines of text, a row a log."""
    yield f"{'NAME':<20}{'users':>10}{'items':>11}{'interactions':>14}{'download':>11}  licence"
    for entry in entries:
        cells = [f"{entry.counts[what]:,}" if entry.counts else "-" for what in ("users", "items", "interactions")]
        size = f"{'' if entry.bytes else '<'}{entry.at_most_bytes / 1e6:,.0f} MB" if entry.url else "by hand"
        yield f"{entry.name:<20}{cells[0]:>10}{cells[1]:>11}{cells[2]:>14}{size:>11}  {entry.licence}"


@click.command(cls=NamedByItsArgument)
@click.argument("path", metavar="FILE")
@log_options
@json_option
def describe_file(path, as_json, **options):
    """Describe the log in FILE, or an embedded one: chain, taste, household.

    \b
    python cli.py data ratings.csv --columns who,what,when --k-core 5
    """
    source = reading_options(path, options)
    log = load_log(source)
    result = describe(log, runs.split_log(log, {"data": source}), source["drop_repeats"])
    result["study"] = dict(zip(("max_length", "dropout"), studying.sensible(log), strict=True))
    if as_json:
        say_json({"path": path, "read_as": log.read_as} | result)
        return
    filtered = _given(options, "k_core", "drop_repeats")
    click.echo(f"{path}{log.read_as and f', read as {log.read_as}'}{filtered and f', after{filtered}'}\n")
    click.echo("\n".join(description(result, options["split"])))
    if all(result["split"][f"{part}_users"] for part in ("train", "valid", "test")):
        say(f"next: python cli.py study --data {shlex.quote(path)}{_given(options, *options)}")
    else:
        say("too small to study: no user to train on, or none to test; filter less, or take a larger log")


def _given(options, *names):
    """Return those of the named log options that are not at their defaults, as they would be typed."""
    words = []
    for param in describe_file.params:
        value = options.get(param.name)
        if param.name in names and value and value != param.default:
            words += param.opts[:1] if value is True else (param.opts[0], shlex.quote(str(value)))
    return "".join(f" {word}" for word in words)


def description(result, split):
    """Return what describe found, as lines of text."""

    def size(part):
        return f"{part['users']:,} users, {part['items']:,} items, {part['interactions']:,} interactions"

    def share(number, of):
        return f"{number:,} ({number / of:.1%})" if number else "none"

    n, histories, bins = result["interactions"], dict(result["history_lengths"]), result["histogram"]
    names = {"0": "min", "50": "median", "100": "max"}
    mean, most = histories.pop("mean"), max(bin["users"] for bin in bins)
    lines = [
        ("log", f"{size(result)}; {100 * result['density']:.3g} % of all pairs"),
        ("histories", "".join(f"{names.get(q, q + ' %'):>9}" for q in histories) + f"{'mean':>9}"),
        ("", "".join(f"{length:>9,}" for length in histories.values()) + f"{mean:>9,.1f}"),
    ]
    for bin in bins:
        span = f"{bin['from']:,} to {bin['to']:,}" if bin["to"] > bin["from"] else f"{bin['to']:,}"
        lines.append(("", f"{span:>18}  {'#' * math.ceil(40 * bin['users'] / most)} {bin['users']:,}"))
    popular, repeats, times, held = (result[part] for part in ("popularity", "repeats", "time", "split"))
    lines += [
        (
            "popularity",
            f"the most popular {share(popular['top_items'], result['items'])} of the items have "
            f"{popular['top_share']:.1%} of the interactions",
        ),
        ("", f"{share(popular['items_for_half'], result['items'])} of the items have half of them"),
        ("", f"{share(popular['items_once'], result['items'])} of the items occur once"),
        ("repeats", f"{share(repeats['seen_before'], n)} of an item that the user had before"),
        ("", f"{share(repeats['immediate'], n)} directly after the same item"),
    ]
    if times:
        span = f"{times['first']:,} to {times['last']:,}: numbers that are no dates"
        if times["unit"]:
            read = "dates" if times["dated"] else times["unit"]
            span = f"{times['first_date']} to {times['last_date']} UTC, from {read}"
        order = "not in order, and was sorted" if times["reordered"] else "in order within each user"
        lines += [
            ("time", f"{span}; the file was {order}"),
            ("", f"{share(times['ties'], n)} at the same time as the user's last: these keep the file's order"),
            ("", f"{share(repeats['exact_duplicates'], n)} again of the same user, item and time"),
        ]
    else:
        lines.append(("time", "no timestamps: each user's interactions are in the file's order"))
    users = [f"{held[f'{part}_users']:,} users" for part in ("train", "valid", "test")]
    lines.append((split, "{} to train on, {} for validation, {} for the test".format(*users)))
    if held["test_users"]:
        seen = f"{share(held['unreachable'], held['test_users'])} of the test targets are items the user had before"
        lines.append(("", seen + (": never hit with filter-seen" if held["unreachable"] else "")))
        if held["unreachable"] > MANY_REPEATS * held["test_users"]:
            lines.append(("", "where people buy again, study and train with --no-filter-seen"))
    lines += [(f"{k}-core", size(core)) for k, core in result["k_core"].items()]
    length, dropout = result["study"]["max_length"], result["study"]["dropout"]
    lines.append(("study", f"takes the last {length} items and dropout {dropout}"))
    lines.append(("", f"train does so with --max-length {length} --dropout {dropout}"))
    return [f"{title:<15}{text}" for title, text in lines]


if __name__ == "__main__":
    main()
