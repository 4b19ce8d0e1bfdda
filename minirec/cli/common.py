"""What all commands share: the group that ends errors in one line, what is said, progress, logs and runs."""

import io
import json
import os
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import click

from minirec.cli.options import typed
from minirec.errors import UserError
from minirec.training import runs
from minirec.training.fit import load
from minirec.training.mpi import abort, launched_rank
from minirec.training.settings import LOG_OPTIONS, Source, Training

BAR = 20  # characters
PROGRAM = "python cli.py"  # what our texts call the command line; shown is what it was called by
INTERRUPTED = 130  # the shell's exit status after Ctrl-C


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

    def main(self, *args, complete_var="_MINIREC_COMPLETE", **options):
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is escaped, and no error
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, complete_var=complete_var, **options)

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
            if launched_rank() is not None:
                time.sleep(min(2 * launched_rank(), 2))  # the first rank may have the same to say
                message = f"rank {launched_rank()}: {message}"
            click.echo(as_called(f"Error: {message}"), err=True)
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


def on_terminal():
    """Whether stderr is a terminal that this process may draw on; a closed one is none."""
    return not launched_rank() and sys.stderr is not None and sys.stderr.isatty()


@contextmanager
def progress(label, length, least=0):
    """Yield update(n, text), which moves a bar on stderr; without a terminal, or below `least`, nothing is drawn."""
    if not on_terminal() or length < least:
        yield lambda n, text=None: None
        return
    room = max(0, shutil.get_terminal_size().columns - len(label) - BAR - 30)  # beside the bar stand percent and time
    shown = lambda text: text and text[:room]  # a longer line would wrap, and its beginning stay on the screen
    # Fewer steps than a thousandth would be drawn in vain; 0: a new text alone is drawn too.
    how = {"file": sys.stderr, "width": BAR, "item_show_func": shown, "update_min_steps": length // 1000}
    with click.progressbar(length=length, label=label, **how) as bar:
        yield bar.update


def reading(path):
    """Return the progress of reading a file, to be moved by bytes; a bar for files that take a while."""
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    return progress(f"reading {path}", size, least=1 << 24)


def log_source(path, options):
    """Return the Source of a log that was named on the command line, its fingerprint taken."""
    whole = path if runs.is_planted(path) else os.path.abspath(path)
    return Source(whole, runs.fingerprint(path), **{name: options[name] for name in LOG_OPTIONS})


def load_log(source, tell=True, to_split=True):
    """Return the Log of a Source, read under a bar where it is large; say what a person may not expect of it.

    tell: say how it was read, too; to_split: see read_log.
    """
    with reading(source.path) as update:
        log = runs.load_log(source, update, to_split)
    if tell and log.read_as:
        say(f"{source.path}: read as {log.read_as}")
    remark(log, source.path)
    return log


def remark(log, path):
    """Say what a person may not expect of a log."""
    for line in log.remarks:
        say(f"{path}: {line}")


def opened(folder, command, backend=Training.backend, data=None):
    """Return the Model of a run folder, of the newest if None; its log is read, aloud, when it is first needed."""
    if not folder:
        folder = runs.newest_folder(command)
        say(f"run {folder}")
    return load(folder, data, backend, load_log)


@contextmanager
def another_log(model, data, to_split):
    """Yield the Log that --data names, read as the model's was; None where the one that was trained on will do.

    to_split: whether it must hold enough to be split, and is filtered for that; else all its users and items stay, also
    those of the log that was trained on.
    An error in the context is told with how the log is read and split: the commands have no options for that.
    """
    settings = model.settings["data"]
    whole = not to_split and settings["k_core"] > 1
    wanted = data or whole and os.path.basename(settings["path"]) != runs.LOG  # what lies there is filtered
    source = runs.find_log(model.folder, model.settings, data, another=True) if wanted else None
    if source is None or source.sha256 == settings["sha256"] and not whole:
        yield None
        return
    if whole:
        say(f"the run's --k-core {source.k_core} is not applied: users with fewer items get recommendations too")
        source = replace(source, k_core=1)
    try:
        log = load_log(source, to_split=to_split)
        if source.sha256 != settings["sha256"]:
            say(f"{source.path}: another log than {model.folder} was trained on: {log.counts()}")
        yield log
    except UserError as error:
        data, words = source.path, typed(settings, *LOG_OPTIONS) or " no options"
        how = f"--data {data} is read and split as the log of {model.folder}, with{words}"
        raise UserError(f"{error if data in str(error) else f'{data}: {error}'}; {how}") from None
