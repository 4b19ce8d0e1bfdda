"""`study`: the grid of runs, its progress, its tables and figures."""

import shutil

import click

from minirec import files
from minirec.cli import options
from minirec.cli.common import INTERRUPTED, Command, load_log, on_terminal, one_line, say, say_json
from minirec.data import planted
from minirec.errors import UserError
from minirec.studies import grid, plots
from minirec.studies.results import text_table
from minirec.training import runs


@click.command(cls=Command)
@click.option("--data", metavar="FILE", multiple=True, help="A log; may be repeated [default: the embedded logs].")
@options.log
@click.option(
    "--attn", type=options.WEIGHTING, multiple=True, help="Beside softmax and uniform; may be repeated [default: all]."
)
@click.option("--seeds", type=click.IntRange(1, 1000), default=3, help="Runs of each weighting.")
@click.option("--epochs", type=options.COUNT, help="The most epochs of a run [default: 200].")
@click.option("--patience", type=options.COUNT, help="Epochs without a gain that end a run [default: 10].")
@click.option("--lr", type=options.RATE, help="Learning rate [default: 0.001].")
@click.option(
    "--max-length", type=options.SIZE, help="Latest items kept [default: 200 where histories are long, else 50]."
)
@click.option("--dropout", type=options.SHARE, help="Share of values dropped [default: 0.2 for dense logs, else 0.5].")
@options.backend
@options.filter_seen(True)
@click.option("--workers", type=options.COUNT, help="Runs at a time [default: all usable cores]; on a GPU, one.")
@click.option("--figures", type=click.Choice(["png", "pdf", "svg"]), default="png", help="The format of the figures.")
@click.option("--out", type=options.PATH, help="The folder [default: runs/study, or runs/study-LOG].")
@options.as_json
def study(data, attn, out, figures, as_json, **chosen):
    """Is learned attention needed on this data? The verdict.

    Trains a grid of runs, every attention weighting with the same seeds, and measures how much the trained models mix
    positions. Then it names the regime of each log, with statistics and figures: preserving (little is mixed), mixing
    without reliance (an average would do) or mixing with reliance (learned weights gain). Started again, it goes on
    where it was stopped. The embedded logs have settings of their own, with which they train in minutes.

    \b
    python cli.py study
    python cli.py study --data ratings.csv --seeds 5
    mpiexec -n 5 python cli.py study      one process directs four runs at a time, on one machine or several

    Open MPI starts more processes than there are cores only with mpiexec --oversubscribe.
    """
    for name in () if data else planted.DATASETS:
        if not runs.is_planted(name):
            raise UserError(f"{name} is a file here: study it with --data {name}, or the embedded {name} elsewhere")
    out = out or runs.RUNS / "-".join(["study", *map(runs.log_name, data)])[: files.LONGEST_NAME]
    try:
        shown = {"read": load_log, "say": tell, "show": show if on_terminal() else None}
        results = grid.study(data or list(planted.DATASETS), attn, folder=out, **shown, **chosen)
    except KeyboardInterrupt:
        say("\nstopped; the same command goes on from here")
        raise click.exceptions.Exit(INTERRUPTED) from None
    if results is None:  # another rank shows them
        raise click.exceptions.Exit
    if as_json:
        say_json({"datasets": results})
    else:
        click.echo("\n".join(text_table(name, result) for name, result in results.items()))
        click.echo("\n".join(["", *(result["verdict"] for result in results.values())]))
    written = ["study.json", "study.csv"]
    try:
        for name, figure in plots.study_figures(results, files.read_json(out / "study.json")["datasets"]).items():
            plots.write(figure, out / f"{name}.{figures}")
            written.append(f"{name}.{figures}")
    except ImportError:
        say("no figures: they need matplotlib; pip install matplotlib")
    say(f"wrote {out}: {', '.join(written)}")
    if len(results) < max(len(data), 1) or any(len(result["seeds"]) < chosen["seeds"] for result in results.values()):
        raise UserError("some runs failed (see above); the same command tries them again")


def show(text):
    """Write over the last line of the terminal, cut to its width."""
    width = shutil.get_terminal_size().columns - 1
    click.echo("\r" + one_line(text)[:width].ljust(width) + "\r", err=True, nl=False)


def tell(line):
    """Say a line; on a terminal in the place of what show wrote."""
    if on_terminal():
        show("")
    say(one_line(line))
