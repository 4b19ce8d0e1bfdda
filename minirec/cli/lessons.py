"""For those who learn: `gradcheck`, `trace`."""

import re

import click

from minirec.attention import known_weightings
from minirec.backend import load as load_backend
from minirec.cli.common import Command, backend_option, progress
from minirec.errors import UserError
from minirec.lesson import gradcheck as checking
from minirec.lesson import trace as tracing


@click.command(cls=Command)
@click.option("--attn", type=click.Choice(known_weightings()), help="One weighting [default: all].")
@backend_option
def gradcheck(attn, backend):
    """Are the hand-derived gradients right? Central differences tell.

    First every operation alone, then every parameter of a small model, in the order of the backward pass. Each number
    is max |difference| / max |gradient|. A gradient that is zero by construction is checked absolutely, and marked
    0+. If one is off, the first one is named: it is the one to mend. On a GPU some entries of each are checked.

    \b
    python cli.py gradcheck --attn softmax
    """
    weightings = (attn,) if attn else known_weightings()
    xp = load_backend(backend)
    operations, parameters = {}, {}
    with progress("checking", 2 * len(weightings)) as update:
        for weighting in weightings:  # only attention differs from weighting to weighting
            operations |= {
                (operation, name): error for operation, name, error in checking.check_operations(weighting, xp)
            }
            update(1)
        for weighting in weightings:
            for name, error, relative in checking.check(weighting, xp):
                parameters.setdefault(name, []).append((error, relative))
            update(1)
    click.echo(f"{'operation':<32}{'gradient':>14}{'off by':>14}")
    names = [operation.split(",")[0] for operation, _ in operations]
    for operation, name in sorted(operations, key=lambda key: names.index(key[0].split(",")[0])):
        click.echo(f"{operation:<32}{name:>14}{operations[operation, name]:14.1e}")
    click.echo(f"\n{'parameter':<32}" + "".join(f"{w:>14}" for w in weightings))
    block = None
    for name, cells in parameters.items():
        if (found := re.match(r"blocks\.(\d+)\.", name)) and found[1] != block:
            block = found[1]
            click.echo(f"block {block}")
        short = name.removeprefix(f"blocks.{block}.")
        title = short if short == name else f"  {short}"
        click.echo(f"{title:<32}" + "".join(f"{'' if relative else '0+':>5}{error:9.1e}" for error, relative in cells))
    named = [(*key, error) for key, error in operations.items()]
    largest = [(name, max(error for error, _ in cells)) for name, cells in parameters.items()]
    if fault := checking.first_fault(named, largest):
        raise UserError(fault)
    worst = max(error for *_, error in [*named, *largest])
    sampled = "" if backend == "numpy" else f"; of each array, {checking.SAMPLED} entries were checked"
    click.echo(f"\nall below {checking.TOLERANCE:.0e}; the largest is {worst:.1e}{sampled}")


@click.command(cls=Command)
@click.option("--attn", type=click.Choice(known_weightings()), default="softmax")
@click.option("--seed", type=click.IntRange(min=0), default=tracing.SEED, help="Of the parameters.")
def trace(attn, seed):
    """What does the model compute? Every number of one tiny step.

    To be read beside the code: three users, D = 4, two heads, one block; the forward, all gradients beside
    central differences, the same parameters under other attention weightings, and one position taken apart.

    \b
    python cli.py trace | less
    python cli.py trace --attn uniform
    """
    for step in tracing.steps(attn, seed):
        click.echo("\n".join(tracing.lines(step)))
