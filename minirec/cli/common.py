"""What all commands share: the group that ends errors in one line, options, progress, how a log is asked for."""

import codecs
import io
import json
import math
import os
import platform
import re
import shlex
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np

from minirec import __version__, backend
from minirec.data.log import FORMATS
from minirec.data.split import SPLITS
from minirec.errors import UserError
from minirec.training import runs
from minirec.training.mpi import abort, launched_rank

MANY_REPEATS = 0.2  # of the targets; where more are items that the user had before, people buy again
SIZE = click.IntRange(1, 1 << 24)
LONGEST_NAME = 60  # characters of a folder that is named after a log, of a name in a message
FEW = 3  # names that a message shows of many
PROGRAM = "python cli.py"  # what our texts call the command line; shown is what it was called by
INTERRUPTED = 130  # the shell's exit status after Ctrl-C


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


def as_called(text):
    """Return a text in which the command line is called as this process was: `minirec`, or `python -m minirec`."""
    context = click.get_current_context(silent=True)
    return text.replace(PROGRAM, context.find_root().info_name) if context else text


class Command(click.Command):
    """A command whose help calls the program by the name that it was called by."""

    def get_help(self, ctx):
        return as_called(super().get_help(ctx))


class Commands(click.Group):
    """A group whose commands end in one line for whatever a person can mend, never in a traceback."""

    def get_help(self, ctx):
        return as_called(super().get_help(ctx))

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
                raise click.ClickException(as_called(message)) from None
            if launched_rank() > 0:
                time.sleep(2)  # the first rank may have the same to say
            click.echo(as_called(f"Error: rank {launched_rank()}: {message}"), err=True)
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
        click.echo(as_called(text), err=True)


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
            words = given(source | {"columns": ",".join(source["columns"] or ())}, *names) or " no options"
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

LOG_PARAMETERS = log_options(click.Command(None)).params[::-1]


def given(options, *names):
    """Return those of the named log options that are not at their defaults, as they would be typed."""
    words = []
    for param in LOG_PARAMETERS:
        value = options.get(param.name)
        if param.name in names and value and value != param.default:
            words += param.opts[:1] if value is True else (param.opts[0], shlex.quote(str(value)))
    return "".join(f" {word}" for word in words)


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
    return {"minirec": __version__, "python": platform.python_version(), "numpy": np.__version__}


def log_name(path):
    """Return a short name for a log, fit for a folder."""
    return re.sub(r"[^\w-]", "_", Path(path).name.split(".")[0])[:LONGEST_NAME] or "log"


def remark_on_repeats(unreachable, n_targets):
    """Say how many targets filter-seen makes impossible, if any; where there are many, name the option to keep them."""
    if unreachable:
        many = unreachable > MANY_REPEATS * n_targets
        say(
            f"{unreachable:,} of {n_targets:,} targets are items the user had before: with --filter-seen they cannot "
            "be hit and count as misses" + ("; where people buy again, use --no-filter-seen" if many else "")
        )
