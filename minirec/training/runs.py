"""The run folder: what a training run leaves behind, and the log that it was trained on.

    config.json          its settings (see settings.py)
    items.json           item names; their order is the model's numbering
    metrics.jsonl        one line an epoch
    checkpoint.npz       the parameters that did best on validation
    state.npz            all that resuming needs (see progress.py)
    state.previous.npz   the state before that one, should it be damaged
    log.npz              the log, where it was no file but an object in memory

Files are written and read as in files.py: whole or not at all, and as data. No path in a file but the log's is
followed, and that only while the log's fingerprint still matches.
"""

import contextlib
import itertools
import os
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from minirec import files
from minirec.data import planted, split
from minirec.data.log import CONTROL, Log, filter_log
from minirec.data.read import read_log
from minirec.errors import UserError, did_you_mean
from minirec.files import LONGEST_NAME
from minirec.parameters import parameter_shapes
from minirec.training.settings import LATER, Range, Source, check_settings, fixed_settings, model_config

STATES = ("state.npz", "state.previous.npz")  # the newest first
LOG = "log.npz"
RESULTS = ("metrics.jsonl", "checkpoint.npz")
FILES = ("config.json", "items.json", LOG, *RESULTS, *STATES)
RUNS = Path("runs")
SELECTED_BY = "NDCG@10"  # on validation: it picks the checkpoint and stops the run
RECORDED = {"epoch", "loss", "steps", "train_seconds", SELECTED_BY}  # what a line of metrics.jsonl holds at least
NUMBERS = Range(-(1 << 53), 1 << 53, float)
LARGEST_CONFIG = 1 << 20  # bytes
LONGEST_ITEM = 1 << 11  # bytes in items.json, where a character of an item's name may be escaped


# Folders


def log_name(path):
    """Return a short name for a log, fit for a folder."""
    return re.sub(r"[^\w-]", "_", Path(path).name.split(".")[0])[:LONGEST_NAME] or "log"


def new_folder(name, attn):
    """Return a path for a new run below runs/ that does not exist yet: NAME-ATTN-1, -2, ..."""
    paths = (RUNS / f"{name}-{attn}-{number}" for number in itertools.count(1))
    return next(path for path in paths if not path.exists())


def newest_folder(command, holding=("checkpoint.npz",)):
    """Return the folder below runs/ that was worked on last, of those that hold one of some files.

    What was made of a run later, such as its report, does not count as work on it. Raises UserError where there is
    none; command: what it was needed for.
    """
    folders = {path.parent for name in holding for path in RUNS.glob(f"*/{name}")}
    if not folders:
        raise UserError(f"no run in {RUNS}/ to {command}; make one with: python cli.py train")
    written = [path for folder in folders for path in folder.iterdir() if path.name in (*FILES, *holding)]
    return max(written, key=lambda path: path.lstat().st_mtime_ns).parent


@contextlib.contextmanager
def opened(folder, resume, saving=False):
    """Create a run folder, or take over an existing one, and hold it for as long as the context lasts.

    What an earlier run left without a state is removed: it is no part of the run that now begins. Raises UserError
    where the folder holds something else, holds a state and resume is not asked for, holds a model that was saved
    (unless saving another one), or is in use by another process.
    """
    files.make_folder(folder)
    with files.naming(folder, "cannot be used as a run folder"):
        names = sorted(path.name for path in folder.iterdir())
    strangers = [name for name in names if name not in {f".{ours}.tmp" for ours in FILES}]
    if strangers and "config.json" not in names:  # which is written first, and so stands wherever a run began
        raise UserError(f"{folder}: holds {strangers[0]} and no run; choose a new or empty folder")
    for name in FILES:
        files.check_regular(folder / name)
    with files.locked(folder):
        has_state = any((folder / name).exists() for name in STATES)
        if has_state and not resume:
            how = "choose another folder" if saving else "add --resume to continue it, or choose another --out"
            raise UserError(f"{folder}: holds a run already; {how}")
        config = load_settings(folder) if (folder / "config.json").exists() else {}
        if config.get("saved") and not saving:
            raise UserError(f"{folder}: holds a saved model; choose another folder")
        stale = list(folder.glob(".*.tmp"))
        if not has_state:
            stale += [folder / name for name in RESULTS]
        for path in stale:
            with files.naming(path, "cannot be removed"):
                path.unlink(missing_ok=True)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only an empty folder can be removed: that of a run which could not start


# The log


def is_planted(path):
    """Whether a log's path is the name of a planted dataset; a file of that name goes first."""
    return path in planted.DATASETS and not os.path.isfile(path)


def embedded_log(path):
    """Return the Log that is no file of a person's, but a planted one or one that a run keeps; None for a file."""
    if is_planted(path):
        return planted.DATASETS[path]()
    return read_kept_log(path) if os.path.basename(path) == LOG else None


def fingerprint(path, hint=""):
    """Return the SHA-256 of a log's file, or of the content of a log that is none; hint: see files.fingerprint."""
    log = embedded_log(path)
    if log is not None:
        return log.sha256()
    return files.fingerprint(path, hint or named_logs(path))


def named_logs(path):
    """Return the end of an error line: which log a person may have meant who named no file; "" where unclear."""
    public, name = files.read_json(Path(planted.__file__).with_name("catalogue.json"))["datasets"], str(path).lower()
    if name in [entry["name"] for entry in public]:
        return f"; for the public log: python cli.py fetch {name}"
    return did_you_mean(path, planted.DATASETS)


def load_log(source, progress=None, to_split=True):
    """Return the Log of a Source, read and filtered as it says; progress, to_split: see read_log."""
    log = embedded_log(source.path)
    if log is None:
        reading = (source.columns, source.format, source.time_format, source.ties)
        log = read_log(source.path, *reading, progress, to_split)
    return filter_log(log, source.k_core, source.drop_repeats)


def split_log(log, settings):
    """Return the Split of a run's log. Raises UserError, naming the log, where it cannot be split so."""
    try:
        return split.SPLITS[settings["data"]["split"]](log)
    except UserError as error:
        path = settings["data"]["path"]
        raise UserError(str(error) if os.path.basename(path) == LOG else f"{path}: {error}") from None


def find_log(folder, settings, data_path=None, another=False):
    """Return the Source of a run's log; data_path: where it lies now, if not where it was.

    another: whether the file at data_path may be another log, whose fingerprint the Source then has. Raises UserError
    where it is not the log that is wanted. Only its fingerprint is looked at before.
    """
    source = Source(**settings["data"])
    path = data_path or (str(folder / source.path) if os.path.basename(source.path) == LOG else source.path)
    sha256 = fingerprint(path, "" if data_path else "; say where the log is now with --data")
    if sha256 != source.sha256 and not (another and data_path):
        remedy = "name that one with --data" + (", or this one to take it as it is now" if another else "")
        raise UserError(f"{path}: not the log that {folder} was trained on; {remedy}")
    return replace(source, path=path, sha256=sha256)


def load_run_log(folder, settings, data_path=None, read=load_log):
    """Return the Log that a run was trained on, read again by read(source); data_path: see find_log."""
    log = read(find_log(folder, settings, data_path))
    if log.items != load_items(folder, model_config(settings)):
        raise UserError(f"{folder / 'items.json'}: its items are not those of the log")
    return log


def read_kept_log(path):
    """Return the Log that keep_log wrote. Raises UserError where what the file holds is none."""
    arrays = files.read_arrays(path)
    try:
        values = {part.name: arrays[part.name] for part in fields(Log) if part.name in arrays}
        log = Log(**{n: x if n in ("offsets", "sequence", "times") else x.tolist() for n, x in values.items()})
        ends, names = [0, *log.offsets[1:-1], len(log.sequence)], [*log.users, *log.items]
        fits = len(log.offsets) == len(log.users) + 1 and np.array_equal(log.offsets, ends)
        fits &= (np.diff(ends) >= 0).all() and (log.times is None or log.times.shape == log.sequence.shape)
        fits &= log.sequence.dtype == np.int32 and log.sequence.min() >= 0 and log.sequence.max() < len(log.items)
        if not fits or any(not isinstance(name, str) or CONTROL.search(name) for name in names):
            raise ValueError("its arrays do not fit")
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{path}: damaged: not a log ({error})") from None
    return log


# What a folder holds


def write_settings(folder, settings, log):
    """Write what a run begins with: config.json, items.json and, where the log lies nowhere else, log.npz."""
    files.write_json(folder / "config.json", settings)
    files.write_json(folder / "items.json", log.items)
    if settings["data"]["path"] == LOG:
        keep_log(folder, log)


def keep_log(folder, log):
    """Write a folder's log.npz, a log that lies nowhere else; read_kept_log reads it."""
    values = {part.name: getattr(log, part.name) for part in fields(log)}
    values["sequence"] = np.asarray(log.sequence, np.int32)  # a Log that was made by hand may hold wider numbers
    files.write_arrays(folder / LOG, {name: np.asarray(x) for name, x in values.items() if x is not None})


def load_settings(folder):
    """Return a run's config.json. Raises UserError where the folder is not a run."""
    path = folder / "config.json"
    if not os.path.exists(path):
        if inside := sorted(folder.glob("*/*/config.json")):
            done = "python cli.py report makes its page" if (folder / "study.json").exists() else "not summed up yet"
            raise UserError(f"{folder}: a study's folder ({done}); its runs lie in it, such as {inside[0].parent}")
        raise UserError(f"{folder}: not a run folder (no config.json); python cli.py train makes one")
    settings = files.read_json(path, LARGEST_CONFIG)
    try:
        for part, before in LATER.items():
            settings[part] = before | settings[part]
        check_settings(settings)
        model_config(settings), Source(**settings["data"])
    except (KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(f"{path}: not a run's settings ({error})") from None
    return settings


def check_same(folder, settings):
    """Raise UserError where the run in a folder was trained with other settings."""
    wanted, before = (fixed_settings(s) for s in (settings, load_settings(folder)))
    if wanted["protocol"] != before["protocol"]:
        raise UserError(f"{folder}: trained by an older version, and cannot go on: choose another --out")
    for name in wanted:
        if wanted[name] != before.get(name):
            difference = f"was trained with {name} {before.get(name)}, not {wanted[name]}"
            raise UserError(f"{folder}: {difference}; resume it as it began, or choose another --out")


def load_parameters(folder, config, xp=np):
    """Return the parameters in checkpoint.npz as {name: array} on module xp, names, shapes and values verified."""
    path = folder / "checkpoint.npz"
    if not os.path.exists(path):
        raise UserError(f"{path}: removed, or no epoch is finished yet: train --resume --out {folder} goes on")
    expected = {name: files.kind("float32", shape) for name, shape in parameter_shapes(config).items()}
    parameters = files.read_arrays(path, expected)
    for name, value in parameters.items():
        if not np.isfinite(value).all():
            raise UserError(f"{path}: {name} holds values that are not finite; train the run again")
    return {name: xp.asarray(value) for name, value in parameters.items()}


def load_items(folder, config):
    """Return the item names of a run, in the model's numbering."""
    path = folder / "items.json"
    items = files.read_json(path, (config.n_items + 1) * LONGEST_ITEM)
    candidates = items if isinstance(items, list) else []
    names = [item for item in candidates if isinstance(item, str) and not CONTROL.search(item)]
    if names != items or len(names) != config.n_items:
        raise UserError(f"{path}: expected a list of {config.n_items} names without control characters")
    return items


def load_records(folder, least=0):
    """Return the records of metrics.jsonl, one an epoch.

    Raises UserError where one is damaged, or one of the first `least` is missing: the state has those behind it.
    There may be more: those of a run that was killed before it wrote its state.
    """
    path = folder / "metrics.jsonl"
    records = files.read_json_lines(path)
    for epoch, record in enumerate(records + [None] * (least - len(records)), 1):
        numbers = isinstance(record, dict) and all(x in NUMBERS for x in record.values())
        if not numbers or record.get("epoch") != epoch or not RECORDED <= set(record):
            raise UserError(f"{path}: epoch {epoch} is missing or damaged; start a new run")
    return records
