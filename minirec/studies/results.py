"""What a study shows: from the ranks and mixing ratios of its runs to results, a sentence a log, and tables.

    RQ1  is learned attention weighting needed?       softmax against uniform, the same seeds
    RQ2  how much do the trained models mix positions?   the mixing ratios of the softmax runs
    RQ3  how do the two relate?                       a point (ratio, effect size) a log, and its regime

Symbols: M test users, n seeds.
"""

import csv
import io

import numpy as np

from minirec import files
from minirec.data.describe import cold_targets
from minirec.decompose import HEATMAPS, RATIOS
from minirec.errors import UserError
from minirec.studies import statistics
from minirec.studies.plots import relative_maps, with_nulls
from minirec.studies.statistics import JUDGED_BY, METRICS, mean_hedges_g
from minirec.training import runs
from minirec.training.baselines import rank_baselines
from minirec.training.fit import load
from minirec.training.progress import finished
from minirec.training.ranking import MISS, metrics, user_values

COMPARED = {"weighting": ("softmax", "uniform"), "integration": ("uniform", "identity")}
COMPARED |= {"content": ("softmax", "recency"), "recency": ("recency", "uniform")}
IN_WORDS = ("weighting", "integration", "content")  # what a verdict speaks of: judged together (see statistics.holm)
BINS = 50  # of the ratios' distributions, over [0, 1]
FEWEST_SEEDS, FEWEST_USERS = 3, 30  # fewer never make a regime confident; users with a target that can be hit
MANY_MISSES = 0.2  # of the targets: where more cannot be hit, what the rest say is doubtful


# What a run leaves


def substitutions(n_blocks):
    """Return {name in ranks.npz: blocks whose softmax weights are replaced by uniform ones}."""
    return {"uniform": range(n_blocks)} | {f"uniform.{i}": [i] for i in range(n_blocks)}


def describe_mixing(result):
    """Return what analysis.json keeps of Model.decompose: summary, histograms and heatmaps, a list of blocks each."""
    edges = np.linspace(0, 1, BINS + 1)
    blocks = [
        {name: np.histogram(block[name], edges)[0].tolist() for name in RATIOS}
        | {name: with_nulls(block[name]) for name in HEATMAPS}
        for block in result["blocks"]
    ]
    return {"mixing": result["summary"], "pictures": blocks}


def load_analysis(job):
    """Return what analysis.json holds of a run, with its "ranks" {name: [M]} and the "records" of its epochs.

    None where it is not finished and analysed. An analysis that is damaged, or of another run, counts as none: it can
    be made again.
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
    fits = fits and (not softmax or {"mixing", "pictures"} <= set(analysis))
    return analysis | {"ranks": ranks, "records": records} if fits else None


# Results


def collect(jobs):
    """Return {name of the log: its results}, as study.json holds them, from the runs that are finished.

    A seed counts where all weightings of the study have finished it; a log without one is left out.
    """
    results = {}
    for name in dict.fromkeys(job.dataset.name for job in jobs):
        of_log = {(job.attn, job.seed): job for job in jobs if job.dataset.name == name}
        loaded = {key: load_analysis(job) for key, job in of_log.items()}
        weightings, seeds = (list(dict.fromkeys(values)) for values in zip(*of_log, strict=True))
        seeds = [seed for seed in seeds if all(loaded[attn, seed] for attn in weightings)]
        if seeds:
            arms = {attn: [loaded[attn, seed] for seed in seeds] for attn in weightings}
            results[name] = describe_dataset(of_log[weightings[0], seeds[0]].dataset, arms, seeds)
            results[name]["verdict"] = verdict(name, results[name])
    return results


def describe_dataset(dataset, arms, seeds):
    """Return the results of one log; dataset: a grid.Dataset; arms: {attn: [load_analysis, a seed each]}."""
    log, model, training = dataset.log, dataset.settings["model"], dataset.settings["training"]
    split = runs.split_log(log, dataset.settings)
    baselines = rank_baselines(log, split, split.test, training["filter_seen"])
    by_user = {attn: by_metric([run["ranks"]["test"] for run in loaded]) for attn, loaded in arms.items()}
    learned = arms["softmax"]
    lengths = np.minimum(split.test.stops - split.test.starts, model["max_length"])
    titles = {"uniform": "all"} | {f"uniform.{i}": f"block {i}" for i in range(model["n_blocks"])}
    substituted = {title: mean_metrics([run["ranks"][key] for run in learned]) for key, title in titles.items()}
    result = {"curves": {attn: [[r[JUDGED_BY] for r in run["records"]] for run in v] for attn, v in arms.items()}}
    result |= {"users": len(log.users), "items": len(log.items), "interactions": len(log.sequence), "seeds": seeds}
    result |= {"split": dataset.settings["data"]["split"], "test_users": len(split.test.users)}
    seen, cold = learned[0]["ranks"]["test"] >= MISS, cold_targets(log, split)
    result |= {"unreachable": int(seen.sum()), "cold": int((cold & ~seen).sum())}  # none is counted as both
    result |= {name: (model | training)[name] for name in ("max_length", "dropout", "filter_seen", "patience")}
    result |= {
        "epochs_at_most": training["epochs"],
        "epochs": {attn: [run["epochs"] for run in loaded] for attn, loaded in arms.items()},
        "metrics": {attn: {name: mean_and_std(x.mean(axis=1)) for name, x in v.items()} for attn, v in by_user.items()},
        "substitution": substituted,
        "shuffled": {attn: mean_metrics([run["ranks"]["shuffled"] for run in loaded]) for attn, loaded in arms.items()},
        "baselines": {name: mean_metrics([r]) for name, r in baselines.items()},
        "mixing": average([run["mixing"] for run in learned]),
        "pictures": relative_maps(average([run["pictures"] for run in learned]), lengths),
        "table": table_rows(arms, seeds, baselines),
    }
    for what, (a, b) in COMPARED.items():
        if {a, b} <= set(arms):
            result[what] = {name: statistics.compare(by_user[a][name], by_user[b][name]) for name in METRICS}
    share = None
    if "recency" in arms and result["weighting"][JUDGED_BY]["difference"] > 0:
        share = statistics.content_share(*(by_user[attn][JUDGED_BY] for attn in ("softmax", "uniform", "recency")))
    return result | conclude(result, [run["mixing"]["all"]["attn_res_ln"]["mean"] for run in learned], share)


def by_metric(ranks):
    """Return {metric: each user's value under each seed, [n, M]}; ranks: a list of [M], a seed each."""
    values = [user_values(r) for r in ranks]
    return {name: np.array([v[name] for v in values], float) for name in METRICS}


def mean_and_std(values):
    """Return {"mean", "std"} of values [n] over seeds; std is None for one seed."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def mean_metrics(ranks):
    """Return the means of METRICS over seeds; ranks: a list of [M]."""
    return {name: float(x.mean(axis=1).mean()) for name, x in by_metric(ranks).items()}


def average(values):
    """Return the mean over seeds of numbers in equal nests of lists and dicts; None where any is None."""
    first = values[0]
    if isinstance(first, dict):
        return {name: average([v[name] for v in values]) for name in first}
    if isinstance(first, list):
        return [average(list(parts)) for parts in zip(*values, strict=True)]
    return None if None in values else float(np.mean(values))


def conclude(result, ratios, share):
    """Return ratio, effect sizes, regime and what can be said of a log, with the caveats.

    ratios: of the softmax runs, one a seed; share: as from content_share, None without a recency arm.
    """
    effect = {name: c["hedges_g"] for name, c in result["weighting"].items()}
    mean, judged = mean_hedges_g(effect.values()), {w: result[w][JUDGED_BY] for w in IN_WORDS if w in result}
    alphas = statistics.holm(judged)
    judgements = {
        what: statistics.judge(c, result["metrics"][COMPARED[what][1]][JUDGED_BY]["mean"], alphas[what])
        for what, c in judged.items()
    }
    # With one seed there is no effect size; the point estimate then has the sign of the difference.
    sign = judged["weighting"]["difference"] if mean is None else mean
    ratio = mean_and_std(ratios)
    found = {"mixing_ratio": ratio["mean"], "mixing_ratio_std": ratio["std"]}
    found |= {"mixing_ratio_interval": statistics.mean_interval(ratios), "hedges_g": effect, "mean_hedges_g": mean}
    found |= {"judgements": judgements, "judged_at": alphas, "relies_on": None}
    found |= {"regime": statistics.regime(ratio["mean"], sign, judgements["weighting"])}
    if share and judgements["weighting"] == "better":
        found |= {"relies_on": "content" if share[0] > statistics.HALF else "recency"}
        found |= {"content_share": share[0], "content_share_interval": share[1]}
    caveats = find_caveats(result | found)
    return found | {"confident": not caveats, "caveats": caveats}


def find_caveats(result):
    """Return why a regime is not to be relied on, as a list of words; empty where seeds and users bear it out.

    A model that a count clearly beats has learned too little, and one that the limit of epochs ended perhaps too: an
    untrained one mixes nothing.
    """
    n_test, seen, cold = result["test_users"], result["unreachable"], result["cold"]
    at_limit = [attn for attn, epochs in result["epochs"].items() if max(epochs) >= result["epochs_at_most"]]
    ratio, share = result["mixing_ratio_interval"], result.get("content_share_interval")
    counted, model = (max(v[JUDGED_BY] for v in result["baselines"].values()), result["metrics"]["softmax"][JUDGED_BY])
    missed = f"{seen + cold:,} of {n_test:,} targets cannot be hit ({seen:,} the user had before, {cold:,} are new)"
    either, fits = statistics.MIXES_ABOVE, statistics.FITS[result["regime"]]
    caveats = [
        (len(result["seeds"]) < FEWEST_SEEDS, f"fewer than {FEWEST_SEEDS} seeds"),
        (n_test - seen < FEWEST_USERS, f"fewer than {FEWEST_USERS} users to test on"),
        (seen + cold > MANY_MISSES * n_test, missed),
        (at_limit, f"{', '.join(at_limit)} ended at the limit of {result['epochs_at_most']} epochs"),
        (model["mean"] < (1 - statistics.MARGIN) * counted, "counting does better than the model"),
        (ratio and ratio[0] <= either < ratio[1], f"the seeds' mixing ratios do not agree on a side of {either}"),
        (result["judgements"]["weighting"] not in fits, "it is not clear that weighting matters as the regime has it"),
        (share and share[0] <= statistics.HALF <= share[1], "whether recency brings most of the gain is not clear"),
    ]
    return [words for applies, words in caveats if applies]


# In words

NAMES = {"softmax": "learned attention", "uniform": "a causal average"}
NAMES |= {"identity": "the last item alone", "recency": "a fixed recency decay"}
WORDS = {  # for what statistics.judge says
    "equal": f"{{b}} does as well as {{a}}, to within {statistics.MARGIN:.0%}",
    "better": "{a} beats {b}",
    "worse": "{b} beats {a}",
    "no better": f"{{a}} does no better than {{b}}, or by less than {statistics.MARGIN:.0%}",
    "unclear": "these runs cannot tell {a} from {b}",
}


def numbers(comparisons):
    """Return what one comparison comes to, as text; comparisons: {metric: as from statistics.compare}."""
    c, mean = comparisons[JUDGED_BY], mean_hedges_g(c["hedges_g"] for c in comparisons.values())
    parts = [f"{JUDGED_BY} {c['difference']:+.4f}", *([] if c["relative"] is None else [f"{c['relative']:+.1%}"])]
    text = "{:.0%} interval {:+.4f} to {:+.4f}"
    parts += [text.format(statistics.CONFIDENCE, *c["interval"])] if c["interval"] else []
    parts += [] if mean is None else [f"mean Hedges' g {mean:+.1f}"]
    return ", ".join([*parts, f"{c['seeds']} seed{'s' * (c['seeds'] > 1)}"])


def describe_effect(comparisons, judgement, a, b):
    """Return what one comparison shows, in words and numbers."""
    alone = comparisons[JUDGED_BY]["seeds"] == 1
    what = "one seed cannot tell {a} from {b}" if alone else WORDS[judgement]
    return f"{what.format(a=NAMES.get(a, a), b=NAMES.get(b, b))} ({numbers(comparisons)})"


def verdict(name, result):
    """Return one sentence, in plain words and no stronger than seeds and users allow, on a log's results."""
    judgements = result["judgements"]
    parts = [describe_effect(result["weighting"], judgements["weighting"], *COMPARED["weighting"])]
    for what in IN_WORDS[1:] if len(result["seeds"]) > 1 else ():
        if what in judgements:
            a, b = (NAMES[attn] for attn in COMPARED[what])
            parts.append(WORDS[judgements[what]].format(a=a, b=b))
    if result["relies_on"]:
        share, (low, high) = result["content_share"], result["content_share_interval"]
        brought = f"a fixed decay brings {1 - share:.0%} of what learned weights gain ({1 - high:.0%} to {1 - low:.0%})"
        counts = {"content": "most of it needs more than recency", "recency": "recency suffices for most of it"}
        unclear = low <= statistics.HALF <= high  # a caveat says so
        parts.append(brought if unclear else f"{brought}: {counts[result['relies_on']]}")
    caveats = f", not confident ({'; '.join(result['caveats'])})" if result["caveats"] else ""
    return (
        f"{name}: {'; '.join(parts)}; blocks keep {1 - result['mixing_ratio']:.0%} of a position on average: "
        f"regime {result['regime'].replace('_', ' ')}{caveats}."
    )


def compare(models_a, models_b, part="test"):
    """Compare two lists of trained models, in each one model a seed, as a study compares two weightings.

    models_a, models_b: lists of Models or run folders, with the same seeds, or a single one each; part: "valid" or
    "test". Returns {"comparison": {metric: as from statistics.compare}, "mean_hedges_g", "judgement", "sentence"};
    judged alone, without a study's correction for several comparisons. Raises UserError where log, split, candidates or
    seeds differ, where a seed comes twice, or without scipy.
    """
    arms = [models if isinstance(models, (list, tuple)) else [models] for models in (models_a, models_b)]
    arms = [[m if hasattr(m, "ranks") else load(m) for m in models] for models in arms]
    tested_on = {(m.log.sha256(), m.settings["data"]["split"], m.filters_seen(None)) for models in arms for m in models}
    if len(tested_on) > 1:
        raise UserError("the models are tested on different logs, parts of one, or candidates (filter_seen)")
    ranks_a, ranks_b = ({m.settings["training"]["seed"]: m.ranks(part) for m in models} for models in arms)
    if any(len({m.config.weightings for m in models}) > 1 for models in arms):
        raise UserError("the models of an arm differ in their weighting")
    if [len(ranks_a), len(ranks_b)] != [len(models) for models in arms]:
        raise UserError("two models of an arm have the same seed: train each with its own")
    if set(ranks_a) != set(ranks_b) or len({len(r) for r in (*ranks_a.values(), *ranks_b.values())}) != 1:
        raise UserError(f"two arms are compared on the same seeds and users; here {sorted(ranks_a)}, {sorted(ranks_b)}")
    a, b = ("+".join(dict.fromkeys(models[0].config.weightings)) for models in arms)
    if a == b:
        a, b = f"{a}, the first models", f"{b}, the second models"
    values_a, values_b = (by_metric([ranks[seed] for seed in sorted(ranks)]) for ranks in (ranks_a, ranks_b))
    comparison = {name: statistics.compare(values_a[name], values_b[name]) for name in METRICS}
    judgement = statistics.judge(comparison[JUDGED_BY], values_b[JUDGED_BY].mean())
    return {
        "comparison": comparison,
        "mean_hedges_g": mean_hedges_g(c["hedges_g"] for c in comparison.values()),
        "judgement": judgement,
        "sentence": describe_effect(comparison, judgement, a, b),
    }


# Tables


def table_rows(arms, seeds, baselines):
    """Return the rows of study.csv for one log: what was ranked, seed, then all metrics by name."""
    rows = []
    for attn, loaded in arms.items():
        for seed, run in zip(seeds, loaded, strict=True):
            for key, r in run["ranks"].items():
                changed = key.replace("uniform.", "uniform in block ")
                rows.append([attn if key == "test" else f"{attn}, {changed}", seed, metrics(r)])
    return rows + [[baseline, None, metrics(r)] for baseline, r in baselines.items()]


def tabulate(result):
    """Return the rows of a log's tables: [title, [[mean, std or None], a metric each]]."""
    rows = [[attn, [[v[m]["mean"], v[m]["std"]] for m in METRICS]] for attn, v in result["metrics"].items()]
    others = {f"softmax, uniform substituted in {blocks}": v for blocks, v in result["substitution"].items()}
    others |= {f"{attn}, history shuffled": values for attn, values in result["shuffled"].items()}
    others |= {f"{baseline} (counts, nothing learned)": values for baseline, values in result["baselines"].items()}
    return rows + [[title, [[values[m], None] for m in METRICS]] for title, values in others.items()]


def text_table(name, result):
    """Return a log's arms, baselines, comparisons and mixing as lines of text."""

    def line(title, cells):
        return f"  {title[:44]:<44}" + "".join(f"{cell:>15}" for cell in cells)

    n = len(result["seeds"])
    lines = ["", line(f"{name} (mean ± std of {n} seed{'s' * (n > 1)})", METRICS)]
    for title, cells in tabulate(result):
        lines.append(line(title, [f"{m:.4f}" + (f" ±{s:.4f}" if s is not None else "") for m, s in cells]))
    for what, (a, b) in COMPARED.items():
        if what in result:
            judged = f"; judged at {1 - result['judged_at'][what]:.1%}" if n > 1 and what in IN_WORDS else ""
            lines.append(f"  {a} - {b}: {numbers(result[what])}{judged}")
    blocks = [f"block {i} {block['attn_res_ln']['mean']:.3f}" for i, block in enumerate(result["mixing"]["blocks"])]
    blocks.append(f"latest position {result['mixing']['latest']['attn_res_ln']['mean']:.3f}")
    ratio, spread = f"  mixing ratio {result['mixing_ratio']:.3f}", result["mixing_ratio_interval"]
    ratio += ", {:.0%} interval over seeds {:.3f} to {:.3f}".format(statistics.CONFIDENCE, *spread) if spread else ""
    return "\n".join([*lines, f"{ratio} ({', '.join(blocks)})"])


def write_results(out, results):
    """Write study.json and study.csv; what they hold of other logs, studied in this folder before, stays.

    Times are no part of them: the same study gives the same files.
    """
    path, text = out / "study.json", io.StringIO()
    try:
        before = files.read_json(path)["datasets"] if path.exists() else {}
        everything = before | results
        table = [[name, *row] for name, result in everything.items() for row in result["table"]]
    except (UserError, LookupError, TypeError) as error:
        raise UserError(f"{path}: damaged, or of an older version ({error}); remove it and study.csv") from None
    lines = [[name, arm, seed, *(f"{value:.6f}" for value in values.values())] for name, arm, seed, values in table]
    csv.writer(text, lineterminator="\n").writerows([["dataset", "arm", "seed", *table[0][3]], *lines])
    files.write_json(path, {"datasets": everything})
    files.replace(out / "study.csv", lambda file: file.write(text.getvalue().encode()))
