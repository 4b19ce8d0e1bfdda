"""The HTML page of a run or a study: what it shows, gathered as one dict, and put into page.html.

Nothing is computed here that another module does not compute: rankings are evaluate's, norms and ratios
decompose's, statistics and sentences the study's. The page is one file that loads nothing. Names from a
log are data in it and never markup: they lie in a JSON block with <, > and & escaped, and page.html
shows them as text.

Symbols: H heads, L positions, n keys of a row.
"""

import math
import unicodedata
from functools import partial
from importlib import resources
from pathlib import Path

import numpy as np

from minirec import files
from minirec.attention import FIXED
from minirec.data.split import Targets
from minirec.decompose import RECENT, TINY, block_caches, contribution_norms, head_norms, mixing_ratios, recent_weights
from minirec.errors import UserError
from minirec.parameters import sub_dict
from minirec.studies.plots import relative_maps
from minirec.studies.results import COMPARED, describe_mixing, tabulate, verdict
from minirec.studies.statistics import METRICS, MIXES_ABOVE, published, regime
from minirec.training import runs
from minirec.training.parallel import usable_cores, worker_map
from minirec.training.progress import best, finished
from minirec.training.ranking import MISS, metrics, rank_targets

USERS = 50  # to pick from; fewer where histories are long
ROOM = 2_400_000  # characters for all rows of weights and norms: it bounds the page
TOP, LOOKED_UP = 10, 100  # items shown; the best ones under the trained weighting, among which they are looked up
ALL_CANDIDATES = "all items, also those that the user had before (--no-filter-seen)"
LEVELS = 999  # of a row's largest value, and so many steps down to 0: four characters a value


# What both pages need


def page(content):
    """Return the page, as UTF-8, that shows what describe_run or describe_study returned."""
    template = resources.files("minirec.report").joinpath("page.html").read_text("utf-8")
    return files.self_contained(template, content)


def legible(name):
    """Return a name with what has no glyph, or turns the direction of text, written as an escape."""
    joiners = "\u200c\u200d"  # scripts and emoji need them
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")
    is_hidden = lambda c: unicodedata.category(c) in hidden and c not in joiners
    return "".join(c.encode("unicode_escape").decode() if is_hidden(c) else c for c in name)


def rounded(value):
    """Return numbers, in nests of lists and dicts, with five digits; what is not finite becomes None.

    Raises TypeError for what is no number.
    """
    if isinstance(value, dict):
        return {name: rounded(v) for name, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    if value is None or isinstance(value, int) and abs(value) < 1 << 53:
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None


def row(values):
    """Return values [n] >= 0 as [the largest, [n whole numbers]]: 0 to LEVELS times the largest, over LEVELS."""
    most = float(values.max())
    return [rounded(most), np.rint(values / max(most, TINY) * LEVELS).astype(int).tolist()]


def mixing(result):
    """Return what the pages show of how much a model mixes; result: its "mixing" and "pictures", heatmaps relative."""
    pictures = [{name: np.array(values, float).tolist() for name, values in b.items()} for b in result["pictures"]]
    return {"mixing": rounded(result["mixing"]), "pictures": rounded(pictures)}


# A run


def describe_run(model):
    """Return what the page of a run shows, ready for JSON; model: its Model, as from training.fit.load."""
    config, records = model.config, model.records
    test = runs.split_log(model.log, model.settings).test
    trained = "+".join(dict.fromkeys(config.weightings))
    # Softmax is never substituted: where it was not trained, W_q and W_k are as drawn.
    models = {trained: model} | {w: model.with_attention(w) for w in FIXED if w != trained}
    ranks = [m.ranks() for m in models.values()]
    mixed = describe_mixing(model.decompose())
    users, items = explorer(list(models.values()), test)
    lengths = np.minimum(test.stops - test.starts, config.max_length)
    return {
        "kind": "run",
        "title": f"{log_name(model.settings)}, {trained} attention",
        "facts": run_facts(model, test, ranks[0]),
        "weightings": list(models),
        "metrics": [rounded(metrics(r)) for r in ranks],
        "curves": {name: [rounded(record[name]) for record in records] for name in ("loss", runs.SELECTED_BY)},
        "best_epoch": best(records)["epoch"] if records else None,
        **{"n_items": config.n_items, "filter_seen": model.filters_seen(None), "n_test": len(test.users)},
        **{"users": users, "items": list(map(legible, items))},
        **mixing(mixed | {"pictures": relative_maps(mixed["pictures"], lengths)}),
    }


def log_name(settings):
    """Return the log's file name without its folders: they are private."""
    return legible(Path(settings["data"]["path"]).name)


def run_facts(model, test, ranks):
    """Return what a run is, as {name: text}; test: its Targets; ranks [M]: of them."""
    config, records, log = model.config, model.records, model.log
    source, training = model.settings["data"], model.settings["training"]
    kept = "no epoch is finished yet"
    if records:
        kept = f"epoch {best(records)['epoch']} of {len(records)}, the best on validation ({runs.SELECTED_BY})"
        kept += "" if finished(records, training) else "; training is not finished"
    filters = [f"k-core {source['k_core']}"] * (source["k_core"] > 1) + ["repeats dropped"] * source["drop_repeats"]
    unreachable = int((ranks >= MISS).sum())
    facts = {
        "Run": legible(model.folder.resolve().name),
        "Log": f"{log_name(model.settings)}: {log.counts()} (SHA-256 {source['sha256'][:12]}...)",
        "Split": ", ".join([f"{source['split']}, {len(test.users):,} test users", *filters]),
        "Model": f"{config.n_blocks} blocks, {config.n_heads} heads, hidden size {config.hidden_size}, "
        f"the last {config.max_length} items, dropout {config.dropout}",
        "Training": f"loss {training['loss']}, batches of {training['batch_size']}, learning rate {training['lr']:g}, "
        f"seed {training['seed']}",
        "Kept": kept,
    }
    if unreachable:
        facts["Misses"] = f"{unreachable:,} of the test targets are items that the user had before: no candidates"
    if not training["filter_seen"]:
        facts["Candidates"] = ALL_CANDIDATES
    return facts


def explorer(models, test):
    """Return the users that one can pick, with the latest positions of their histories, and the names of items there.

    models: the trained Model first, then the same with other weights substituted; test: its Targets. A position is
    shown as it was at its time: the model sees the last max_length items up to it, and the item that came next is
    known. Returns a list of users (see below; an item is an index into the second list) and the names.
    """
    model, config, log = models[0], models[0].config, models[0].log
    longest = min(config.max_length, int((test.stops - test.starts).max()))
    characters = config.n_blocks * (2 * config.n_heads + 1) * longest * 4  # of a position
    n_positions = int(np.clip(ROOM // characters, 1, RECENT))
    n_users = int(np.clip(ROOM // (characters * n_positions), 1, USERS))
    sample = np.unique(np.linspace(0, len(test.users) - 1, n_users).round().astype(int))
    sample = sample[np.argsort(test.starts[sample] - test.stops[sample], kind="stable")]  # the longest history first

    targets = [  # (user, start, stop): the latest position first
        (test.users[s], test.starts[s], stop)
        for s in sample
        for stop in range(test.stops[s], max(test.starts[s], test.stops[s] - n_positions), -1)
    ]
    targets = Targets(*map(np.array, zip(*targets, strict=True)))
    histories = [log.sequence[a:b] for a, b in zip(targets.starts, targets.stops, strict=True)]
    # The names of the best items, best first: [model][target]
    tops = [[[name for name, _ in best] for best in m.recommend_many(histories, LOOKED_UP)] for m in models]
    with worker_map(usable_cores(), np) as run:
        ranking = (log.sequence, targets, model.filters_seen(None), run)
        ranks = [np.concatenate(list(rank_targets(model.parameters, m.config, *ranking))) for m in models]
        blocks = list(run(partial(explain, model.parameters, config), histories))

    indices = {}  # {name: its index among those that the page names}

    def index(name):
        return indices.setdefault(name, len(indices))

    users = {}
    for number, (user, start, stop) in enumerate(zip(*targets, strict=True)):
        if user not in users:
            shown = log.sequence[max(start, stop - config.max_length - n_positions + 1) : stop]
            history, before = [index(log.items[item]) for item in shown], int(stop - start - len(shown))
            users[user] = {"name": legible(log.users[user]), "before": before, "history": history, "positions": []}
        was = {name: rank for rank, name in enumerate(tops[0][number], 1)}
        users[user]["positions"].append(
            {
                "position": int(stop - start - 1),
                "next": index(log.items[log.sequence[stop]]),
                "ranks": [None if r[number] >= MISS else int(r[number]) + 1 for r in ranks],
                "tops": [[index(name) for name in top[number][:TOP]] for top in tops],
                "was": [[was.get(name) for name in top[number][:TOP]] for top in tops],  # None: beyond LOOKED_UP
                "blocks": blocks[number],
            }
        )
    return list(users.values()), list(indices)


def explain(parameters, config, history):
    """Take apart what reaches the last position of a history [L].

    Returns a list of blocks: {"attention", "heads": H rows; "contribution": a row, of what all heads and the residual
    come to; "ratios": {ratio: mixing ratio}}. Rows are over the keys, oldest first (see row).
    """
    length = np.array([min(len(history), config.max_length)])
    batch, caches = block_caches(parameters, config, history, len(history) - length, length)
    (bucket,) = batch.buckets
    blocks = []
    for i, cache in enumerate(caches):
        p, (attention,) = sub_dict(parameters, f"blocks.{i}."), cache["attention"]
        last = (cache, p, bucket, attention, 1, bucket.length)  # the last query, over all keys
        ratios = mixing_ratios(cache, p, batch.buckets)
        blocks.append(
            {
                "attention": [row(weights) for weights in recent_weights(*last[3:])[0, :, 0]],
                "heads": [row(norms) for norms in head_norms(*last)[0, :, 0]],
                "contribution": row(contribution_norms(*last)[0, 0]),
                "ratios": {name: rounded(float(values[-1])) for name, values in ratios.items()},
            }
        )
    return blocks


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
    points = [[name, p["mixing_ratio"], p["mean_hedges_g"]] for name, p in theirs["datasets"].items()]
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
    """Return what the page shows of one log's results (see results.describe_dataset)."""
    n, model = len(result["seeds"]), f"the last {result['max_length']} items, dropout {result['dropout']}"
    epochs = [f"{attn} {', '.join(map(str, epochs))}" for attn, epochs in result["epochs"].items()]
    facts = {
        "Log": f"{result['users']:,} users, {result['items']:,} items, {result['interactions']:,} interactions",
        "Split": f"{result['split']}, {result['test_users']:,} test users; of their targets, {result['unreachable']:,} "
        f"are items that the user had before, {result['cold']:,} new",
        "Candidates": "items that the user had not had" if result["filter_seen"] else ALL_CANDIDATES,
        "Runs": f"{n} seed{'s' * (n > 1)} of each weighting; {model}",
        "Epochs": f"{'; '.join(epochs)}; at most {result['epochs_at_most']}",
        "Regime": f"{result['regime'].replace('_', ' ')}, {'' if result['confident'] else 'not '}confident",
        "Caveats": "; ".join(result["caveats"]) or "none: seeds and users bear it out",
    }
    fields = ("difference", "relative", "hedges_g", "hedges_g_interval", "p")
    fields += ("interval", "interval_seeds", "interval_users")
    return {
        "name": legible(name),
        "verdict": legible(verdict(name, result)),
        "point": [rounded(result["mixing_ratio"]), rounded(result["mean_hedges_g"]), str(result["regime"])],
        "facts": facts,
        "rows": [[title, rounded(cells)] for title, cells in tabulate(result)],
        "effects": [
            [f"{a} minus {b}", [[m, *(rounded(result[what][m][field]) for field in fields)] for m in METRICS]]
            for what, (a, b) in COMPARED.items()
            if what in result
        ],
        **mixing(result),
    }
