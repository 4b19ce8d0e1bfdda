"""Does any file make a reader fail otherwise than in one line?

    python tests/benchmarks/fuzz_readers.py [--seconds 600]

Logs, good and malformed, are mutated; whatever comes out must either be read to a Log that can be split and described,
or be refused by a UserError of one line that names the file.
The first byte of an input chooses the format and the columns that are asked for; the rest is the file.

Where atheris is installed (pip install atheris) mutations are guided by the lines of the readers that they reach,
else they are random.
"""

import importlib
import random
import sys
import tempfile
import time
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from test_data import MALFORMED, WELL_FORMED

from minirec.data import columns, read
from minirec.data.describe import describe
from minirec.data.split import leave_one_out
from minirec.errors import UserError

try:
    import atheris
except ImportError:
    atheris = None

ASKED = [(format, asked) for format in (None, *read.FORMATS) for asked in (None, "user,item", "1,2,3", "2,1")]
LONGEST = 4096
PATH = Path(tempfile.gettempdir()) / f"fuzz-{random.randrange(1 << 32)}.log"


def check(content):
    """Read a file of this content, in the way that its first byte chooses."""
    format, asked = ASKED[content[0] % len(ASKED)] if content else ASKED[0]
    PATH.write_bytes(content[1:])
    try:
        log = read.read_log(PATH, asked, format)
    except UserError as error:
        assert str(PATH) in str(error) and "\n" not in str(error), error
        return
    assert len(set(log.users)) == len(log.users) == len(log.offsets) - 1 and log.offsets[-1] == len(log.sequence)
    assert set(log.sequence.tolist()) == set(range(len(log.items))) and len(set(log.items)) == len(log.items)
    describe(log, leave_one_out(log))


def seeds():
    """Yield inputs to begin with."""
    texts = [text.encode() for text in WELL_FORMED.values()] + [case[0] for case in MALFORMED.values()]
    for text in texts:
        if len(text) < LONGEST:
            yield from (bytes([place]) + text for place in (0, 1, 6))


def mutated(content, other):
    """Return content with a few pieces dropped, doubled, replaced by chance, or taken from another input."""
    content = bytearray(content)
    for _ in range(random.randint(1, 4)):
        at, size = random.randrange(len(content) + 1), random.choice((0, 1, 1, 2, 8))
        start = random.randrange(len(other) + 1)
        new = (b"", bytes(content[at : at + size]) * 2, random.randbytes(size), other[start : start + 2 * size])
        content[at : at + size] = random.choice(new)
    return bytes(content[:LONGEST])


@click.command(help=__doc__.split("\n")[0])
@click.option("--seconds", type=click.IntRange(1), default=600, show_default=True)
def main(seconds):
    if atheris:
        with atheris.instrument_imports(include=["minirec.data.read", "minirec.data.columns"]):
            importlib.reload(columns)
            importlib.reload(read)
        folder = Path(tempfile.mkdtemp())
        for number, content in enumerate(seeds()):
            (folder / str(number)).write_bytes(content)
        limits = [f"-max_total_time={seconds}", f"-max_len={LONGEST}", "-print_final_stats=1", "-timeout=30"]
        atheris.Setup([sys.argv[0], *limits, str(folder)], check)
        atheris.Fuzz()  # does not return
    known, until, n = list(seeds()), time.monotonic() + seconds, 0
    while time.monotonic() < until:
        content = mutated(random.choice(known), random.choice(known))
        try:
            check(content)
        except BaseException:
            click.echo(f"failed on {content!r}")
            raise
        n += 1
    click.echo(f"{n:,} inputs in {seconds} s: each was read, or refused in one line")


if __name__ == "__main__":
    main()
