"""The study: one grid of runs a log, and what is run in it.

Each run of the grid logs x weightings x seeds is a run folder as from train, FOLDER/LOG/ATTN-SEED, with two files more:
analysis.json and ranks.npz, what the study needs to know of it. A run with a valid analysis is never repeated, one that
was stopped goes on; so a study that is started again ends in the same study.json. A log that is no file is kept once,
as FOLDER/LOG/log.npz. What a study shows: results.py.

Symbols: M test users.
"""

import contextlib
import itertools
import os
import re
import signal
import sys
import tempfile
import time
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minirec import backend, files
from minirec.attention import known_weightings
from minirec.data.describe import remarks_on_targets
from minirec.data.log import Log, check_log, filter_log, located
from minirec.data.split import training_windows
from minirec.errors import UserError
from minirec.packing import spans
from minirec.studies import results
from minirec.studies.results import describe_mixing, load_analysis, substitutions
from minirec.studies.statistics import import_scipy
from minirec.training import runs
from minirec.training.fit import SPLITTING, check_trainable, load, train
from minirec.training.mpi import launched_rank
from minirec.training.parallel import PROCESSES, die_with_parent, usable_cores
from minirec.training.progress import check_length
from minirec.training.settings import LOG_OPTIONS, SIZES, TRAINING, Source, make_settings, model_config, picked

DENSE = 0.02  # share of all user-item pairs; such logs take a dropout of 0.2, sparser ones of 0.5, as in the paper
LONG = 100  # mean history from which the last 200 items are kept, not the last 50, as in the paper

FOLDER = re.compile(r"(?!\.+$|study\.(json|csv)$)[^/\\\x00-\x1f]+")  # what a log may be called
KEPT = f"../{runs.LOG}"  # where a log that is no file lies, seen from its runs
OPTIONS = {*LOG_OPTIONS, *SIZES, *TRAINING} - {"attn", "seed", "workers"}  # what a study takes, as fit does
# The planted logs must show their regimes in two minutes: small models, large steps, short histories. taste has many
# users, to be sure that two arms are equal; drift is learned on a plateau, where less patience would end a run.
PLANTED = {"batch_size": 64, "lr": 5e-3, "patience": 3, "hidden": 32, "max_length": 12}
OF_LOG = {
    "taste": {"batch_size": 128, "lr": 3e-3},
    "drift": {"patience": 6, "max_length": 24},
    "household": {"lr": 8e-3, "max_length": 8},
}


# The library's front


def print_line(line):
    """Print a line on stderr."""
    print(line, file=sys.stderr)


def study(logs, weightings=None, seeds=3, folder=None, workers=None, read=None, say=print_line, show=None, **options):
    """Train all weightings on all logs with the same seeds; return what they show.

    logs: {name: Log}, or a list of paths and of names of embedded logs, or a single log; weightings: their names,
    beside softmax and uniform, which a study always compares (None: all); seeds: how many; folder: where the runs,
    study.json and study.csv go, and where a study that was stopped goes on (None: a temporary one); workers: runs at a
    time (None: all usable cores). options: those of fit, split to backend, and for files those of read_log, columns to
    ties; max_length and dropout follow the log where they are not given, and the embedded logs train faster.
    read(source): how a file becomes a Log (None: runs.load_log); say(line): called with what was decided and done
    (None: in silence); show(text): with where it is, after each epoch.
    Returns {name: results}, as study.json holds them: "verdict", "regime", "confident", "caveats", ...; None on all
    ranks of mpiexec but the first one. Raises UserError where a log cannot be studied, no run comes to its end, or
    scipy is missing.
    """
    import_scipy()  # or say now, not after the runs, that it is missing
    say, read = say or (lambda line: None), read or runs.load_log
    weightings = list(dict.fromkeys(["softmax", "uniform", *(weightings or known_weightings())]))
    if unknown := set(weightings) - set(known_weightings()):
        raise UserError(f"no weighting is called {', '.join(unknown)}: choose from {', '.join(known_weightings())}")
    if unknown := set(options) - OPTIONS:
        raise UserError(f"a study takes no {', '.join(sorted(unknown))}")
    for name, number in (("seeds", seeds), ("workers", 1 if workers is None else workers)):
        if not isinstance(number, (int, np.integer)) or number < 1:
            raise UserError(f"{name} is {number!r}: a whole number of 1 or more is needed")
    if isinstance(logs, Log):
        logs = {"log": logs}
    elif not isinstance(logs, dict):
        logs = [logs] if isinstance(logs, (str, os.PathLike)) else list(logs or ())
    if not logs or any(isinstance(log, Log) for log in logs):
        raise UserError("a study takes {name: Log}, or a list of paths, of one log or more")
    datasets = {}
    for log in logs:
        dataset = prepare(log, logs[log] if isinstance(logs, dict) else None, options, read, say)
        if dataset.name in datasets:
            raise UserError(f"two logs are called {dataset.name}: rename one, or study it in another folder")
        datasets[dataset.name] = dataset
    with contextlib.ExitStack() as stack:
        folder = Path(folder or stack.enter_context(tempfile.TemporaryDirectory()))
        files.make_folder(folder)
        if not launched_rank():  # the first rank holds it for all
            stack.enter_context(files.locked(folder))
        jobs = grid(datasets.values(), weightings, seeds, folder)
        for name, dataset in datasets.items():
            if dataset.settings["data"]["path"] == KEPT and not launched_rank():
                files.make_folder(folder / name)
                runs.keep_log(folder / name, dataset.log)
        on_host = dataset.settings["training"]["backend"] == "numpy"
        failures = run_what_is_left(jobs, (workers or usable_cores()) if on_host else 0, say, show)
        if launched_rank():  # the first rank sums up
            return None
        say("summing up")
        found = results.collect(jobs)
        if not found:
            raise UserError(f"no log has a finished run of each weighting: {failures[0]}")
        results.write_results(folder, found)
        if failures:
            say(f"{len(failures)} of {len(jobs)} runs failed; the same command tries them again")
        return found


def prepare(name, log, options, read, say):
    """Return the Dataset that a log is studied as, and say what was decided.

    name: the log's, or where log is None a path or a planted log's name; the rest: as in study.
    """
    reading = picked(options, LOG_OPTIONS)
    if log is not None:
        if not isinstance(name, str) or len(name) > files.LONGEST_NAME or not FOLDER.fullmatch(name):
            raise UserError(f"the log's name {name!r:.80} becomes a folder's: choose a short one without slashes")
        check_log(log, f"study, for {name},")
        if of_files := picked(options, [name for name in LOG_OPTIONS if name not in SPLITTING]):
            raise UserError(f"{', '.join(of_files)}: a Log is read already; give this to read_log")
        source = Source(KEPT, **reading)
        log = filter_log(log, source.k_core, source.drop_repeats)
        source = replace(source, sha256=log.sha256())
    else:
        path = name if runs.is_planted(name) else os.path.abspath(name)
        source = Source(path, runs.fingerprint(name), **reading)
        name, log = runs.log_name(name), read(source)
    settings = make_settings(source, len(log.items), defaults(source.path, log) | picked(options, OPTIONS))
    model = model_config(settings)
    backend.load(settings["training"]["backend"])  # or say now what it lacks
    split = runs.split_log(log, settings)
    n_users, epochs = len(split.test.users), settings["training"]["epochs"]
    with located(source.path if source.path != KEPT else name):
        check_trainable(training_windows(log, split, model.max_length)[0], split)
    sizes = f"the last {model.max_length} items, dropout {model.dropout}, {epochs} epochs at most"
    say(f"{name}: {log.counts()}; {n_users:,} test users; {sizes}")
    for line in remarks_on_targets(log, split, settings["training"]["filter_seen"]):
        say(line)
    return Dataset(name, log, settings)


def run_what_is_left(jobs, n_processes, say, show):
    """Run what is not finished of a grid; return what failed, a line each."""
    left = [job for job in jobs if load_analysis(job) is None]
    if len(left) < len(jobs):
        say(f"{len(jobs) - len(left)} of {len(jobs)} runs are finished already")
    began, ended, failures = time.perf_counter(), [], []

    def report(job, event, value):
        if event == "epoch":
            if show:
                show(f"run {len(ended) + 1} of {len(left)}: {job}: epoch {value['epoch']}")
            return
        ended.append(job)
        if value is not None:
            failures.append(f"{job}: {value}")
            say(f"failed: {failures[-1]}")
            return
        done, whole = (sum(len(job.dataset.log.sequence) for job in some) for some in (ended, left))
        minutes = (time.perf_counter() - began) * (whole / done - 1) / 60
        n_epochs = len(runs.load_records(job.folder))
        rest = f"; about {minutes:.0f} min left" if minutes > 0.5 else ""
        say(f"run {len(ended)} of {len(left)}: {job}: {n_epochs} epochs{rest}")

    if launched_rank() is None:
        run_grid(left, n_processes, report)
    else:
        run_grid_over_ranks(left, report)
    return failures


# What is run


class Dataset(NamedTuple):
    """A log and how it is trained on."""

    name: str
    log: object  # data.Log
    settings: dict  # of its runs (see runs), but for the weighting and the seed


class Job(NamedTuple):
    """One run of the grid."""

    dataset: Dataset
    attn: str
    seed: int
    folder: object  # pathlib.Path

    def settings(self):
        """Return the run's settings, as config.json holds them."""
        s = self.dataset.settings
        training = s["training"] | {"seed": self.seed, "workers": 1}
        return s | {"model": s["model"] | {"attn": self.attn}, "training": training}

    def __str__(self):
        return f"{self.dataset.name} {self.attn} seed {self.seed}"


def defaults(path, log):
    """Return the options that a study takes for a log where none are given: the embedded logs have their own."""
    return sensible(log) | (PLANTED | OF_LOG.get(path, {}) if runs.is_planted(path) else {})


def sensible(log):
    """Return {"max_length", "dropout"} for a log: the paper's choices for sparse and for dense data."""
    counts = np.diff(log.offsets)
    max_length = min(200 if counts.mean() >= LONG else 50, int(counts.max()))
    density = len(log.sequence) / len(log.users) / len(log.items)
    return {"max_length": max_length, "dropout": 0.2 if density >= DENSE else 0.5}


def grid(datasets, weightings, n_seeds, out):
    """Return the Jobs of a study in folder `out`, dataset by dataset, seed by seed.

    Raises UserError where a folder holds a run with other settings, a link leads it out of `out`, or a file that no
    study wrote would be overwritten.
    """
    if (out / "study.csv").exists() and not (out / "study.json").exists():  # which a study writes first
        raise UserError(f"{out / 'study.csv'}: not overwritten, since no study.json is beside it; remove it")
    order = itertools.product(datasets, range(n_seeds), weightings)
    jobs = [Job(dataset, attn, seed, out / dataset.name / f"{attn}-{seed}") for dataset, seed, attn in order]
    for job in jobs:
        if not job.folder.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{job.folder}: a link that leads out of {out}; choose another --out")
        if any((job.folder / name).exists() for name in (*runs.STATES, "analysis.json")):
            runs.check_same(job.folder, job.settings())
            check_length(job.folder, runs.load_records(job.folder), job.settings()["training"])
    return jobs


# One run


def execute(job, on_epoch=None):
    """Train and analyse one run of the grid, going on where it was stopped; on_epoch: see train.

    Returns why it did not come to its end, None where it did.
    """
    try:
        with contextlib.suppress(OSError):  # one that does not count must not come to count as this run's
            (job.folder / "analysis.json").unlink()
        train(job.dataset.log, job.settings(), job.folder, resume=True, on_epoch=on_epoch)
        analyse(job)
    except (UserError, OSError) as error:
        return str(error)
    except MemoryError:
        return "out of memory"


def analyse(job):
    """Write ranks.npz and analysis.json of a finished run.

    ranks.npz: the ranks [M] of the test targets, by the run as it is ("test"), with the order of each history
    shuffled ("shuffled") and, for softmax, with uniform weights substituted ("uniform", and "uniform.I" in block I).
    """
    log, settings = job.dataset.log, job.settings()
    model = replace(load(job.folder, backend=settings["training"]["backend"]), read_log=lambda: log)
    test = runs.split_log(log, settings).test
    shuffled = replace(log, sequence=shuffle_histories(log.sequence, test, model.config.max_length, job.seed))
    models = {"test": model, "shuffled": replace(model, read_log=lambda: shuffled)}
    analysis = {}
    if job.attn == "softmax":
        blocks_of = substitutions(model.config.n_blocks)
        models |= {name: model.with_attention("uniform", blocks) for name, blocks in blocks_of.items()}
        analysis |= describe_mixing(model.decompose(workers=1))
    files.write_arrays(job.folder / "ranks.npz", {name: m.ranks(workers=1) for name, m in models.items()})
    files.write_json(job.folder / "analysis.json", analysis | {"epochs": len(model.records)})


def shuffle_histories(sequence, targets, max_length, seed):
    """Return a copy of `sequence` in which the last max_length items before each target lie in random order."""
    lengths = np.minimum(targets.stops - targets.starts, max_length)
    rows, places = np.repeat(np.arange(len(lengths)), lengths), spans(targets.stops - lengths, lengths)
    order = np.lexsort((np.random.default_rng(seed).random(len(rows)), rows))
    shuffled = sequence.copy()
    shuffled[places] = sequence[places[order]]
    return shuffled


# All runs


def run_grid_over_ranks(jobs, report):
    """Do what run_grid does with the processes that an MPI launcher started, on one machine or many.

    The first one hands out the jobs and reports; the others return when all is done.
    """
    from mpi4py import MPI
    from mpi4py.futures import MPICommExecutor, as_completed

    with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
        if executor is not None:
            running = {executor.submit(execute, job): job for job in jobs}
            for future in as_completed(running):
                report(running[future], "ended", future.result())


def run_grid(jobs, n_processes, report):
    """Execute jobs, n_processes at a time, each in a process with one worker.

    Calls report(job, "epoch", record) and report(job, "ended", what execute returned); a job that fails does not stop
    the others. Interrupted, the processes end, to go on another time. n_processes 0: one job after the other in this
    process, as on a GPU, where one is enough to feed the device.
    """
    if n_processes == 0:
        for job in jobs:
            report(job, "ended", execute(job, lambda record, job=job: report(job, "epoch", record)))
        return
    waiting, running = list(jobs), {}
    try:
        while waiting or running:
            while waiting and len(running) < n_processes:
                job = waiting.pop(0)
                ours, theirs = PROCESSES.Pipe(duplex=False)
                process = PROCESSES.Process(target=_run_job, args=(theirs, job))
                process.start()
                theirs.close()
                running[ours] = job, process
            for connection in wait(list(running)):
                job, process = running[connection]
                try:
                    event, value = connection.recv()
                except EOFError:
                    event, value = "ended", "its process died (out of memory?)"
                if event == "ended":
                    process.join()
                    connection.close()
                    del running[connection]
                report(job, event, value)
    finally:
        for connection, (_, process) in running.items():
            process.terminate()
            process.join()
            connection.close()


def _run_job(connection, job):
    """The process of one job: send what happens to the parent, and end when that is gone."""
    die_with_parent()  # where the system offers that; elsewhere the connection breaks at the end of an epoch
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle,
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which then ends its runs with this
    np.seterr(all="ignore")  # a loss that is not finite is found, and named, at the end of an epoch
    connection.send(("ended", execute(job, lambda record: connection.send(("epoch", record)))))
