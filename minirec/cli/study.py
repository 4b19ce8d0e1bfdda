"""`study`: the grid of runs, its progress and its tables."""

import time
from contextlib import nullcontext
from pathlib import Path

import click
import numpy as np

from minirec import files
from minirec.attention import known_weightings
from minirec.backend import load as load_backend
from minirec.cli.common import (
    INTERRUPTED,
    LONGEST_NAME,
    SIZE,
    Command,
    Number,
    backend_option,
    filter_seen_option,
    json_option,
    load_log,
    log_name,
    log_options,
    log_source,
    on_terminal,
    one_line,
    progress,
    remark_on_cold,
    remark_on_repeats,
    say,
    say_json,
)
from minirec.data import planted
from minirec.data.describe import count_unreachable
from minirec.data.split import training_windows
from minirec.errors import UserError
from minirec.model import Config
from minirec.studies import grid as studying
from minirec.studies.statistics import JUDGED_BY, METRICS, import_scipy, mean_g
from minirec.training import runs
from minirec.training.mpi import launched_rank
from minirec.training.parallel import usable_cores
from minirec.training.runs import Training

EPOCHS, EPOCHS_EMBEDDED = 200, 100  # of a study: the embedded datasets must show their regimes in minutes


@click.command(cls=Command)
@click.option("--data", multiple=True, help="A log; give it once a log [default: the embedded datasets].")
@log_options
@click.option("--attn", type=click.Choice(known_weightings()), multiple=True, help="Weightings [default: all].")
@click.option("--seeds", type=click.IntRange(1, 1000), default=3, help="Runs of each weighting.")
@click.option("--epochs", type=click.IntRange(min=1), help="At most so many [default: 200; embedded datasets 100].")
@click.option("--patience", type=click.IntRange(min=1), default=Training.patience, help="Epochs without a gain.")
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
    import_scipy()  # or say now, not after the runs, that it is missing
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
    config = Config(len(log.items), max_length=length, dropout=rate)
    training = Training(epochs=epochs, **{name: options[name] for name in ("patience", "backend", "filter_seen")})
    settings = runs.make_settings(source, config, training)
    split = runs.split_log(log, settings)
    say(
        f"{log_name(path)}: {len(log.users):,} users, {len(log.items):,} items, {len(log.sequence):,} interactions; "
        f"{len(split.test.users):,} test users; the last {length} items, dropout {rate}, {epochs} epochs at most"
    )
    remark_on_cold(log, split)
    if options["filter_seen"]:
        remark_on_repeats(count_unreachable(log, split.test), len(split.test.users))
    if not len(split.test.users) or not len(training_windows(log, split, length)[0]):
        raise UserError(f"{path}: too small for a {source.split} split: no user to test on, or nothing to train on")
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
