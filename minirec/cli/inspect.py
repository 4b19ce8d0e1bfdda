"""What a finished run is asked: `evaluate`, `decompose`, `recommend`, `report`."""

import csv
import os
import re
import shlex
from functools import partial
from types import SimpleNamespace

import click
import numpy as np

from minirec import files
from minirec.cli import options
from minirec.cli.common import Command, another_log, load_log, opened, progress, say, say_json
from minirec.data.describe import remarks_on_repeats
from minirec.decompose import HEATMAPS, RATIOS, contributions
from minirec.errors import UserError, did_you_mean
from minirec.files import few
from minirec.report import page as reporting
from minirec.training import runs
from minirec.training.fit import load
from minirec.training.ranking import CUTOFFS
from minirec.training.runs import SELECTED_BY


def remark_on_counts(result, counted):
    """Say which rankings by counts beat a model; result, counted: metrics of the model, and of each baseline."""
    reached, part = result[SELECTED_BY], result["split"]
    if better := {name: m[SELECTED_BY] for name, m in counted.items() if m[SELECTED_BY] > reached}:
        names = " and ".join(f"{name} ({value:.4f})" for name, value in better.items())
        say(f"a simple count beats the model: {names}; the model reaches {part} {SELECTED_BY} {reached:.4f}")


def remark_on_candidates(model, wanted):
    """Say where items that the user has had are candidates because the run was trained so; wanted: --filter-seen."""
    if wanted is None and not model.filters_seen(None):
        say("as the run was trained, items that the user has had are candidates (--filter-seen removes them)")


def metrics_table(part, columns):
    """Return metrics as lines of text, a row a cutoff; columns: {what ranked: its metrics}, the baselines last."""
    names, width = ("HR", "NDCG", "MRR"), 24
    lines = [
        f"{part:<6}" + "".join(f"{title[:width]:>{width}}" for title in columns),
        f"{'':<6}" + "".join(f"{name:>{width // len(names)}}" for name in names) * len(columns),
    ]
    for k in CUTOFFS:
        cells = (f"{values[f'{name}@{k}']:{width // len(names)}.4f}" for values in columns.values() for name in names)
        lines.append(f"{'@' + str(k):>6}" + "".join(cells))
    return "\n".join(lines)


@click.command(cls=Command)
@options.run
@options.any_data
@click.option("--split", type=click.Choice(["valid", "test"]), default="test", help="Whose targets to rank.")
@options.filter_seen(None)
@click.option("--attn", type=options.WEIGHTING, help="Substitute this weighting for the trained one.")
@click.option("--attn-blocks", type=options.numbers, metavar="I,J", help="Only in these blocks; 0 is the first.")
@options.backend
@options.workers
@options.as_json
def evaluate(run, data, split, filter_seen, attn, attn_blocks, backend, workers, as_json):
    """How well does a model rank? HR, NDCG and MRR over all items.

    Two rankings that learn nothing are shown for comparison: popularity, and transitions, which count how often an item
    followed the user's last one. With --attn the attention weights of the trained model are replaced: does it need
    those that it learned? With --data another log is ranked, split as the run's log was. Targets that the model does
    not know are then misses, and the two rankings by counts are left out.

    \b
    python cli.py evaluate runs/household-softmax-1 --attn uniform --attn-blocks 1
    python cli.py evaluate --data today.csv
    """
    if attn_blocks is not None and not attn:
        raise click.UsageError("--attn-blocks needs --attn, which names the weighting to substitute.")
    model = trained = opened(run, "evaluate", backend, data)
    try:
        model = model.with_attention(attn, attn_blocks) if attn else model
    except UserError as error:
        raise click.UsageError(str(error)) from None
    remark_on_candidates(model, filter_seen)
    with another_log(model, data, to_split=True) as log:
        rank = lambda m: m.evaluate(log, split, filter_seen, workers, partial(progress, "ranking"))
        result = rank(model)
        # What a substitution changes is seen beside the model as it was trained.
        columns = {"as trained": rank(trained)} if attn and not as_json else {}
    remark_on_counts(result, result["baselines"])
    for line in remarks_on_repeats(result["unreachable"], result["users"]):
        say(line)
    if as_json:
        say_json(result)
    else:
        names = "+".join(dict.fromkeys(result["attn"]))
        click.echo(metrics_table(split, columns | {names: result} | result["baselines"]))


@click.command(cls=Command)
@options.run
@options.data
@click.option("--out", type=options.PATH, help="Write decomposition.npz and heatmaps to this folder.")
@options.backend
@options.workers
@options.as_json
def decompose(run, data, out, backend, workers, as_json):
    """How much do the attention blocks mix positions?

    The mixing ratio is |mixed| / (|mixed| + |kept|), over the histories of the test users: at 0 a position stays as it
    is, at 1 it is replaced by others. It is shown for the attention output alone (Attn), with the residual added
    (AttnRes), and after the layer norm (AttnResLN, the paper's figure). The entropy of the attention weights A is
    relative: at 1 they are uniform.

    \b
    python cli.py decompose --out decomposition     with arrays and heatmaps
    """
    model = opened(run, "decompose", backend, data)
    result = model.decompose(workers, partial(progress, "decomposing"))
    summary = result["summary"]
    if out:
        _write_decomposition(out, result)
    if as_json:
        say_json(summary)
        return
    rows = [(f"block {i}", values) for i, values in enumerate(summary["blocks"])]
    rows += [(name.replace("_", " "), summary[name]) for name in ("all", "without_first", "latest")]
    names = {"attn": "Attn", "attn_res": "AttnRes", "attn_res_ln": "AttnResLN", "entropy": "entropy of A"}
    click.echo(f"{'mean (median)':>14}" + "".join(f"{name:>18}" for name in names.values()))
    for title, values in rows:
        cells = (values[name] for name in names)
        texts = (f"{v['mean']:.3f} ({v['median']:.3f})" if v["n"] else "-" for v in cells)
        click.echo(f"{title:>14}" + "".join(f"{text:>18}" for text in texts))


def _write_decomposition(folder, result):
    """Write decomposition.npz and, where matplotlib is there, heatmaps.png."""
    from minirec.studies import plots

    files.make_folder(folder)
    arrays = {"users": result["users"], "positions": result["positions"]}
    for i, block in enumerate(result["blocks"]):
        arrays |= {f"blocks.{i}.{name}": block[name] for name in (*RATIOS, "entropy", *HEATMAPS)}
    files.write_arrays(folder / "decomposition.npz", arrays)
    say(f"wrote {folder / 'decomposition.npz'}")
    try:
        plots.write(plots.heatmaps(result), folder / "heatmaps.png")
        say(f"wrote {folder / 'heatmaps.png'}")
    except ImportError:
        say("no heatmaps: they need matplotlib; pip install matplotlib")


@click.command(cls=Command)
@options.run
@options.any_data
@click.option("--user", help="Recommend to this user of the log [default: its first user].")
@click.option("--history", metavar="A,B,C", help="Recommend after these item ids, oldest first.")
@click.option("--all", "everyone", is_flag=True, help="Recommend to all users of the log; needs --out.")
@click.option("--top", type=options.COUNT, default=10, help="How many items to recommend.")
@click.option("--explain", is_flag=True, help="Show how much each item of the history contributes.")
@click.option("--out", type=options.FILE, help="The CSV file for --all.")
@options.filter_seen(None)
@options.backend
@options.workers
@options.as_json
def recommend(run, data, user, history, everyone, top, explain, out, filter_seen, backend, workers, as_json):
    """Which items does a model rank highest, and why?

    Users and histories are those of the log that the model was trained on, or those of another log with --data. Items
    that the model does not know are left out.

    \b
    python cli.py recommend --history "item 3,item 17" --explain
    python cli.py recommend --all --out recommendations.csv
    python cli.py recommend --all --out recommendations.csv --data today.csv
    """
    if sum(choice is not None for choice in (user, history, everyone or None)) > 1:
        raise click.UsageError("choose one of --user, --history and --all.")
    if everyone != bool(out):
        raise click.UsageError("--all needs --out FILE.csv, and --out needs --all.")
    if explain and (everyone or as_json):
        raise click.UsageError("--explain is a table of one history, not for --all or --json.")
    if data and history is not None:
        raise click.UsageError("--data is for users of a log; --history needs none.")
    model = opened(run, "recommend", backend, data)
    remark_on_candidates(model, filter_seen)
    if everyone:
        summary = _recommend_to_all(model, data, top, out, filter_seen, workers)
        if as_json:
            say_json(summary)
        return
    if history is not None:
        names = _names_in(history, model.items)
        sequence = model.history(names)
        result, left_out = {"history": [model.items[i] for i in sequence]}, len(names) - len(sequence)
    else:
        user, sequence, left_out = _user_history(model, data, user)
        result = {"user": user}
    best = [{"item": item, "score": score} for item, score in model.recommend(sequence, top, filter_seen)]
    if not best:
        say("nothing to recommend: the history holds every item")
    if as_json:
        say_json(result | {"left_out": left_out, "recommendations": best})
        return
    for rank, row in enumerate(best, 1):
        click.echo(f"{rank:4d}  {row['item']:<30} {row['score']:8.3f}")
    if explain:
        _explain(model, sequence)


def _names_in(history, items):
    """Return the names in a history "a,b,c"; an id with a comma can be quoted; a line break separates too."""
    try:
        fields = [field for row in csv.reader(re.split("[\r\n]+", history)) for field in row if field.strip()]
    except csv.Error as error:
        raise UserError(f"--history: cannot be read ({error})") from None
    known = set(items)
    names = [field if field in known else field.strip() for field in fields]
    between = r"(^|[,\r\n])\s*{}\s*([,\r\n]|$)".format  # commas or ends, so that it is no part of other fields
    whole = (n for n in items if "," in n and n not in names and re.search(between(re.escape(n)), history))
    if not known.issuperset(names) and (item := next(whole, None)):
        quoted = shlex.quote('"' + item.replace('"', '""') + '"')
        raise UserError(f"--history: {item!r} is one item, whose commas need quotes: --history {quoted}")
    return names


def _known_histories(model, data):
    """Return the Log to recommend from, in the model's numbering of items, and the lengths [U] of whole histories."""
    with another_log(model, data, to_split=False) as log:
        whole = log or model.log
        return model.known_part(log)[0] if log else whole, np.diff(whole.offsets)


def _user_history(model, data, user):
    """Return a user's name, their history in the run's numbering of items, and how many items of it are left out."""
    log, lengths = _known_histories(model, data)
    path = data or model.settings["data"]["path"]
    user = log.users[0] if user is None else user
    if user not in log.users:
        near = did_you_mean(user, log.users) or f"; users look like {log.users[0]!r}"
        raise UserError(f"no user {user!r} in {path}{near}")
    number = log.users.index(user)
    sequence = log.history(number)
    left_out = int(lengths[number]) - len(sequence)
    if not len(sequence):
        raise UserError(f"nothing to recommend to user {user!r} of {path}: the model knows none of {left_out} items")
    say(f"user {user}, {len(sequence)} items" + (f"; unknown to the model: {left_out} more" if left_out else ""))
    return user, sequence, left_out


def _recommend_to_all(model, data, top, out, filter_seen, workers):
    """Write user,rank,item,score for all users of the log; return what --json says.

    They are written while they are ranked: of each user, only a number is kept in memory.
    """
    path = data or model.settings["data"]["path"]
    if os.path.exists(path) and os.path.exists(out) and os.path.samefile(path, out):
        raise UserError(f"{out}: is read from; choose another --out")
    log, _ = _known_histories(model, data)
    known, n_users = np.diff(log.offsets) > 0, len(log.users)
    if left_out := [log.users[u] for u in np.flatnonzero(~known)]:
        text = f"no list for {len(left_out):,} of {n_users:,} users, of whose items the model knows none"
        say(f"{text}: {few(left_out)}")
    users = np.flatnonzero(known)
    written = files.write(out, lambda file: _write_lists(file, model, log, users, top, filter_seen, workers))
    if without := len(users) - written:
        say(f"no list for {without:,} of {n_users:,} users, who have had every item")
    say(f"wrote {out}: {written:,} users")
    return {"out": str(out), "users": written, "left_out": n_users - written}


def _write_lists(file, model, log, users, top, filter_seen, workers):
    """Write the rows of some users, by their numbers in the log, to a file; return for how many there was a list."""
    writer = csv.writer(SimpleNamespace(write=lambda text: file.write(text.encode())), lineterminator="\n")
    writer.writerow(("user", "rank", "item", "score"))
    lists, written = model.recommend_many(map(log.history, users), top, filter_seen, workers), 0
    with progress("recommending", len(users)) as update:
        for user, best in zip(users, lists, strict=True):
            name = log.users[user]
            writer.writerows((name, rank, item, f"{score:.4f}") for rank, (item, score) in enumerate(best, 1))
            written += bool(best)
            update(1)
    return written


def _explain(model, sequence, most=10):
    """Print the AttnResLN contribution norms to the latest position, as shares a block."""
    norms = [square[-1] for square in contributions(model.parameters, model.config, sequence)]  # [L] a block
    shares = [row / max(row.sum(), 1e-30) for row in norms]
    recent = sequence[-model.config.max_length :]
    click.echo(f"\n{'share of the last position':<36}" + "".join(f"{'block ' + str(i):>9}" for i in range(len(shares))))
    for j in sorted(range(len(recent)), key=lambda j: -sum(share[j] for share in shares))[:most]:
        ago = len(recent) - 1 - j
        name = f"{model.items[recent[j]]} ({ago} back)" if ago else f"{model.items[recent[j]]} (latest)"
        click.echo(f"      {name:<30}" + "".join(f"{share[j]:9.1%}" for share in shares))


@click.command(cls=Command)
@options.run
@options.data
@click.option("--out", type=options.FILE, help="The page [default: report.html in the folder].")
def report(run, data, out):
    """What is a prediction made of? A page to look into.

    Writes one HTML file that needs no network. For a run it shows the metrics, how much the model mixes positions, and
    predictions to take apart: the attention weight of each item of the history beside what the item contributes. For
    the folder of a study it shows the verdict, tables and pictures.

    \b
    python cli.py report runs/household-softmax-1
    python cli.py report runs/study --out study.html
    """
    folder = run or runs.newest_folder("report", ("checkpoint.npz", "study.json"))
    if not run:
        say(f"run {folder}")
    is_study = (folder / "study.json").exists()
    if data and is_study:
        raise click.UsageError("--data is for the log of a run; the page of a study needs none.")
    page = reporting.page(
        reporting.describe_study(folder) if is_study else reporting.describe_run(load(folder, data, read=load_log))
    )
    # A link is followed where a person named it, never where it lay in a folder that may be a stranger's.
    write, out = (files.write, out) if out else (files.replace, folder / "report.html")
    write(out, lambda file: file.write(page))
    say(f"wrote {out}: {len(page) / 1e6:.2f} MB; open it in a browser")
