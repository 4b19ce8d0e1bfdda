"""What a log is asked before training: `describe`, and where public ones come from: `fetch`."""

import math
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import click

from minirec.cli import options
from minirec.cli.common import INTERRUPTED, Command, load_log, log_source, one_line, progress, remark, say, say_json
from minirec.data import public as cataloguing
from minirec.data.describe import describe as describe_log
from minirec.data.describe import remarks_on_targets
from minirec.data.log import counted, filter_log, users_of
from minirec.data.times import as_text
from minirec.errors import UserError, did_you_mean
from minirec.files import few
from minirec.studies import grid as studying
from minirec.training import runs
from minirec.training.settings import Source

FIRST = 3  # interactions of a log that describe shows as they were understood


@click.command(cls=Command)
@click.argument("name", required=False)
@click.option("--out", type=click.Path(path_type=Path), default="datasets", help="The folder.")
def fetch(name, out):
    """Fetch a public log; without a name, list them.

    It is written as OUT/NAME.csv. A transfer that breaks off goes on with the same command. What may not be
    downloaded directly, or was downloaded already, is taken from the folder under its publisher's file name.

    \b
    python cli.py fetch ml-100k
    """
    entries = cataloguing.read_catalogue(cataloguing.CATALOGUE)
    if name is None:
        click.echo("\n".join(catalogue_table(entries.values())))
        return
    if name not in entries:
        raise UserError(f"no {name!r} in the catalogue{did_you_mean(name, entries)} (python cli.py fetch lists it)")
    entry = entries[name]
    say(f"{entry.title}, {entry.page}; licence: {entry.licence}")
    try:
        path, log = cataloguing.fetch(entry, out, progress, lambda text: say(one_line(text)))
    except KeyboardInterrupt:
        say("\nstopped; the same command goes on from here")
        raise click.exceptions.Exit(INTERRUPTED) from None
    if log:
        say(f"wrote {path}: {entry.file}, read as {log.read_as}")
        remark(log, path)
    else:
        say(f"{path} is there already; remove it to fetch it again")
        log = load_log(Source(str(path)))
    click.echo(counts_line(log, entry.counts))
    core = ""
    if entry.k_core:
        core = f" --k-core {entry.k_core['k']}" + " --drop-repeats" * entry.k_core.get("drop_repeats", False)
        filtered = filter_log(log, entry.k_core["k"], entry.k_core.get("drop_repeats", False))
        click.echo(f"with{core}: {counts_line(filtered, entry.k_core)}")
    path = shlex.quote(str(path))
    say(f"next: python cli.py describe {path}{core}; python cli.py study --data {path}{core}")


def counts_line(log, published):
    """Return the counts of a log as text, beside the published ones."""
    if published is None:
        return log.counts()
    if log.sizes().items() <= published.items():
        return f"{log.counts()}: as published ({published['from']})"
    return f"{log.counts()}; NOT the published {counted(published)} ({published['from']})"


def catalogue_table(entries):
    """Return the catalogue as lines of text, a row a log."""
    yield f"{'NAME':<20}{'users':>10}{'items':>11}{'interactions':>14}{'download':>11}  licence"
    for entry in entries:
        cells = [f"{entry.counts[what]:,}" if entry.counts else "-" for what in ("users", "items", "interactions")]
        size = f"<{math.ceil(entry.at_most_bytes / 1e6):,} MB" if entry.url else "by hand"
        yield f"{entry.name:<20}{cells[0]:>10}{cells[1]:>11}{cells[2]:>14}{size:>11}  {entry.licence}"


@click.command(cls=Command)
@click.argument("path", metavar="FILE")
@options.log
@options.as_json
def describe(path, as_json, **log_options):
    """What is in a log, and what would a study make of it?

    FILE may also be an embedded one: chain, taste, drift, household.

    \b
    python cli.py describe ratings.csv --columns who,what,when --k-core 5
    """
    source = replace(log_source(path, log_options), path=path)  # as it was typed
    log = load_log(source, tell=False)
    split = runs.split_log(log, {"data": asdict(source)})
    result = describe_log(log, split, source.drop_repeats)
    result["study"] = studying.defaults(path, log)
    if as_json:
        say_json({"path": path, "read_as": log.read_as, "remarks": log.remarks} | result)
        return
    filtered = options.typed(log_options, "k_core", "drop_repeats")
    click.echo(f"{path}{log.read_as and f', read as {log.read_as}'}{filtered and f', after{filtered}'}\n")
    for n, (user, item) in enumerate(zip(users_of(log)[:FIRST], log.sequence[:FIRST], strict=True)):
        when = "" if log.times is None else f", time {as_text(log.times[n], log.dated)}"
        row = f"user {few([log.users[user]])}, item {few([log.items[item]])}{when}"
        click.echo(f"{'' if n else 'the first':<15}{row}")
    click.echo("\n".join(description(result, source.split, remarks_on_targets(log, split, filter_seen=True))))
    if all(result["split"][f"{part}_users"] for part in ("train", "valid", "test")):
        say(f"next: python cli.py study --data {shlex.quote(path)}{options.typed(log_options, *log_options)}")
    else:
        say("too small to study: no user to train on, or none to test; filter less, or take a larger log")


def description(result, split, remarks):
    """Return what describe found, as lines of text; split: its name; remarks: those on its targets."""

    def share(number, of):
        return f"{number:,} ({number / of:.1%})" if number else "none"

    lengths, repeats, times, study = (result[part] for part in ("history_lengths", "repeats", "time", "study"))
    n, names = result["interactions"], {"0": "min", "50": "median", "100": "max", "mean": "mean"}
    lines = [
        ("log", f"{counted(result)}; {100 * result['density']:.3g} % of all pairs"),
        ("histories", "".join(f"{names.get(q, q + ' %'):>9}" for q in lengths)),
        ("", "".join(f"{round(length, 1):>9,}" for length in lengths.values())),
        ("repeats", f"{share(repeats['seen_before'], n)} of an item that the user had before"),
        ("", f"{share(repeats['immediate'], n)} directly after the same item"),
    ]
    if times:
        lines.append(("time", f"{share(times['ties'], n)} at the same time as the user's last"))
    else:
        lines.append(("time", "no timestamps: each user's interactions are in the file's order"))
    users = [f"{result['split'][f'{part}_users']:,} users" for part in ("train", "valid", "test")]
    lines.append((split, "{} to train on, {} for validation, {} for the test".format(*users)))
    lines += [("", remark) for remark in remarks]
    lines += [(f"{k}-core", counted(core)) for k, core in result["k_core"].items()]
    chosen = " ".join(f"{options.flag(name)} {value}" for name, value in study.items())
    lines.append(("study", f"will use {chosen}; give the same to train"))
    return [f"{title:<15}{text}" for title, text in lines]
