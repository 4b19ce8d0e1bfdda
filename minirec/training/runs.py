"""The run folder: what a training run leaves behind.

    config.json          every setting, the log's path and fingerprint, versions
    items.json           item names; their order is the model's numbering
    metrics.jsonl        one line an epoch
    checkpoint.npz       the parameters that did best on validation
    state.npz            all that resuming needs
    state.previous.npz   the state before that one, should it be damaged
    log.npz              the log, where it was no file but an object in memory

Files are written and read as in files.py: whole or not at all, and as data. No path in a file but the log's
is followed, and that only while the log's fingerprint still matches.
"""

import contextlib
import difflib
import hashlib
import json
import math
import os
import platform
import re
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from minirec import __version__, files
from minirec.backend import BACKENDS
from minirec.data import planted, split
from minirec.data.log import CONTROL, Log, filter_log
from minirec.data.read import FORMATS, TIES, read_log
from minirec.errors import UserError
from minirec.files import (
    check_regular,
    locked,
    make_folder,
    opened_arrays,
    read_arrays,
    read_json,
    read_json_lines,
    write_arrays,
)
from minirec.loss import LOSSES
from minirec.parameters import Config, parameter_count, parameter_shapes

STATES = ("state.npz", "state.previous.npz")  # the newest first
LOG = "log.npz"
FILES = ("config.json", "items.json", "metrics.jsonl", "checkpoint.npz", LOG, *STATES)
RUNS = Path("runs")
LONGEST_NAME = 60  # characters of a folder that is named after a log
# What settings mean. 1: all matrices N(0, 0.02); a temporal split whose validation began elsewhere; bce whose negatives
# could be seen items.
PROTOCOL = 2
SELECTED_BY = "NDCG@10"  # on validation: it picks the checkpoint and stops the run


@dataclass(frozen=True)
class Source:
    """Where a log comes from, how it is read, filtered and split; the "data" of a run's settings."""

    path: str  # a file, the name of a planted dataset, or LOG: it is kept in the run's folder
    sha256: str = ""
    format: str | None = None  # None: recognised by content
    columns: list | None = None
    time_format: str | None = None
    ties: str = "file"  # or "shuffle": the order among a user's equal times
    split: str = "leave-one-out"
    k_core: int = 1
    drop_repeats: bool = False


READING = {name: getattr(Source, name) for name in ("format", "columns", "time_format", "ties")}  # what read_log takes


@dataclass(frozen=True)
class Training:
    """How a model is trained; the "training" of a run's settings."""

    loss: str = "ce"  # one of loss.LOSSES
    negatives: int = 1024  # for the loss "sampled"
    epochs: int = 200  # at most so many
    batch_size: int = 128  # sequences a step
    lr: float = 1e-3  # learning rate of Adam
    patience: int = 10  # epochs without a gain on validation, after which training ends
    seed: int = 0
    backend: str = "numpy"
    filter_seen: bool = True  # whether items that a user has had are no candidates
    workers: int = 1


def make_settings(source, config, training):
    """Return the settings of a run, as config.json holds them. Raises UserError where one of them cannot be."""
    settings = {
        "data": asdict(source),
        "model": asdict(config),
        "training": asdict(training) | {"protocol": PROTOCOL},
        "versions": {"minirec": __version__, "python": platform.python_version(), "numpy": np.__version__},
    }
    check_settings(settings)
    return settings


# Folders


def log_name(path):
    """Return a short name for a log, fit for a folder."""
    return re.sub(r"[^\w-]", "_", Path(path).name.split(".")[0])[:LONGEST_NAME] or "log"


def new_folder(log_name, attn):
    """Return a path for a new run below runs/ that does not exist yet: LOG-ATTN-1, -2, ..."""
    number = 1
    while (path := RUNS / f"{log_name}-{attn}-{number}").exists():
        number += 1
    return path


def newest_folder(command, holding=("checkpoint.npz",)):
    """Return the folder below runs/ that was worked on last, of those that hold one of some files.

    What was made of a run later, such as its report, is no work on it. Raises UserError where there is none.
    """
    folders = {path.parent for name in holding for path in RUNS.glob(f"*/{name}")}
    if not folders:
        raise UserError(f"no run in {RUNS}/ to {command}; make one with: python cli.py train")

    def last_written(folder):
        return max(f.lstat().st_mtime_ns for f in folder.iterdir() if f.name in (*FILES, *holding))

    return max(folders, key=last_written)


@contextlib.contextmanager
def opened(folder, resume):
    """Create a run folder, or take over an existing one, and hold it for as long as the context lasts.

    Without a state, what else an earlier run left is removed: it is no part of the run that now begins. Raises
    UserError where the folder holds something else, holds a state and resume is not asked for, or is in use by
    another process.
    """
    make_folder(folder)
    try:
        strangers = sorted(
            f.name for f in folder.iterdir() if f.name.removeprefix(".").removesuffix(".tmp") not in FILES
        )
    except OSError as error:
        raise UserError(f"{folder}: cannot be used as a run folder ({error.strerror or error})") from None
    if strangers and not (folder / "config.json").exists():
        raise UserError(f"{folder}: holds {strangers[0]} and no run; choose a new or empty folder")
    for name in FILES:
        check_regular(folder / name)
    with locked(folder):
        state, previous = ((folder / name).exists() for name in STATES)
        if state and not resume:
            raise UserError(f"{folder}: holds a run already; add --resume to continue it, or choose another --out")
        try:
            for stale in folder.glob(".*.tmp"):
                stale.unlink()
            if not state and not (resume and previous):
                for name in ("metrics.jsonl", "checkpoint.npz", "state.previous.npz"):
                    (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be removed ({error.strerror or error})") from None
        try:
            yield folder
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()  # an empty folder alone: that of a run which could not start


# What is in one


def fingerprint(path):
    """Return the SHA-256 of a log's file, or of a planted dataset's content."""
    if is_planted(path):
        return planted.DATASETS[path]().sha256()
    if os.path.basename(path) == LOG:
        return read_kept_log(path).sha256()
    near = difflib.get_close_matches(str(path), planted.DATASETS, 1)
    return files.fingerprint(path, f"; did you mean {near[0]}?" if near else "")


def load_log(source, progress=None, to_split=True):
    """Return the Log that the "data" of a run's settings describes, filtered as they say.

    Its path is a file's, or a planted dataset's name. progress, to_split: see read_log.
    """
    if is_planted(source["path"]):
        log = planted.DATASETS[source["path"]]()
    elif os.path.basename(source["path"]) == LOG:
        log = read_kept_log(source["path"])
    else:
        options = {name: source[name] for name in READING}
        log = read_log(source["path"], **options, progress=progress, to_split=to_split)
    return filter_log(log, source["k_core"], source["drop_repeats"])


def split_log(log, settings):
    """Return the Split of a run's log. Raises UserError, naming the log, where it cannot be split so."""
    try:
        return split.SPLITS[settings["data"]["split"]](log)
    except UserError as error:
        path = settings["data"]["path"]
        raise UserError(str(error) if path == LOG else f"{path}: {error}") from None


def is_planted(path):
    """Whether a log's path is the name of a planted dataset; a file of that name goes first."""
    return path in planted.DATASETS and not os.path.isfile(path)


def _number(least, most=math.inf, kinds=int):
    return lambda x: isinstance(x, kinds) and not isinstance(x, bool) and least <= x <= most and x < math.inf


def _text(x):
    return isinstance(x, str)


LARGEST = 1 << 24  # of the sizes that a person gives
LARGEST_CONFIG = 1 << 20  # bytes
LONGEST_ITEM = 1 << 11  # bytes in items.json, where a character of an item's name may be escaped
SETTINGS = {  # what config.json must hold; a rule says whether a value will do
    "model": {
        "n_items": _number(1, 1 << 31),
        "n_blocks": _number(1, 1000),
        **{name: _number(1, LARGEST) for name in ("hidden_size", "n_heads", "max_length")},
    },
    "data": {
        "path": lambda x: _text(x) and "\0" not in x,
        "sha256": _text,
        "format": lambda x: x is None or x in FORMATS,
        "columns": lambda x: x is None or isinstance(x, list) and all(map(_text, x)),
        "time_format": lambda x: x is None or _text(x),
        "ties": lambda x: x in TIES,
        "split": lambda x: x in split.SPLITS,
        "k_core": _number(1, LARGEST),
        "drop_repeats": lambda x: isinstance(x, bool),
    },
    "training": {
        "loss": lambda x: x in LOSSES,
        "backend": lambda x: x in BACKENDS,
        "lr": _number(0, kinds=(int, float)),
        "seed": _number(0),
        **{name: _number(1, LARGEST) for name in ("negatives", "batch_size")},
        **{name: _number(1) for name in ("epochs", "patience", "workers")},
        "filter_seen": lambda x: isinstance(x, bool),
    },
}


def load_settings(folder):
    """Return a run's config.json. Raises UserError where the folder is not a run.

    A run from before there was a choice says nothing of filter_seen: its seen items were no candidates; nor of
    time_format and ties.
    """
    if not os.path.exists(folder / "config.json"):
        if inside := sorted(folder.glob("*/*/config.json")):
            done = "python cli.py report makes its page" if (folder / "study.json").exists() else "not summed up yet"
            raise UserError(f"{folder}: a study's folder ({done}); its runs lie in it, such as {inside[0].parent}")
        raise UserError(f"{folder}: not a run folder (no config.json); python cli.py train makes one")
    settings = read_json(folder / "config.json", LARGEST_CONFIG)
    try:
        settings["training"].setdefault("filter_seen", True)
        settings["data"] = READING | settings["data"]
        check_settings(settings)
        model_config(settings)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'}: not a run's settings ({error})") from None
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: not a run's settings ({error})") from None
    return settings


def check_settings(settings):
    """Raise UserError where a value is none that a run's settings can have."""
    for part, rules in SETTINGS.items():
        for name, rule in rules.items():
            if not rule(settings[part].get(name)):
                raise UserError(f"{name} cannot be {settings[part].get(name)!r:.80}")


def model_config(settings):
    """Return the model's Config from a run's settings."""
    return Config(**settings["model"])


def load_parameters(folder, config, xp=np):
    """Return the parameters in checkpoint.npz as {name: array} on module xp, names and shapes verified."""
    path = folder / "checkpoint.npz"
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file; the run has not finished an epoch: train --resume --out {folder}")
    shapes = parameter_shapes(config)
    with opened_arrays(path) as (headers, read):
        for name in sorted(set(shapes) | set(headers)):
            if name not in headers or name not in shapes:
                raise UserError(
                    f"{path}: {name} is {'missing' if name in shapes else 'no parameter'}; config.json says otherwise"
                )
            shape, dtype = headers[name]
            if shape != shapes[name] or dtype != np.float32:
                raise UserError(f"{path}: {name} is {dtype} {shape}, expected float32 {shapes[name]}")
        parameters = {name: read(name) for name in shapes}
    for name, value in parameters.items():
        if not np.isfinite(value).all():
            raise UserError(f"{path}: {name} holds values that are not finite; train the run again")
    return {name: xp.asarray(value) for name, value in parameters.items()}


def load_items(folder, config):
    """Return the item names of a run, in the model's numbering."""
    items = read_json(folder / "items.json", (config.n_items + 1) * LONGEST_ITEM)
    if not isinstance(items, list) or len(items) != config.n_items or not all(isinstance(i, str) for i in items):
        raise UserError(f"{folder / 'items.json'}: expected a list of {config.n_items} names")
    if any(CONTROL.search(item) for item in items):
        raise UserError(f"{folder / 'items.json'}: a name in it holds control characters, which no log has")
    return items


def write_settings(folder, settings, log):
    """Write what a run begins with: config.json, items.json and, where the log lies nowhere else, log.npz."""
    files.write_json(folder / "config.json", settings)
    files.write_json(folder / "items.json", log.items)
    if settings["data"]["path"] == LOG:
        values = {part.name: getattr(log, part.name) for part in fields(log)}
        write_arrays(folder / LOG, {name: np.asarray(x) for name, x in values.items() if x is not None})


def read_kept_log(path):
    """Return the Log that write_settings wrote. Raises UserError where what the file holds is none."""
    arrays = read_arrays(path)
    try:
        values = {part.name: arrays[part.name] for part in fields(Log) if part.name in arrays}
        log = Log(**{n: x if n in ("offsets", "sequence", "times") else x.tolist() for n, x in values.items()})
        ends, names = [0, *log.offsets[1:-1], len(log.sequence)], [*log.users, *log.items]
        fits = (
            len(log.offsets) == len(log.users) + 1 and np.array_equal(log.offsets, ends) and (np.diff(ends) >= 0).all()
        )
        fits &= log.sequence.dtype == np.int32 and log.sequence.min() >= 0 and log.sequence.max() < len(log.items)
        fits &= log.times is None or log.times.shape == log.sequence.shape
        if not fits or any(not isinstance(name, str) or CONTROL.search(name) for name in names):
            raise ValueError("its arrays do not fit")
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{path}: damaged: not a log ({error})") from None
    return log


def find_log(folder, settings, data_path=None, another=False):
    """Return where a run's log lies, as load_log takes it; data_path: where it lies now, if not where it was.

    another: whether the file at data_path may be another log, whose fingerprint is then in what is returned. Raises
    UserError where it is not the log that is wanted: nothing but its fingerprint is looked at before.
    """
    source = settings["data"] | ({"path": data_path} if data_path else {})
    if os.path.basename(source["path"]) == LOG and not data_path:
        source["path"] = str(folder / LOG)
    try:
        found = fingerprint(source["path"])
    except UserError as error:
        raise UserError(f"{error}" if data_path else f"{error}; say where the log is now with --data") from None
    if found != source["sha256"] and not (another and data_path):
        remedy = "name that one with --data" + (", or this one to take it as it is now" if another else "")
        raise UserError(f"{source['path']}: not the log that {folder} was trained on; {remedy}")
    return source | {"sha256": found}


def load_run_log(folder, settings, data_path=None, progress=None):
    """Return the Log that a run was trained on, read again and filtered; data_path: see find_log.

    progress: see read_log.
    """
    log = load_log(find_log(folder, settings, data_path), progress)
    if log.items != load_items(folder, model_config(settings)):
        raise UserError(f"{folder / 'items.json'}: its items are not those of the log")
    return log


STATE_VERSION = 2  # 1 said neither its version nor its settings
STATE_ARRAYS = {  # in state.npz beside "version" and "settings", given P parameters and S steps an epoch
    "parameters": ("P", np.float32),
    "first_moment": ("P", np.float32),
    "second_moment": ("P", np.float32),
    "losses": ("S", np.float64),  # of the current epoch's steps
    "step": ("", np.int64),  # steps done in all
    "seconds": ("", np.float64),  # spent in the current epoch's steps
}


def save_state(folder, settings, arrays, keep_previous=True):
    """Write state.npz: STATE_ARRAYS, and what tells whether they are of this version and of these settings.

    keep_previous: the state before stays as state.previous.npz; not where it is no good itself.
    """
    known = {"version": np.int64(STATE_VERSION), "settings": np.str_(settings_fingerprint(settings))}
    newest, previous = (folder / name for name in STATES)
    write_arrays(newest, known | arrays, previous if keep_previous else None)


def load_state(folder, settings, n_steps):
    """Return the arrays of the newest good state and the name of its file; None, None where there is no state.

    What is wrong with a newer one is a warning. Raises UserError where the run has other settings than `settings`,
    or where no state is good.
    """
    paths = [folder / name for name in STATES if (folder / name).exists()]
    if not paths:
        return None, None
    check_same(folder, settings)
    refused = [] if paths[0].name == STATES[0] else [f"{folder / STATES[0]}: no such file"]
    for path in paths:
        try:
            state = read_state(path, settings, n_steps)
        except UserError as error:
            refused.append(str(error))
        else:
            if refused:
                warnings.warn(f"{refused[0]}; going on from {path.name}", stacklevel=2)
            return state, path.name
    raise UserError(f"{'; '.join(refused)}; there is no other state to go on from: start anew with another --out")


def read_state(path, settings, n_steps):
    """Return the arrays of a state file. Raises UserError where it is damaged, of another version or other settings."""
    sizes = {"P": (parameter_count(model_config(settings)),), "S": (n_steps,), "": ()}
    expected = {name: (sizes[size], np.dtype(kind)) for name, (size, kind) in STATE_ARRAYS.items()}
    fingerprint = np.str_(settings_fingerprint(settings))
    with opened_arrays(path) as (headers, read):
        if headers.get("version") != ((), np.dtype(np.int64)) or read("version") != STATE_VERSION:
            raise UserError(f"{path}: written by another version of minirec")
        if headers.get("settings") != ((), fingerprint.dtype) or read("settings") != fingerprint:
            raise UserError(f"{path}: the state of a run with other settings")
        if {name: header for name, header in headers.items() if name not in ("version", "settings")} != expected:
            raise UserError(f"{path}: damaged: not the arrays of such a state")
        state = {name: read(name) for name in expected}
    if state["step"] < 0 or not 0 <= state["seconds"] < math.inf:
        raise UserError(f"{path}: damaged: step {state['step']}, {state['seconds']} seconds")
    return state


def settings_fingerprint(settings):
    """Return the SHA-256 of the settings that a run cannot change half-way."""
    fixed = fixed_settings(settings)
    fixed |= {name: float(fixed[name]) for name in ("lr", "dropout")}  # 1 and 1.0 are written differently
    if fixed["filter_seen"]:
        del fixed["filter_seen"]  # so that the states of runs that say nothing of it go on
    for name in ("time_format", "ties"):
        if fixed[name] == READING[name]:
            del fixed[name]
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def check_same(folder, settings):
    """Raise UserError where the run in a folder was trained with other settings."""
    wanted, found = (fixed_settings(s) for s in (settings, load_settings(folder)))
    if wanted["protocol"] != found["protocol"]:
        raise UserError(
            f"{folder}: trained by an older version, with other initial weights; it cannot go on: choose another --out"
        )
    for name in wanted:
        if wanted[name] != found.get(name):
            raise UserError(
                f"{folder}: was trained with {name} {found.get(name)}, not {wanted[name]}; "
                "resume it as it began, or choose another --out"
            )


RECORDED = {"epoch", "loss", "steps", "train_seconds", SELECTED_BY}
_is_number = _number(-(1 << 53), 1 << 53, (int, float))


def load_records(folder, n=None):
    """Return the records of metrics.jsonl, one an epoch; n: the first n of them, those that the state has behind it.

    More of them are of a run that was killed before it wrote its state; fewer cannot be.
    """
    records = read_json_lines(folder / "metrics.jsonl")[:n]
    n = len(records) if n is None else n
    for epoch in range(1, n + 1):
        record = records[epoch - 1] if epoch <= len(records) else None
        numbers = isinstance(record, dict) and all(_is_number(x) for x in record.values())
        if not numbers or record.get("epoch") != epoch or not RECORDED <= set(record):
            raise UserError(f"{folder / 'metrics.jsonl'}: epoch {epoch} is missing or damaged; start a new run")
    return records


def fixed_settings(settings):
    """Return, as {name: value}, the settings that a run cannot change half-way, as JSON gives them back."""
    names = ("loss", "negatives", "batch_size", "lr", "seed", "filter_seen")
    training = {name: settings["training"].get(name) for name in names}
    training["protocol"] = settings["training"].get("protocol", 1)
    source = {name: (READING | settings["data"])[name] for name in (*READING, "split", "k_core", "drop_repeats")}
    fixed = settings["model"] | training | source | {"log (SHA-256)": settings["data"]["sha256"]}
    return json.loads(json.dumps(fixed))
