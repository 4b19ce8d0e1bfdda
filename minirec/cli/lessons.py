"""For those who learn: `lesson`, `exercise`, `gradcheck`, `trace`."""

import re
from pathlib import Path

import click

from minirec import files
from minirec.attention import known_weightings
from minirec.backend import load as load_backend
from minirec.cli import options
from minirec.cli.common import PROGRAM, Command, as_called, progress, say
from minirec.errors import UserError
from minirec.lesson import exercises, recording
from minirec.lesson import gradcheck as checking
from minirec.lesson import page as lesson_page
from minirec.lesson import trace as tracing

LARGEST = 1 << 20  # bytes of a student's file


@click.command(cls=Command)
@click.option("--attn", type=options.WEIGHTING, help="Check this weighting only [default: all].")
@options.backend
def gradcheck(attn, backend):
    """Are the hand-derived gradients right? Central differences tell.

    Checks every operation alone, then every parameter of a small model, in the order of the backward pass. Each number
    is max |difference| / max |gradient|. Where the gradient is zero by construction, marked 0+, it is the largest
    absolute value. If gradients are off, the first one is named: it is the one to mend. On a GPU some entries of each
    array are checked.

    \b
    python cli.py gradcheck --attn softmax
    """
    weightings = (attn,) if attn else known_weightings()
    xp = load_backend(backend)
    operations, parameters = {}, {}
    with progress("checking", 2 * len(weightings)) as update:
        for weighting in weightings:
            for operation, name, error in checking.check_operations(weighting, xp):
                rows = operations.setdefault(operation.split(",")[0], {})
                rows[operation, name] = error  # only that of attention differs from weighting to weighting
            update(1)
            for name, error, relative in checking.check(weighting, xp):
                parameters.setdefault(name, []).append((error, relative))
            update(1)
    click.echo(f"{'operation':<32}{'gradient':>14}{'off by':>14}")
    named = [(*key, error) for rows in operations.values() for key, error in rows.items()]
    for operation, name, error in named:
        click.echo(f"{operation:<32}{name:>14}{error:14.1e}")
    click.echo(f"\n{'parameter':<32}" + "".join(f"{w:>14}" for w in weightings))
    before = None
    for name, cells in parameters.items():
        block, short = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)", name).groups()
        if block != before and block:
            click.echo(f"block {block}")
        before = block
        title = f"  {short}" if block else short
        click.echo(f"{title:<32}" + "".join(f"{'' if relative else '0+':>5}{error:9.1e}" for error, relative in cells))
    largest = [(name, max(error for error, _ in cells)) for name, cells in parameters.items()]
    if fault := checking.first_fault(named, largest):
        raise UserError(fault)
    worst = max(error for *_, error in [*named, *largest])
    sampled = "" if backend == "numpy" else f"; of each array, {checking.SAMPLED} entries were checked"
    click.echo(f"\nall below {checking.TOLERANCE:.0e}; the largest is {worst:.1e}{sampled}")


@click.command(cls=Command)
@click.option("--attn", type=options.WEIGHTING, default="softmax", help="The attention weighting.")
@click.option("--seed", type=click.IntRange(min=0), default=recording.SEED, help="Seed of the parameters.")
def trace(attn, seed):
    """What does the model compute? Every number of one tiny step.

    Three users, D = 4, two heads, one block. It prints the parameters; each line of code that runs, forwards and
    backwards, with the numbers that it computes; all gradients beside central differences; the loss under each
    attention weighting; and how much each position mixes. The page that `lesson` writes shows the same.

    \b
    python cli.py trace | less
    python cli.py trace --attn uniform
    """
    for line in tracing.lines(attn, seed):
        click.echo(line)


@click.command(cls=Command)
@click.argument("name", required=False, metavar="[NAME]", type=click.Choice(list(exercises.CASES)))
@click.option("--check", type=options.PATH, metavar="FILE", help="Check the function in FILE.")
@click.option("--solution", is_flag=True, help="Print our function.")
def exercise(name, check, solution):
    """Can you write the hard parts? Thirteen functions to try.

    Without a NAME, they are listed. With one, NAME.py is written: what the function may use, what it must do, and its
    signature. --check runs your function in another process and compares it with central differences or with our
    function. It says which results are off and by what pattern, with a hint. The exit status is 1 until all is right.

    \b
    python cli.py exercise layer_norm_backward
    python cli.py exercise layer_norm_backward --check layer_norm_backward.py
    python cli.py exercise layer_norm_backward --solution
    """
    if check and solution:
        raise click.UsageError("--check and --solution: choose one of them.")
    if not name and (check or solution):
        raise click.UsageError("which exercise? Give its name.")
    if not name:
        for title, words in exercises.exercises().items():
            click.echo(f"{title:<28}minirec/{words.module.replace('.', '/')}.py")
        say(f"{PROGRAM} exercise NAME writes NAME.py, in which the function is to be written")
    elif solution:
        click.echo(exercises.source_of(name), nl=False)
    elif check:
        with files.opened(check, LARGEST):
            pass
        right, says = exercises.judge_apart(name, check)
        click.echo(says)
        if not right:
            raise click.exceptions.Exit(1)
    else:
        path = Path(f"{name}.py")
        if path.exists():
            raise UserError(f"{path}: stands here already, and is not overwritten; check it with --check {path}")
        text = as_called(exercises.text_of(name))
        files.replace(path, lambda file: file.write(text.encode()))
        say(f"wrote {path}; {PROGRAM} exercise {name} --check {path} says whether it is right")


@click.command(cls=Command)
@click.option("--out", type=options.FILE, default="lesson.html", help="The page.")
def lesson(out):
    """How does a transformer work, line by line? A page shows it.

    Writes one HTML file that needs no network. It shows the source and, beside each line, the numbers that the line
    computes in one tiny training step, forwards and backwards, under each attention weighting.

    \b
    python cli.py lesson
    """
    page = as_called(lesson_page.page().decode()).encode()
    files.write(out, lambda file: file.write(page))
    say(f"wrote {out}: {len(page) / 1e6:.2f} MB; open it in a browser")
