"""What can be chosen for a run: its defaults, what is allowed, and the help texts of the command line, said once.

A run's settings are a dict, as config.json holds it: {"data": a Source, "model": a Config, "training": a Training,
"versions"}, each of them a dict too.
"""

import hashlib
import json
import math
import platform
from dataclasses import asdict, dataclass, field, fields

import numpy as np

from minirec import __version__
from minirec.backend import BACKENDS
from minirec.data.read import FORMATS, TIES
from minirec.data.split import SPLITS
from minirec.errors import UserError
from minirec.loss import LOSSES
from minirec.parameters import Config

LARGEST = 1 << 24  # of the sizes that a person chooses
# What settings mean. 1: all matrices N(0, 0.02); a temporal split whose validation began elsewhere; bce whose negatives
# could be seen items.
PROTOCOL = 2
# How runs were made before there was a choice: they say nothing of it.
LATER = {"data": {"time_format": None, "ties": "file"}, "training": {"filter_seen": True}}


@dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most`, for `in`. NaN, infinity and truth values are not among them."""

    least: float
    most: float = math.inf
    kind: type = int  # float: fractions too

    def __contains__(self, x):
        kinds = int if self.kind is int else (int, float)
        return isinstance(x, kinds) and not isinstance(x, bool) and self.least <= x <= self.most and x < math.inf


def option(default, allowed, text="", metavar=None):
    """Return a dataclass field for something to choose.

    allowed: a Range, a tuple of values, bool, str, or list for a list of texts; where the default is None, None is
    allowed too. text, metavar: what the command line's help says of it.
    """
    return field(default=default, metadata={"allowed": allowed, "text": text, "metavar": metavar})


@dataclass(frozen=True)
class Source:
    """Where a log comes from, and how it is read, filtered and split: the "data" of a run's settings."""

    path: str = field(metadata={"allowed": str})  # a file, the name of a planted log, or runs.LOG
    sha256: str = option("", str)
    format: str | None = option(None, FORMATS, "The log's format [default: recognised by content].")
    columns: list | None = option(
        None, list, "Its columns, by name or by position from 1 [default: by known names].", "USER,ITEM[,TIME]"
    )
    time_format: str | None = option(None, str, "How its times are written, as in '%d/%m/%Y %H:%M'.", "PATTERN")
    ties: str = option("file", TIES, "Order among a user's equal times: the file's, or random with a fixed seed.")
    split: str = option(
        "leave-one-out", tuple(SPLITS), "Held out: each user's last two items, or the last two tenths of interactions."
    )
    k_core: int = option(1, Range(1, LARGEST), "Keep only users and items with at least this many interactions.")
    drop_repeats: bool = option(False, bool, "Count an item once where it directly follows itself.")


LOG_OPTIONS = ("format", "columns", "time_format", "ties", "split", "k_core", "drop_repeats")


@dataclass(frozen=True)
class Training:
    """How a model is trained: the "training" of a run's settings."""

    loss: str = option(
        "ce", LOSSES, "ce: softmax over all items; sampled: over the target and --negatives; bce: one unseen negative."
    )
    negatives: int = option(1024, Range(1, LARGEST), "For --loss sampled: random items beside the target.")
    epochs: int = option(200, Range(1), "The most epochs to train.")
    batch_size: int = option(128, Range(1, LARGEST), "Sequences in a training step.")
    lr: float = option(1e-3, Range(1e-12, kind=float), "Learning rate of Adam.")
    patience: int = option(10, Range(1), "Epochs without a better validation score before training ends.")
    seed: int = option(0, Range(0), "Seed of initial weights, batch order and dropout.")
    backend: str = option("numpy", BACKENDS)
    filter_seen: bool = option(True, bool)  # whether items that a user has had are no candidates
    workers: int = option(1, Range(1))


TRAINING = tuple(choice.name for choice in fields(Training))
SIZES = {"hidden": "hidden_size", "blocks": "n_blocks", "heads": "n_heads"}  # {option: what Config calls it}
SIZES |= {name: name for name in ("max_length", "dropout", "attn")}
# What a file from a stranger is held to; Config checks the rest.
LIMITS = {name: Range(1, LARGEST) for name in ("hidden_size", "n_heads", "max_length")}
LIMITS |= {"n_items": Range(1, 1 << 31), "n_blocks": Range(1, 1000)}


def picked(options, names):
    """Return those of some options that have a value; None stands for the default."""
    return {name: options[name] for name in names if options.get(name) is not None}


def make_settings(source, n_items, options):
    """Return the settings of a run, as config.json holds them.

    source: Source; options: {name: value}, of which those of SIZES and TRAINING are taken. Raises UserError where one
    is not allowed.
    """
    model = {SIZES[name]: value for name, value in picked(options, SIZES).items()}
    settings = {
        "data": asdict(source),
        "model": asdict(Config(n_items, **model)),
        "training": asdict(Training(**picked(options, TRAINING))) | {"protocol": PROTOCOL},
        "versions": {"minirec": __version__, "python": platform.python_version(), "numpy": np.__version__},
    }
    check_settings(settings)
    return settings


def check_settings(settings):
    """Raise UserError where a setting is missing or has a value that is not allowed."""
    rules = [("model", name, limits, 0) for name, limits in LIMITS.items()]
    for part, choices in (("data", Source), ("training", Training)):
        rules += [(part, choice.name, choice.metadata["allowed"], choice.default) for choice in fields(choices)]
    for part, name, allowed, default in rules:
        value = settings[part].get(name)
        if not (is_allowed(value, allowed) or value is None and default is None):
            raise UserError(f"{name} cannot be {value!r:.80}")


def is_allowed(value, allowed):
    """Whether a value is one of those that `option` describes."""
    if allowed is list:
        return isinstance(value, list) and all(isinstance(x, str) for x in value)
    if allowed is str:
        return isinstance(value, str) and "\0" not in value
    return isinstance(value, bool) if allowed is bool else value in allowed


def model_config(settings):
    """Return the model's Config from a run's settings."""
    return Config(**settings["model"])


FIXED = ("loss", "negatives", "batch_size", "lr", "seed", "filter_seen", "protocol", *LOG_OPTIONS)


def fixed_settings(settings):
    """Return {name: value} of the settings that a run cannot change half-way, as JSON gives them back."""
    chosen = {"protocol": 1} | LATER["data"] | LATER["training"] | settings["data"] | settings["training"]
    fixed = settings["model"] | {name: chosen[name] for name in FIXED} | {"log (SHA-256)": settings["data"]["sha256"]}
    return json.loads(json.dumps(fixed))


def settings_fingerprint(settings):
    """Return the SHA-256 of the settings that a run cannot change half-way."""
    fixed = fixed_settings(settings)
    fixed |= {name: float(fixed[name]) for name in ("lr", "dropout")}  # 1 and 1.0 are written differently
    later = LATER["data"] | LATER["training"]
    fixed = {name: x for name, x in fixed.items() if name not in later or later[name] != x}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()
