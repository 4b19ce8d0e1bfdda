"""The HTML page of a run or a study: what it shows, gathered as one dict, and put into page.html.

Nothing is computed here that another module does not compute: rankings are evaluate's, norms and ratios
decompose's, statistics and sentences the study's. The page is one file that loads nothing. Names from a
log are data in it and never markup: they lie in a JSON block with <, > and & escaped, and page.html
shows them as text.

Symbols: H heads, L positions, n keys of a row.
"""

import math
import unicodedata
from contextlib import nullcontext
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np

from minirec import files
from minirec.attention import FIXED
from minirec.data.split import Targets
from minirec.decompose import (
    RATIOS,
    RECENT,
    TINY,
    block_caches,
    contribution_norms,
    decompose,
    head_norms,
    mixing_ratios,
    work_chunks,
)
from minirec.errors import UserError
from minirec.parameters import sub_dict
from minirec.studies.grid import COMPARED, describe_mixing, verdict
from minirec.studies.statistics import METRICS, MIXES_ABOVE, mean_g, published, regime
from minirec.training import runs
from minirec.training.parallel import usable_cores, worker_map
from minirec.training.progress import best, finished
from minirec.training.ranking import MISS, metrics, rank_targets, recommend

USERS = 50  # to pick from; fewer where histories are long
ROOM = 2_400_000  # characters for all rows of weights and norms: it bounds the page
TOP, LOOKED_UP = 10, 100  # items recommended; ranks in which their place under the trained weighting is looked up
ALL_CANDIDATES = "all items, also those that the user had before (--no-filter-seen)"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"  # 6 bits each
LEVELS = len(LETTERS) ** 2 - 1


# What both pages need


def page(found):
    """Return the page, as UTF-8, that shows what describe_run or describe_study found."""
    template = resources.files("minirec.report").joinpath("page.html").read_text("utf-8")
    return files.self_contained(template, found)


def legible(name):
    """Return a name with what has no glyph, or turns the direction of text, written as an escape."""
    joiners = "\u200c\u200d"  # scripts and emoji need them
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in hidden and c not in joiners else c
        for c in name
    )


def rounded(value):
    """Return numbers, in nests of lists and dicts, with five digits; what is not finite becomes None.

    Raises TypeError for what is no number.
    """
    if isinstance(value, dict):
        return {name: rounded(v) for name, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    if value is None or isinstance(value, int):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None


def row(values):
    """Return values [n] >= 0 as [the largest, two letters each]: 0 to LEVELS times the largest."""
    most = float(values.max())
    levels = np.rint(values / max(most, TINY) * LEVELS).astype(int)
    letters = np.frombuffer(LETTERS.encode(), "S1")
    return [rounded(most), np.stack([letters[levels >> 6], letters[levels & 63]], axis=1).tobytes().decode()]


def mixing(found):
    """Return what the pages show of how much a model mixes; found: as from grid.describe_mixing."""

    def values(summary):
        return {
            name: {kind: rounded(summary[name][kind]) for kind in ("mean", "median")} for name in (*RATIOS, "entropy")
        }

    parts = {part: values(found["mixing"][part]) for part in ("all", "without_first", "latest")}
    names = ("attention", "contribution")
    return {
        "mixing": {"blocks": [values(block) for block in found["mixing"]["blocks"]]} | parts,
        "pictures": [
            {name: [rounded(count) for count in block[name]] for name in RATIOS}
            | {name: [[rounded(value) for value in line] for line in block[name]] for name in names}
            for block in found["pictures"]
        ],
    }


# A run


def silent(label, length):
    """A progress that shows nothing: a context that yields update(n)."""
    return nullcontext(lambda n: None)


def describe_run(folder, settings, parameters, log, progress=silent):
    """Return what the page of a run shows, ready for JSON.

    settings, parameters, log: as from runs; progress(label, length): a context that yields update(n).
    """
    config, records = runs.model_config(settings), runs.load_records(folder)
    filter_seen = settings["training"]["filter_seen"]
    test = runs.split_log(log, settings).test
    trained = "+".join(dict.fromkeys(config.weightings))
    # Softmax is never put in: where it was not trained, W_q and W_k are as drawn.
    configs = {trained: config} | {w: replace(config, attn=w) for w in FIXED if w != trained}
    histories = [log.sequence[a:b] for a, b in zip(test.starts, test.stops, strict=True)]
    with worker_map(usable_cores(), np) as run:
        ranks = []
        with progress("ranking", len(configs) * len(histories)) as update:
            for put_in in configs.values():
                found = []
                for chunk in rank_targets(parameters, put_in, log.sequence, test, filter_seen, run):
                    found.append(chunk)
                    update(len(chunk))
                ranks.append(np.concatenate(found))
        with progress("decomposing", sum(min(len(h), config.max_length) for h in histories)) as update:
            decomposed = decompose(parameters, config, histories, run, update)
        with progress("taking apart", 1 + 2 * len(configs)) as update:
            users, items = explorer(parameters, configs, log, test, run, update, filter_seen)
    return {
        "kind": "run",
        "title": f"{log_name(settings)}, {trained} attention",
        "facts": run_facts(folder, settings, log, records, test, ranks[0]),
        "weightings": list(configs),
        "metrics": [rounded(metrics(r)) for r in ranks],
        "curves": {name: [rounded(record.get(name)) for record in records] for name in ("loss", runs.SELECTED_BY)},
        "best_epoch": best(records)["epoch"] if records else None,
        "n_items": config.n_items,
        "filter_seen": filter_seen,
        "n_test": len(histories),
        "users": users,
        "items": [legible(log.items[i]) for i in items],
        **mixing(describe_mixing(decomposed)),
    }


def log_name(settings):
    """Return the log's file name, without the folders that it lies in: they are nobody else's business."""
    return legible(Path(settings["data"]["path"]).name)


def run_facts(folder, settings, log, records, test, ranks):
    """Return what a run is, as a list of [name, text]."""
    source, model, training = settings["data"], settings["model"], settings["training"]
    kept = "no epoch is finished yet"
    if records:
        kept = f"epoch {best(records)['epoch']} of {len(records)}, the best on validation ({runs.SELECTED_BY})"
        kept += "" if finished(records, training) else "; training is not finished"
    filters = [f"k-core {source['k_core']}"] * (source["k_core"] > 1) + ["repeats dropped"] * source["drop_repeats"]
    unreachable = int((ranks >= MISS).sum())
    facts = {
        "Run": legible(folder.resolve().name),
        "Log": f"{log_name(settings)}: {len(log.users):,} users, {len(log.items):,} items, "
        f"{len(log.sequence):,} interactions (SHA-256 {source['sha256'][:12]}...)",
        "Split": ", ".join([f"{source['split']}, {len(test.users):,} test users", *filters]),
        "Model": f"{model['n_blocks']} blocks, {model['n_heads']} heads, hidden size {model['hidden_size']}, "
        f"the last {model['max_length']} items, dropout {model['dropout']}",
        "Training": f"loss {training['loss']}, batches of {training['batch_size']}, learning rate {training['lr']:g}, "
        f"seed {training['seed']}",
        "Kept": kept,
    }
    if unreachable:
        facts["Misses"] = f"{unreachable:,} of the test targets are items that the user had before: no candidates"
    if not training["filter_seen"]:
        facts["Candidates"] = ALL_CANDIDATES
    return list(map(list, facts.items()))


def explorer(parameters, configs, log, test, run=map, progress=lambda n: None, filter_seen=True):
    """Return the users that one can pick, each with the latest positions of the history, and the items they name.

    configs: {weighting: Config}, the trained one first. A position is looked at as it was at its time: the model
    sees the last max_length items up to it, and names the item that came next. Returns a list of users (see
    below; items as places in the second list) and the numbers of these items.
    """
    trained = next(iter(configs.values()))
    longest = min(trained.max_length, int((test.stops - test.starts).max()))
    characters = trained.n_blocks * (2 * trained.n_heads + 1) * longest * 2  # of a position
    n_positions = int(np.clip(ROOM // characters, 1, RECENT))
    n_users = int(np.clip(ROOM // (characters * n_positions), 1, USERS))
    sample = np.unique(np.linspace(0, len(test.users) - 1, n_users).round().astype(int))

    cases = [  # (user, start, stop): the latest position first
        (test.users[s], test.starts[s], stop)
        for s in sample
        for stop in range(test.stops[s], max(test.starts[s], test.stops[s] - n_positions), -1)
    ]
    cases = Targets(*map(np.array, zip(*cases, strict=True)))
    histories = [log.sequence[a:b] for a, b in zip(cases.starts, cases.stops, strict=True)]
    rows = explain(parameters, trained, log.sequence, cases, run)
    progress(1)
    tops, ranks = [], []
    for config in configs.values():
        tops.append(top_items(parameters, config, histories, run, filter_seen))
        ranks.append(np.concatenate(list(rank_targets(parameters, config, log.sequence, cases, filter_seen, run))))
        progress(2)

    places = {}  # item -> its place among those that the page names

    def place(item):
        return places.setdefault(int(item), len(places))

    users = {}
    for number, (user, start, stop) in enumerate(zip(*cases, strict=True)):
        if user not in users:
            shown = log.sequence[max(start, stop - trained.max_length - n_positions + 1) : stop]
            before = int(stop - start - len(shown))
            history = [place(item) for item in shown]
            users[user] = {"name": legible(log.users[user]), "before": before, "history": history, "positions": []}
        was = {item: rank for rank, item in enumerate(tops[0][number], 1)}
        users[user]["positions"].append(
            {
                "position": int(stop - start - 1),
                "next": place(log.sequence[stop]),
                "ranks": [None if r[number] >= MISS else int(r[number]) + 1 for r in ranks],
                "tops": [[place(item) for item in top[number][:TOP]] for top in tops],
                "was": [[was.get(item) for item in top[number][:TOP]] for top in tops],  # None: beyond LOOKED_UP
                "blocks": rows[number],
            }
        )
    return list(users.values()), list(places)


def top_items(parameters, config, histories, run=map, filter_seen=True):
    """Return the LOOKED_UP best items for each history, a list each, best first (see ranking.recommend)."""
    return [
        [int(item) for item, score in zip(items, scores, strict=True) if score > -np.inf]
        for chunk in recommend(parameters, config, histories, LOOKED_UP, run, filter_seen)
        for items, scores in zip(*chunk, strict=True)
    ]


def explain(parameters, config, sequence, cases, run=map):
    """Take apart what reaches the last position of each case's history, sequence[start:stop].

    Returns a list of cases, each a list of blocks: {"attention", "heads": H rows; "contribution": a row, of what all
    heads and the residual come to; "ratios": {ratio: mixing ratio}}. Rows are over the keys, oldest first (see row).
    """
    lengths = np.minimum(cases.stops - cases.starts, config.max_length)
    starts = cases.stops - lengths

    def explain_chunk(chunk):
        batch, caches = block_caches(parameters, config, sequence, starts[chunk], lengths[chunk])
        ends = np.cumsum(batch.lengths) - 1
        found = [[] for _ in chunk]
        for i, cache in enumerate(caches):
            p = sub_dict(parameters, f"blocks.{i}.")
            ratios = mixing_ratios(cache, p, batch.buckets)
            number = 0
            for bucket, attention in zip(batch.buckets, cache["attention"], strict=True):
                last = (cache, p, bucket, attention, 1, bucket.length)  # the last query, over all keys
                heads, together = head_norms(*last)[:, :, 0], contribution_norms(*last)[:, 0]
                a = np.broadcast_to(attention.weights[..., -1, :], heads.shape)
                for s in range(bucket.count):
                    found[batch.order[number]].append(
                        {
                            "attention": [row(r) for r in a[s]],
                            "heads": [row(r) for r in heads[s]],
                            "contribution": row(together[s]),
                            "ratios": {name: rounded(float(r[ends[number]])) for name, r in ratios.items()},
                        }
                    )
                    number += 1
        return chunk, found

    results = [None] * len(lengths)
    for chunk, found in run(explain_chunk, work_chunks(lengths, np)):
        for i, blocks in zip(chunk, found, strict=True):
            results[i] = blocks
    return results


# A study


def describe_study(folder):
    """Return what the page of a study shows, ready for JSON. Raises UserError where study.json is not a study's."""
    path, theirs = folder / "study.json", published()
    results = files.read_json(path)
    try:
        datasets = [describe_result(name, result) for name, result in results["datasets"].items()]
        if not datasets:
            raise ValueError("no dataset")
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not a study's results ({reason}); run the study again") from None
    points = [[name, p["mixing_ratio"], mean_g(p["hedges_g"].values())] for name, p in theirs["datasets"].items()]
    return {
        "kind": "study",
        "title": f"Study of {', '.join(dataset['name'] for dataset in datasets)}",
        "metrics": list(METRICS),
        "mixes_above": MIXES_ABOVE,
        "source": theirs["source"],
        "published": [[name, ratio, rounded(g), regime(ratio, g)] for name, ratio, g in points],
        "datasets": datasets,
    }


def describe_result(name, result):
    """Return what the page shows of one dataset's results (see grid.describe_dataset)."""
    n, unreachable = len(result["seeds"]), result["unreachable"]
    at_most = [attn for attn, epochs in result["epochs"].items() if max(epochs) >= result["epochs_at_most"]]
    facts = {
        "Log": f"{result['users']:,} users, {result['items']:,} items, {result['interactions']:,} interactions",
        "Split": f"{result['split']}, {result['test_users']:,} test users"
        + (f"; {unreachable:,} targets are items that the user had before: misses" if unreachable else "")
        + ("" if result.get("filter_seen", True) else f"; candidates are {ALL_CANDIDATES}"),
        "Model": f"the last {result['max_length']} items, dropout {result['dropout']}",
        "Runs": f"{n} seed{'s' * (n > 1)} of each weighting",
        "Epochs": "; ".join(f"{attn} {', '.join(map(str, epochs))}" for attn, epochs in result["epochs"].items())
        + (f" (ended by the limit: {', '.join(at_most)})" if at_most else ""),
    }
    others = {
        f"softmax, uniform put in{'' if blocks == 'all' else ' ' + blocks}": values
        for blocks, values in result["substitution"].items()
    }
    others |= {f"{attn}, history shuffled": values for attn, values in result["shuffled"].items()}
    others |= {f"{baseline} (counts, nothing learned)": values for baseline, values in result["baselines"].items()}
    rows = [[attn, [[v[m]["mean"], v[m]["std"]] for m in METRICS]] for attn, v in result["metrics"].items()]
    rows += [[title, [[values[m], None] for m in METRICS]] for title, values in others.items()]
    fields = ("difference", "relative", "hedges_g", "p", "interval_seeds", "interval_users")
    return {
        "name": legible(name),
        "verdict": legible(verdict(name, result)),
        "point": [rounded(result["mixing_ratio"]), rounded(result["mean_g"]), str(result["regime"])],
        "doubts": list(map(str, result["doubts"])),
        "facts": list(map(list, facts.items())),
        "rows": [[title, rounded(cells)] for title, cells in rows],
        "effects": [
            [f"{a} minus {b}", [[m, *(rounded(result[what][m][field]) for field in fields)] for m in METRICS]]
            for what, (a, b) in COMPARED.items()
            if what in result
        ],
        **mixing(result),
    }
