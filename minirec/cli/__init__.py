"""The command line: options and printing, no maths."""

import signal
import warnings

import click

from minirec import __version__
from minirec.cli import data, inspect, lessons, study, train
from minirec.cli.common import PROGRAM, Commands, as_called, one_line, say
from minirec.training.mpi import launched_rank

THE_WAY = """\
python cli.py study                      is learned attention needed? four embedded logs, some minutes
python cli.py study --data ratings.csv   the same question, asked of your own log
python cli.py --help                     all commands; each has a --help of its own"""


@click.group(
    PROGRAM,
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True},
)
@click.version_option(__version__, prog_name="minirec")
@click.pass_context
def main(ctx):
    """SASRec in plain NumPy/CuPy: is learned attention weighting needed, on your data?

    \b
    python cli.py study                     the answer for the embedded logs, with figures
    python cli.py train                     one model, on an embedded log
    python cli.py evaluate --attn uniform   the same model with its attention replaced by an average
    python cli.py decompose                 how much does it mix positions?
    """
    if ctx.invoked_subcommand is None:
        click.echo(as_called(THE_WAY))
    warnings.simplefilter("ignore", RuntimeWarning)  # overflow and NaN are caught, and named, where they matter
    warnings.showwarning = lambda message, *_: say(one_line(message))
    if launched_rank() is None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # what batch systems send: as Ctrl-C
    if launched_rank() and ctx.invoked_subcommand not in ("train", "study"):
        ctx.exit()  # the first rank is enough for it


for command in (
    *(study.study, train.train),
    *(inspect.evaluate, inspect.decompose, inspect.recommend, inspect.report),
    *(lessons.lesson, lessons.exercise, lessons.gradcheck, lessons.trace, data.describe, data.fetch),
):  # in the order in which a newcomer meets them
    main.add_command(command)
