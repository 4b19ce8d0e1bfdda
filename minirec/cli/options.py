"""The options that commands share, as decorators; those of a run's settings are derived from training/settings.py."""

import math
import re
import shlex
from dataclasses import fields
from pathlib import Path

import click

from minirec.attention import known_weightings
from minirec.backend import BACKENDS
from minirec.training.settings import LARGEST, LOG_OPTIONS, Range, Source

SIZE, COUNT = click.IntRange(1, LARGEST), click.IntRange(min=1)
WEIGHTING = click.Choice(known_weightings())
PATH, FILE = click.Path(path_type=Path), click.Path(path_type=Path, dir_okay=False)


class Number(click.FloatRange):
    """A range that NaN and infinity lie outside of; click's own lets NaN through."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


RATE, SHARE = Number(1e-12), Number(0, 1, max_open=True)  # of learning, and of what is dropped


def comma_list(text):
    return [part.strip() for part in text.split(",")] if text else None


def numbers(text):
    if not re.fullmatch(r" *\d+ *(, *\d+ *)*", text):
        raise click.BadParameter(f"{text!r} is no list of numbers, such as 0,1")
    return [int(part) for part in text.split(",")]


def flag(name):
    """Return an option as it is typed on the command line: --k-core for k_core."""
    return f"--{name.replace('_', '-')}"


def of(choices, *names):
    """Return a decorator that gives a command the options for some fields of Source or Training, in that order."""
    by_name = {choice.name: choice for choice in fields(choices)}

    def add(command):
        for name in reversed(names):
            allowed, text, metavar = (by_name[name].metadata[what] for what in ("allowed", "text", "metavar"))
            kind = comma_list if allowed is list else None
            if isinstance(allowed, Range):
                most = allowed.most if math.isfinite(allowed.most) else None
                kind = (click.IntRange if allowed.kind is int else Number)(allowed.least, most)
            elif isinstance(allowed, tuple):
                kind = click.Choice(allowed)
            how = {"type": kind, "is_flag": allowed is bool, "help": text, "metavar": metavar}
            command = click.option(flag(name), default=by_name[name].default, **how)(command)
        return command

    return add


def typed(options, *names):
    """Return those of the named log options that are not at their defaults, as they would be typed."""
    words = []
    for name in LOG_OPTIONS:
        value = options.get(name)
        if name in names and value and value != getattr(Source, name):
            text = ",".join(value) if isinstance(value, list) else str(value)
            words += [flag(name)] if value is True else [flag(name), shlex.quote(text)]
    return "".join(f" {word}" for word in words)


def filter_seen(default):
    """Return the option that says whether items that a user has had are candidates; None: as the run was trained."""
    words = "Rank only the items that the user has not had yet, or all items (where people buy again)."
    words += " [default: as trained]" if default is None else ""
    return click.option("--filter-seen/--no-filter-seen", default=default, show_default=bool(default), help=words)


log = of(Source, *LOG_OPTIONS)  # how it is read, filtered and split
run = click.argument("run", required=False, type=PATH)
data = click.option("--data", metavar="FILE", help="Where the run's log is now, if it was moved.")
any_data = click.option(
    "--data", metavar="FILE", help="Where the run's log is now, or another log to use; items are matched by name."
)
backend = click.option("--backend", type=click.Choice(BACKENDS), default="numpy", help="numpy: CPU; cupy: GPU.")
workers = click.option("--workers", type=COUNT, help="Cores to use [default: all usable ones].")
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else, on stdout.")
