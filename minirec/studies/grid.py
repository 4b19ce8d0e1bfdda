"""The study: one grid of runs a dataset, and from it the answers to the paper's three questions.

    RQ1  is learned attention weighting needed?       softmax against uniform, the same seeds
    RQ2  how much do the trained models mix positions?   the mixing ratios of the softmax runs
    RQ3  how do the two relate?                       a point (ratio, effect size) a dataset, and its regime

Each run of the grid datasets x weightings x seeds is a run folder as from train, OUT/DATASET/ATTN-SEED,
with two files more: analysis.json and ranks.npz, what the study needs to know of it. A run with a
valid analysis is never repeated, one that was stopped goes on; so a study that is started again ends in
the same study.json.

Symbols: V items, M test users, n seeds.
"""

import contextlib
import csv
import io
import os
import signal
import time
from collections import deque
from dataclasses import replace
from multiprocessing.connection import wait
from typing import NamedTuple

import numpy as np

from minirec import backend, files
from minirec.data.split import Targets
from minirec.decompose import RATIOS, decompose, summarise
from minirec.errors import UserError
from minirec.packing import spans
from minirec.studies.statistics import JUDGED_BY, METRICS, compare, doubts, judge, mean_g, regime
from minirec.training import runs
from minirec.training.baselines import rank_baselines
from minirec.training.fit import train
from minirec.training.parallel import PROCESSES, die_with_parent, worker_map
from minirec.training.progress import best, finished
from minirec.training.ranking import MISS, metrics, rank_targets, user_values

COMPARED = {"weighting": ("softmax", "uniform"), "integration": ("uniform", "identity")}
DENSE = 0.02  # share of all user-item pairs; such logs take a dropout of 0.2, sparser ones of 0.5, as in the paper
LONG = 100  # mean history from which the last 200 items are kept, not the last 50, as in the paper
TIMED = 500  # users whose ranking is timed
BINS = 50  # of the ratios' distributions, over [0, 1]


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
        return s | {
            "model": s["model"] | {"attn": self.attn},
            "training": s["training"] | {"seed": self.seed, "workers": 1},
        }

    def __str__(self):
        return f"{self.dataset.name} {self.attn} seed {self.seed}"


def sensible(log):
    """Return max_length and dropout for a log: the paper's choices for sparse and for dense data."""
    counts = np.diff(log.offsets)
    max_length = min(200 if counts.mean() >= LONG else 50, int(counts.max()))
    return max_length, 0.2 if len(log.sequence) / len(log.users) / len(log.items) >= DENSE else 0.5


def grid(datasets, weightings, n_seeds, out):
    """Return the Jobs of a study in folder `out`, dataset by dataset, seed by seed.

    Raises UserError where a folder holds a run with other settings, or a link leads it out of `out`.
    """
    jobs = [
        Job(dataset, attn, seed, out / dataset.name / f"{attn}-{seed}")
        for dataset in datasets
        for seed in range(n_seeds)
        for attn in weightings
    ]
    for job in jobs:
        if not job.folder.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{job.folder}: a link that leads out of {out}; choose another --out")
        if any((job.folder / name).exists() for name in (*runs.STATES, "analysis.json")):
            runs.check_same(job.folder, job.settings())
            records = runs.load_records(job.folder)
            if records[:-1] and finished(records[:-1], job.settings()["training"]):
                raise UserError(
                    f"{job.folder}: ran for {len(records)} epochs, longer than --epochs and --patience allow now; "
                    "give those that it ran with, or choose another --out"
                )
    return jobs


# One run


def execute(job, on_epoch=None, stop=None):
    """Train and analyse one run of the grid, going on where it was stopped; on_epoch, stop: see train.

    Returns whether it came to its end.
    """
    log, settings = job.dataset.log, job.settings()
    with contextlib.suppress(OSError):  # one that does not count must not come to count as this run's
        (job.folder / "analysis.json").unlink()
    _, complete, _ = train(log, settings, job.folder, resume=True, on_epoch=on_epoch, stop=stop)
    return complete and analyse(log, settings, job.folder, stop)


def analyse(log, settings, folder, stop=None):
    """Write ranks.npz and analysis.json of a finished run; return False where stop() ended it before.

    ranks.npz: the ranks [M] of the test targets, by the run as it is ("test"), with the order of each history
    shuffled ("shuffled") and, for softmax, with uniform weights put in ("uniform", and "uniform.I" in block I).
    """
    config, xp = runs.model_config(settings), backend.load(settings["training"]["backend"])
    filter_seen = settings["training"]["filter_seen"]
    test = runs.split_log(log, settings).test
    shuffled = shuffle_histories(log.sequence, test, config.max_length, settings["training"]["seed"])
    wanted = {"test": (config, log.sequence), "shuffled": (config, shuffled)}
    if config.attn == "softmax":
        for name, blocks in substitutions(config.n_blocks).items():
            attn = tuple("uniform" if i in blocks else "softmax" for i in range(config.n_blocks))
            wanted[name] = replace(config, attn=attn), log.sequence
    with worker_map(1, xp) as run:
        parameters = runs.load_parameters(folder, config, xp)
        ranks = {}
        for name, (put_in, sequence) in wanted.items():
            if stop and stop():
                return False
            ranks[name] = np.concatenate(list(rank_targets(parameters, put_in, sequence, test, filter_seen, run)))
        few, seconds = Targets(*(column[:TIMED] for column in test)), []
        for _ in range(3):
            began = time.perf_counter()
            list(rank_targets(parameters, config, log.sequence, few, filter_seen, run))
            seconds.append(time.perf_counter() - began)
        analysis = {"milliseconds_per_user": 1e3 * min(seconds) / len(few.users)}
        if config.attn == "softmax":
            histories = [log.sequence[a:b] for a, b in zip(test.starts, test.stops, strict=True)]
            analysis |= describe_mixing(decompose(parameters, config, histories, run))
    files.write_arrays(folder / "ranks.npz", ranks)
    records = files.read_json_lines(folder / "metrics.jsonl")
    analysis |= {"epochs": len(records), "best_epoch": best(records)["epoch"]}
    files.write_json(folder / "analysis.json", analysis)
    return True


def substitutions(n_blocks):
    """Return {name in ranks.npz: blocks whose softmax weights are replaced by uniform ones}."""
    return {"uniform": range(n_blocks)} | {f"uniform.{i}": [i] for i in range(n_blocks)}


def describe_mixing(result):
    """Return what analysis.json keeps of a decomposition: summary, histograms and heatmaps, a list of blocks each."""
    edges = np.linspace(0, 1, BINS + 1)
    blocks = [
        {name: np.histogram(block[name], edges)[0].tolist() for name in RATIOS}
        | {  # null where no history reaches back so far
            name: np.where(np.isnan(block[name]), None, block[name]).tolist() for name in ("attention", "contribution")
        }
        for block in result["blocks"]
    ]
    return {"mixing": summarise(result), "pictures": blocks}


def shuffle_histories(sequence, cases, max_length, seed):
    """Return a copy of `sequence` in which the last max_length items before each target lie in random order."""
    lengths = np.minimum(cases.stops - cases.starts, max_length)
    rows, places = np.repeat(np.arange(len(lengths)), lengths), spans(cases.stops - lengths, lengths)
    order = np.lexsort((np.random.default_rng(seed).random(len(rows)), rows))
    shuffled = sequence.copy()
    shuffled[places] = sequence[places[order]]
    return shuffled


def load_analysis(job):
    """Return analysis.json and {name: ranks [M]} of a run, or None where it is not finished and analysed.

    An analysis that is damaged, or of another run, counts as none: it can be made again.
    """
    records = runs.load_records(job.folder)
    if not records or not finished(records, job.settings()["training"]):
        return None
    try:
        analysis = files.read_json(job.folder / "analysis.json")
        ranks = files.read_arrays(job.folder / "ranks.npz")
    except UserError:
        return None
    softmax, n_blocks = job.attn == "softmax", job.dataset.settings["model"]["n_blocks"]
    expected = {"test", "shuffled", *(substitutions(n_blocks) if softmax else ())}
    n_users = len(runs.split_log(job.dataset.log, job.dataset.settings).test.users)
    fits = set(ranks) == expected and all(r.shape == (n_users,) and r.dtype.kind == "i" for r in ranks.values())
    fits = fits and isinstance(analysis, dict) and analysis.get("epochs") == len(records)
    needed = {"milliseconds_per_user", *(("mixing", "pictures") if softmax else ())}
    return (analysis, ranks) if fits and needed <= set(analysis) else None


# All runs


def run_grid_over_ranks(jobs, report):
    """Do what run_grid does with the processes that an MPI launcher started, on one machine or many.

    The first one hands out the jobs and reports; it returns True. The others return False when all is done.
    """
    from mpi4py import MPI
    from mpi4py.futures import MPICommExecutor, as_completed

    with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
        if executor is None:
            return False
        running = {executor.submit(outcome, job): job for job in jobs}
        for future in as_completed(running):
            report(running[future], *future.result())
    return True


def run_grid(jobs, n_processes, report, lock=None):
    """Execute jobs, n_processes at a time, each in a process with one worker.

    Calls report(job, "epoch", record), report(job, "done", None) and report(job, "failed", message); a job that
    fails does not stop the others. Interrupted, the processes end, to go on another time. n_processes 0: one job
    after the other in this process, as on a GPU, where one is enough to feed the device. lock: as from files.locked.
    """
    if n_processes == 0:
        for job in jobs:
            report(job, *outcome(job, lambda record, job=job: report(job, "epoch", record)))
        return
    waiting, running = deque(jobs), {}
    try:
        while waiting or running:
            while waiting and len(running) < n_processes:
                job = waiting.popleft()
                ours, theirs = PROCESSES.Pipe(duplex=False)
                process = PROCESSES.Process(target=_run_job, args=(theirs, job, os.getpid(), lock))
                process.start()
                theirs.close()
                running[ours] = job, process
            for connection in wait(list(running)):
                job, process = running[connection]
                try:
                    event, value = connection.recv()
                except EOFError:
                    event, value = "failed", "its process died (out of memory?)"
                if event != "epoch":
                    process.join()
                    connection.close()
                    del running[connection]
                report(job, event, value)
    finally:
        for connection, (_, process) in running.items():
            process.terminate()
            process.join()
            connection.close()


def _run_job(connection, job, parent, lock):
    """The process of one job: send what happens to the parent; end when that is gone, and hold no lock of its."""
    if lock is not None and PROCESSES.get_start_method() == "fork":
        os.close(lock)
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle,
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which then ends its runs with this
    np.seterr(all="ignore")  # a loss that is not finite is found, and named, at the end of an epoch
    connection.send(
        outcome(job, lambda record: connection.send(("epoch", record)), stop=lambda: os.getppid() != parent)
    )


def outcome(job, on_epoch=None, stop=None):
    """Execute a job; return ("done", None) or ("failed", why)."""
    try:
        return ("done", None) if execute(job, on_epoch, stop) else ("failed", "stopped")
    except (UserError, OSError) as error:
        return "failed", str(error)
    except MemoryError:
        return "failed", "out of memory"


# What it shows


def collect(jobs):
    """Return {name of the dataset: its results} and the rows of study.csv, from the runs that are finished.

    A seed counts where all weightings of the study have finished it; a dataset without one is left out.
    """
    results, rows = {}, []
    for dataset in dict.fromkeys(job.dataset.name for job in jobs):
        own = [job for job in jobs if job.dataset.name == dataset]
        weightings = list(dict.fromkeys(job.attn for job in own))
        found = {(job.attn, job.seed): load_analysis(job) for job in own}
        seeds = [
            seed for seed in dict.fromkeys(job.seed for job in own) if all(found[attn, seed] for attn in weightings)
        ]
        if seeds:
            arms = {attn: [found[attn, seed] for seed in seeds] for attn in weightings}
            baselines = rank_log_baselines(own[0])
            results[dataset] = describe_dataset(own[0], arms, seeds, baselines)
            rows += table_rows(dataset, arms, seeds, baselines)
    return results, rows


def rank_log_baselines(job):
    """Return the ranks [M] of the baselines on a job's log, computed anew."""
    log, settings = job.dataset.log, job.dataset.settings
    split = runs.split_log(log, settings)
    return rank_baselines(log, split, split.test, settings["training"]["filter_seen"])


def describe_dataset(job, arms, seeds, baselines):
    """Return the results of one dataset, as study.json holds them.

    job: one of its jobs; arms: {attn: [(analysis, ranks), a seed each]}; baselines: {name: ranks [M]}.
    """
    log, model = job.dataset.log, job.dataset.settings["model"]
    by_user = {attn: [user_values(ranks["test"]) for _, ranks in found] for attn, found in arms.items()}
    values = {
        attn: {name: np.array([seed[name].mean() for seed in found]) for name in METRICS}
        for attn, found in by_user.items()
    }
    result = {
        "users": len(log.users),
        "items": len(log.items),
        "interactions": len(log.sequence),
        "test_users": len(arms["softmax"][0][1]["test"]),
        "unreachable": int((arms["softmax"][0][1]["test"] >= MISS).sum()),
        "split": job.dataset.settings["data"]["split"],
        "filter_seen": job.dataset.settings["training"]["filter_seen"],
        "max_length": model["max_length"],
        "dropout": model["dropout"],
        "seeds": seeds,
        "epochs": {attn: [analysis["epochs"] for analysis, _ in found] for attn, found in arms.items()},
        "epochs_at_most": job.dataset.settings["training"]["epochs"],
        "metrics": {
            attn: {name: {"mean": float(v.mean()), "std": spread(v)} for name, v in named.items()}
            for attn, named in values.items()
        },
    }
    for effect, (a, b) in COMPARED.items():
        if b in arms:
            result[effect] = {
                name: compare(
                    values[a][name],
                    values[b][name],
                    np.mean([x[name] * 1.0 - y[name] for x, y in zip(by_user[a], by_user[b], strict=True)], axis=0),
                )
                for name in METRICS
            }
    softmax = arms["softmax"]
    result["substitution"] = {
        title: mean_metrics([ranks[key] for _, ranks in softmax])
        for title, key in zip(
            ["all", *(f"block {i}" for i in range(model["n_blocks"]))], substitutions(model["n_blocks"]), strict=True
        )
    }
    result["shuffled"] = {attn: mean_metrics([ranks["shuffled"] for _, ranks in found]) for attn, found in arms.items()}
    result["baselines"] = {name: mean_metrics([ranks]) for name, ranks in baselines.items()}
    result["mixing"] = average([analysis["mixing"] for analysis, _ in softmax])
    result["pictures"] = average([analysis["pictures"] for analysis, _ in softmax])
    return result | conclude(result, [analysis["mixing"]["all"]["attn_res_ln"]["mean"] for analysis, _ in softmax])


def spread(values):
    """Return the standard deviation over seeds; None for one seed."""
    return float(values.std(ddof=1)) if len(values) > 1 else None


def mean_metrics(ranks):
    """Return the means of METRICS over seeds; ranks: a list of [M]."""
    found = [metrics(r) for r in ranks]
    return {name: float(np.mean([f[name] for f in found])) for name in METRICS}


def average(values):
    """Return the mean over seeds of numbers in equal nests of lists and dicts; None where any is None."""
    first = values[0]
    if isinstance(first, dict):
        return {name: average([v[name] for v in values]) for name in first}
    if isinstance(first, list):
        return [average(list(parts)) for parts in zip(*values, strict=True)]
    return None if None in values else float(np.mean(values))


def conclude(result, ratios):
    """Return ratio, effect sizes, regime and, from COMPARED, what can be said; ratios: one a seed."""
    effect = {name: c["hedges_g"] for name, c in result["weighting"].items()}
    g, judged = mean_g(effect.values()), result["weighting"][JUDGED_BY]
    # With one seed there is no effect size; the point estimate then has the sign of the difference.
    name = regime(float(np.mean(ratios)), judged["difference"] if g is None else g)
    judgements = {
        what: judge(result[what][JUDGED_BY], result["metrics"][b][JUDGED_BY]["mean"])
        for what, (_, b) in COMPARED.items()
        if what in result
    }
    n_users = result["test_users"] - result["unreachable"]
    model = result["metrics"]["softmax"][JUDGED_BY]["mean"]
    baselines = [values[JUDGED_BY] for values in result["baselines"].values()]
    found = doubts(name, judgements["weighting"], ratios, n_users, model, baselines)
    return {
        "mixing_ratio": float(np.mean(ratios)),
        "mixing_ratio_std": spread(np.array(ratios)),
        "hedges_g": effect,
        "mean_g": g,
        "judgements": judgements,
        "regime": name,
        "confident": not found,
        "doubts": found,
    }


WORDS = {  # for what statistics.judge says of weighting, and of integration
    "weighting": {
        "equal": "a causal average does as well as learned attention",
        "better": "learned attention beats a causal average",
        "worse": "a causal average beats learned attention",
        "no better": "learned attention does no better than a causal average",
        "unclear": "these runs cannot tell learned attention from a causal average",
    },
    "integration": {
        "equal": "; the last item alone does as well as an average of the past",
        "better": "; the past adds to the last item",
        "worse": "; an average of the past harms",
        "no better": "; an average of the past does no better than the last item alone",
        "unclear": "",
    },
}


def verdict(name, result):
    """Return one sentence, in plain words and no stronger than the seeds allow, on a dataset's results."""
    test, n = result["weighting"][JUDGED_BY], len(result["seeds"])
    what = "one seed cannot say whether learned attention is needed"
    if n > 1:
        what = WORDS["weighting"][result["judgements"]["weighting"]]
    numbers = [] if test["relative"] is None else [f"{JUDGED_BY} {test['relative']:+.0%}"]
    numbers += [] if test["p"] is None else [f"p = {test['p']:.2g}"]
    numbers += [] if result["mean_g"] is None else [f"mean g = {result['mean_g']:+.1f}"]
    numbers = ", ".join([*numbers, f"{n} seed{'s' * (n > 1)}"])
    past = WORDS["integration"][result["judgements"].get("integration", "unclear")]
    doubt = f", not confident ({'; '.join(result['doubts'])})" if result["doubts"] else ""
    return (
        f"{name}: {what} ({numbers}){past}; blocks keep {1 - result['mixing_ratio']:.0%} of each position: "
        f"regime {result['regime'].replace('_', ' ')}{doubt}."
    )


def table_rows(dataset, arms, seeds, baselines):
    """Return the rows of study.csv for one dataset: dataset, what was ranked, seed, then all metrics."""
    rows = []
    for attn, found in arms.items():
        for seed, (_, ranks) in zip(seeds, found, strict=True):
            for key, r in ranks.items():
                put_in = key.replace("uniform.", "uniform in block ")
                rows.append([dataset, attn if key == "test" else f"{attn}, {put_in}", seed, metrics(r)])
    return rows + [[dataset, name, None, metrics(r)] for name, r in baselines.items()]


def times(jobs):
    """Return {dataset: {attn: {"train_seconds", "milliseconds" to rank all items for a user: one a run}}}."""
    found = {}
    for job in jobs:
        if loaded := load_analysis(job):
            own = found.setdefault(job.dataset.name, {}).setdefault(job.attn, {"train_seconds": [], "milliseconds": []})
            own["train_seconds"].append(sum(record["train_seconds"] for record in runs.load_records(job.folder)))
            own["milliseconds"].append(loaded[0]["milliseconds_per_user"])
    return found


def write_results(out, results, rows):
    """Write study.json and study.csv; what they hold of other datasets, studied in this folder before, stays.

    Times are no part of them: the same study gives the same files. Returns the results of all datasets.
    """
    header, earlier, lines = ["dataset", "arm", "seed", *rows[0][3]], {}, []
    if (out / "study.json").exists():
        found = files.read_json(out / "study.json")
        try:
            earlier = {name: result for name, result in dict(found["datasets"]).items() if name not in results}
            if earlier:
                with open(out / "study.csv", encoding="utf-8", newline="") as file:
                    earlier_header, *earlier_lines = csv.reader(file)
                lines = [line for line in earlier_lines if line and line[0] in earlier]
                if earlier_header != header or {line[0] for line in lines} != set(earlier):
                    raise ValueError("their datasets, or their columns, are not the same")
        except (OSError, TypeError, KeyError, ValueError, csv.Error) as error:
            raise UserError(
                f"{out}: study.json or study.csv is damaged ({error}); remove both, then start again"
            ) from None
    everything = earlier | results
    for dataset, arm, seed, values in rows:
        lines.append([dataset, arm, "" if seed is None else seed, *(f"{value:.6f}" for value in values.values())])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *lines])
    # The table comes first: rows of a dataset that study.json does not name are left out the next time.
    files.replace(out / "study.csv", lambda file: file.write(text.getvalue().encode()))
    files.write_json(out / "study.json", {"datasets": everything})
    return everything


def write_times(out, times):
    """Write times.json, {dataset: as from times}; what it holds of other datasets stays, as in write_results."""
    before = files.read_json(out / "times.json") if (out / "times.json").exists() else {}
    if not isinstance(before, dict):
        raise UserError(f"{out / 'times.json'}: damaged; remove it, then start again")
    files.write_json(out / "times.json", {name: own for name, own in before.items() if name not in times} | times)


def learning_curves(jobs):
    """Return {dataset: {attn: [validation JUDGED_BY of each epoch, a list a seed]}} of finished runs."""
    curves = {}
    for job in jobs:
        if load_analysis(job):
            values = [record[JUDGED_BY] for record in runs.load_records(job.folder)]
            curves.setdefault(job.dataset.name, {}).setdefault(job.attn, []).append(values)
    return curves
