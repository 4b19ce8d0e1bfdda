"""The run folder: what a training run leaves behind, written so that no crash can damage it.

    config.json      every setting, the log's path and fingerprint, versions
    items.json       item names; their order is the model's numbering
    metrics.jsonl    one line an epoch
    checkpoint.npz   the parameters that did best on validation
    state.npz        all that resuming needs

Every file is written beside its final name, synced and renamed: it is the old one or the new one,
never half of one. Files are data: nothing is unpickled, no path in a file but the log's is
followed, and that only while the log's fingerprint still matches.
"""

import contextlib
import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np

from minirec import data, planted
from minirec.backend import BACKENDS
from minirec.errors import UserError
from minirec.loss import LOSSES
from minirec.model import Config, parameter_count, parameter_shapes

FILES = ("config.json", "items.json", "metrics.jsonl", "checkpoint.npz", "state.npz")
RUNS = Path("runs")
SELECTED_BY = "NDCG@10"  # on validation: it picks the checkpoint and stops the run


def write(path, fill):
    """Write a file by fill(file): all of it, or, whatever happens, none. A link's target is written, a device into."""
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # /dev/stdout, a pipe; a folder fails here
            with open(path, "wb") as file:
                fill(file)
            return
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
        raise
    if hasattr(os, "O_DIRECTORY"):  # the rename itself must reach the disk too
        folder = os.open(path.parent, os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)


def write_json(path, value):
    """Write a JSON file; NaN and infinity are refused."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write(path, lambda file: file.write(text.encode()))


def write_json_lines(path, values):
    """Write a file of one JSON object a line."""
    text = "".join(json.dumps(value, allow_nan=False) + "\n" for value in values)
    write(path, lambda file: file.write(text.encode()))


def write_arrays(path, arrays):
    """Write {name: array} as an npz file."""
    write(path, lambda file: np.savez(file, **arrays))


def read_json(path):
    """Read a JSON file."""
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def read_json_lines(path):
    """Read a file of one JSON object a line; a missing file is an empty one."""
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON lines ({error})") from None


def read_arrays(path):
    """Read an npz file as {name: array}; an array that would need unpickling is refused."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # a damaged zip raises errors of many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: not a readable npz file ({reason})") from None


# Folders


def make_folder(folder):
    """Create a folder where there is none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made a folder ({error.strerror or error})") from None


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

    Raises UserError where the folder holds something else, holds a state and resume is not asked
    for, or is in use by another process.
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
    with locked(folder):
        if (folder / "state.npz").exists() and not resume:
            raise UserError(f"{folder}: holds a run already; add --resume to continue it, or choose another --out")
        for stale in folder.glob(".*.tmp"):
            stale.unlink()
        yield folder


@contextlib.contextmanager
def locked(folder):
    """Hold a folder for as long as the context lasts; yield the handle that does. Raises UserError where another
    process holds it."""
    try:
        import fcntl
    except ImportError:  # Windows has no flock; one process at a time is then up to the user
        yield None
        return
    handle = os.open(folder, os.O_RDONLY)  # a lock on the folder itself leaves no file behind
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"{folder}: in use by another process; wait for it, or choose another --out") from None
    except OSError:
        pass  # some network file systems know no locks
    try:
        yield handle
    finally:
        os.close(handle)


# What is in one


def fingerprint(path):
    """Return the SHA-256 of a log's file, or of a planted dataset's content."""
    if is_planted(path):
        return planted.DATASETS[path]().sha256()
    digest = hashlib.sha256()
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{path}: not a regular file; save the log to one")
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    return digest.hexdigest()


def load_log(source, progress=None):
    """Return the Log that the "data" of a run's settings describes, filtered as they say.

    Its path is a file's, or a planted dataset's name. progress: see data.read_log.
    """
    if is_planted(source["path"]):
        log = planted.DATASETS[source["path"]]()
    else:
        log = data.read_log(source["path"], source["format"], source["columns"], progress)
    before = None
    while before != len(log.sequence):  # what the k-core takes away can make two equal items neighbours
        before = len(log.sequence)
        log = data.drop_repeats(log) if source["drop_repeats"] else log
        log = data.k_core(log, source["k_core"]) if source["k_core"] > 1 else log
    return log


def split_log(log, settings):
    """Return the Split of a run's log. Raises UserError, naming the log, where it cannot be split so."""
    try:
        return data.SPLITS[settings["data"]["split"]](log)
    except UserError as error:
        raise UserError(f"{settings['data']['path']}: {error}") from None


def is_planted(path):
    """Whether a log's path is the name of a planted dataset; a file of that name goes first."""
    return path in planted.DATASETS and not os.path.isfile(path)


def _number(least, kinds=int):
    return lambda x: isinstance(x, kinds) and not isinstance(x, bool) and least <= x < math.inf


def _text(x):
    return isinstance(x, str)


SETTINGS = {  # what config.json must hold beside the model's Config; a rule says whether a value will do
    "data": {
        "path": _text,
        "sha256": _text,
        "format": lambda x: x is None or x in data.FORMATS,
        "columns": lambda x: x is None or isinstance(x, list) and all(map(_text, x)),
        "split": lambda x: x in data.SPLITS,
        "k_core": _number(1),
        "drop_repeats": lambda x: isinstance(x, bool),
    },
    "training": {
        "loss": lambda x: x in LOSSES,
        "backend": lambda x: x in BACKENDS,
        "lr": _number(0, (int, float)),
        "seed": _number(0),
    }
    | {name: _number(1) for name in ("negatives", "epochs", "batch_size", "patience", "workers")},
}


def load_settings(folder):
    """Return a run's config.json. Raises UserError where the folder is not a run."""
    if not os.path.exists(folder / "config.json"):
        raise UserError(f"{folder}: not a run folder (no config.json); python cli.py train makes one")
    settings = read_json(folder / "config.json")
    try:
        model_config(settings)
        for part, rules in SETTINGS.items():
            for name, rule in rules.items():
                if not rule(settings[part].get(name)):
                    raise ValueError(f"{part} {name}: {settings[part].get(name)!r}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: not a run's settings ({error})") from None
    return settings


def model_config(settings):
    """Return the model's Config from a run's settings."""
    return Config(**settings["model"])


def load_parameters(folder, config, xp=np):
    """Return the parameters in checkpoint.npz as {name: array} on module xp, names and shapes verified."""
    path = folder / "checkpoint.npz"
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file; the run has not finished an epoch: train --resume --out {folder}")
    arrays = read_arrays(path)
    shapes = parameter_shapes(config)
    for name in sorted(set(shapes) | set(arrays)):
        if name not in arrays or name not in shapes:
            raise UserError(
                f"{path}: {name} is {'missing' if name in shapes else 'no parameter'}; config.json says otherwise"
            )
        if arrays[name].shape != shapes[name] or arrays[name].dtype != np.float32:
            raise UserError(
                f"{path}: {name} is {arrays[name].dtype} {arrays[name].shape}, expected float32 {shapes[name]}"
            )
        if not np.isfinite(arrays[name]).all():
            raise UserError(f"{path}: {name} holds values that are not finite; train the run again")
    return {name: xp.asarray(arrays[name]) for name in shapes}


def load_items(folder, config):
    """Return the item names of a run, in the model's numbering."""
    items = read_json(folder / "items.json")
    if not isinstance(items, list) or len(items) != config.n_items or not all(isinstance(i, str) for i in items):
        raise UserError(f"{folder / 'items.json'}: expected a list of {config.n_items} names")
    return items


def find_log(folder, settings, data_path=None):
    """Return where a run's log lies, as load_log takes it; data_path: where it lies now, if not where it was.

    Raises UserError where it is not the same log: nothing but its fingerprint is looked at before.
    """
    source = settings["data"] | ({"path": data_path} if data_path else {})
    try:
        found = fingerprint(source["path"])
    except UserError as error:
        raise UserError(f"{error}" if data_path else f"{error}; say where the log is now with --data") from None
    if found != source["sha256"]:
        raise UserError(f"{source['path']}: not the log that {folder} was trained on; name that one with --data")
    return source


def load_run_log(folder, settings, data_path=None, progress=None):
    """Return the Log that a run was trained on, read again (see find_log, data.read_log)."""
    log = load_log(find_log(folder, settings, data_path), progress)
    if log.items != load_items(folder, model_config(settings)):
        raise UserError(f"{folder / 'items.json'}: its items are not those of the log")
    return log


STATE_SHAPES = {  # of the arrays in state.npz, given P parameters and S steps an epoch
    "parameters": "P",
    "first_moment": "P",
    "second_moment": "P",
    "losses": "S",  # of the current epoch's steps
    "step": "",  # steps done in all
    "seconds": "",  # spent in the current epoch's steps
}


def load_state(folder, settings, n_steps):
    """Return the arrays of state.npz, or None where there is no state yet.

    Raises UserError where the run has other settings than `settings`, or the state is damaged.
    """
    path = folder / "state.npz"
    if not path.exists():
        return None
    check_same(folder, settings)
    state = read_arrays(path)
    damaged = UserError(f"{path}: not the state of such a run; delete it to start afresh")
    sizes = {"P": (parameter_count(model_config(settings)),), "S": (n_steps,), "": ()}
    for name, size in STATE_SHAPES.items():
        kind = "iu" if name == "step" else "f"
        if name not in state or state[name].shape != sizes[size] or state[name].dtype.kind not in kind:
            raise damaged
    if state["step"] < 0:
        raise damaged
    return state


def check_same(folder, settings):
    """Raise UserError where the run in a folder was trained with other settings."""
    wanted, found = (fixed_settings(s) for s in (settings, load_settings(folder)))
    for name in wanted:
        if wanted[name] != found.get(name):
            raise UserError(
                f"{folder}: was trained with {name} {found.get(name)}, not {wanted[name]}; "
                "resume it as it began, or choose another --out"
            )


def load_records(folder, n):
    """Return the first n records of metrics.jsonl: those of the epochs that the state has behind it.

    More of them are of a run that was killed before it wrote its state; fewer cannot be.
    """
    records = read_json_lines(folder / "metrics.jsonl")[:n]
    for epoch in range(1, n + 1):
        record = records[epoch - 1] if epoch <= len(records) else None
        numbers = isinstance(record, dict) and all(isinstance(x, (int, float)) for x in record.values())
        if not numbers or record.get("epoch") != epoch or not {SELECTED_BY, "train_seconds"} <= set(record):
            raise UserError(f"{folder / 'metrics.jsonl'}: epoch {epoch} is missing or damaged; start a new run")
    return records


def fixed_settings(settings):
    """Return, as {name: value}, the settings that a run cannot change half-way."""
    training = {name: settings["training"].get(name) for name in ("loss", "negatives", "batch_size", "lr", "seed")}
    source = {name: settings["data"][name] for name in ("format", "columns", "split", "k_core", "drop_repeats")}
    return settings["model"] | training | source | {"log (SHA-256)": settings["data"]["sha256"]}
