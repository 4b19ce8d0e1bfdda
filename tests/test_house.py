"""The house: who may import whom, which library lives where, how large it may grow, and what its texts say."""

import ast
import io
import re
import shlex
import subprocess
import sys
import tokenize

import click
import pytest
from helpers import ROOT

import minirec
from minirec.cli import main

PACKAGE = ROOT / "minirec"
MODULES = sorted(PACKAGE.rglob("*.py"))
CORE_LINES = 850  # of code, all core files together
CORE_FILE_LINES = 260  # of one core file, derivations included
LINES = 5750  # of code, the whole package and cli.py, but for what serves a GPU alone
GPU_LINES = 280  # of code, what serves a GPU alone

# What each wing may import of ours, besides itself. A flat file may import those that stand before it.
FLAT = ["plain", "errors", "gpu", "backend", "ops", "packing", "attention", "loss", "parameters", "optimizer"]
FLAT += ["kernels", "model", "decompose"]
GPU = ["gpu", "kernels"]
CORE = [module for module in FLAT if module not in GPU]  # what there is to read to understand the model
DATA = ["errors", "files", "packing.spans"]
TRAINING = [*FLAT, "files", "data", "__version__"]
STUDIES = [*TRAINING, "training"]
WALLS = {
    "data": DATA,
    "training": TRAINING,
    "studies": STUDIES,
    "lesson": [*FLAT, "files", "data.planted", "training.ranking"],
    "report": [*STUDIES, "studies"],
    "cli": [*STUDIES, "studies", "lesson", "report"],
}
# Where else than in these files, or wings, a library is not imported; and whether a file may do so at its top.
LIBRARIES = {
    "cupy": ["gpu"],
    "click": ["cli"],
    "threadpoolctl": ["training.parallel"],
    "multiprocessing": ["training.parallel", "studies.grid"],
    "concurrent": ["training.parallel"],
    "mpi4py": ["training.mpi", "studies.grid"],
    "scipy": ["studies", "report"],
    "matplotlib": ["studies", "report"],
    "socket": ["data.public"],
    "urllib": ["data.public"],
    "http": ["data.public"],
    "pandas": ["data.read"],
    "torch": [],
}
HEAVY = ("cupy", "mpi4py", "matplotlib", "scipy", "pandas", "torch")  # never at the top of a file


def dotted(path):
    """The name of a module as others import it: data.log for minirec/data/log.py, data for minirec/data/__init__.py."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def within(name, names):
    """Whether a dotted name is one of some names, or lies in one of them."""
    return any(f"{name}.".startswith(f"{known}.") for known in names)


def imports(source, at_top=False):
    """The dotted names that Python source imports: anywhere, or only those that importing it imports as well."""
    nodes = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        if not (at_top and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = ["minirec"] * node.level + [node.module] * bool(node.module)
            yield from (".".join([*parts, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield ast.literal_eval(node.args[0])  # a name that is computed cannot be checked, and fails here


def over_the_walls(module, source):
    """Of the names that a module imports, those of ours, and of libraries, that are not for it."""
    if module == "plain":  # its main() trains on a dataset, which nothing that imports plain needs
        source = source.split("\ndef main():")[0]
    wing = module.split(".")[0]
    allowed = [*WALLS[wing], wing] if wing in WALLS else FLAT[: FLAT.index(module)] if module in FLAT else ["errors"]
    for name in imports(source):
        top, _, rest = name.partition(".")
        if top in ("minirec", "cli", "tests", "helpers", "conftest"):
            if top != "minirec" or not within(rest, allowed):
                yield name
        elif top in LIBRARIES and not within(module, LIBRARIES[top]):
            yield name


def code_lines(path):
    """Lines that hold code: neither blank, nor comment, nor docstring."""
    source = path.read_text()
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len([n for n in lines if n <= len(source.splitlines())])


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_no_module_imports_over_the_walls(path):
    if dotted(path) not in ("minirec", "__main__", "__init__"):  # the front, which imports when it is asked
        assert list(over_the_walls(dotted(path), path.read_text())) == []


@pytest.mark.parametrize(
    "module, line",
    [
        ("ops", "from minirec import model"),
        ("ops", "from minirec import backend, model"),
        ("ops", "import numpy, minirec.model as m"),
        ("ops", "from . import model"),
        ("ops", "from .model import forward"),
        ("ops", "def f():\n    from minirec.model import forward"),
        ("ops", "class C:\n    def f(self):\n        if self:\n            import minirec.model"),
        ("ops", "importlib.import_module('minirec.model')"),
        ("ops", "__import__('minirec.model')"),
        ("ops", "from minirec import *"),
        ("ops", "import minirec"),
        ("ops", "import minirec.ops"),
        ("ops", "import cli"),
        ("ops", "from tests.helpers import ROOT"),
        ("ops", "import cupy"),
        ("ops", "from minirec.data.log import Log"),
        ("files", "from minirec.packing import spans"),
        ("data.log", "from minirec.packing import pack"),
        ("data.log", "from minirec.training import runs"),
        ("data.log", "import pandas"),
        ("training.ranking", "from minirec.studies import statistics"),
        ("training.ranking", "from scipy import stats"),
        ("training.fit", "import threadpoolctl"),
        ("training.fit", "from click import echo"),
        ("studies.grid", "from minirec.report import page"),
        ("lesson.trace", "from minirec.training.fit import fit"),
        ("lesson.trace", "from minirec.data.log import Log"),
        ("report.page", "from minirec.cli import main"),
        ("cli.train", "import matplotlib.figure"),
        ("cli.train", "import urllib.request"),
    ],
)
def test_an_import_over_a_wall_is_seen(module, line):
    assert len(list(over_the_walls(module, line))) == 1


@pytest.mark.parametrize(
    "module, line",
    [
        ("ops", "import numpy as np"),
        ("ops", "from minirec.backend import load"),
        ("ops", "from .errors import UserError"),
        ("gpu", "import cupy"),
        ("data.log", "from minirec.packing import spans"),
        ("data.log", "from minirec.data.times import EPOCH"),
        ("training.fit", "from minirec import backend, files"),
        ("studies.plots", "from matplotlib.figure import Figure"),
        ("cli.train", "from minirec.training.fit import fit"),
    ],
)
def test_an_import_within_the_walls_is_let_through(module, line):
    assert list(over_the_walls(module, line)) == []


def test_the_course_names_every_module():
    """In the package's docstring, which is where a reader starts."""
    course = minirec.__doc__.split("in this order:")[1].strip(" .\n").replace("\n", " ").split(", ")
    assert sorted(course) == sorted(dotted(path) for path in MODULES if not path.stem.startswith("__"))
    assert [name for name in course if "." not in name and name != "files"] == FLAT


def test_a_module_imports_only_what_stands_before_it_in_the_course():
    course = minirec.__doc__.split("in this order:")[1].strip(" .\n").replace("\n", " ").split(", ")
    for module in course:
        source = (PACKAGE / f"{module.replace('.', '/')}.py").read_text().split("\ndef main():")[0]
        ours = [name.removeprefix("minirec.") for name in imports(source) if name.startswith("minirec.")]
        later = [name for name in course[course.index(module) :] if any(within(our, [name]) for our in ours)]
        assert later == [], module


def test_the_package_stays_under_its_limits():
    sizes = {dotted(path): code_lines(path) for path in MODULES}
    door = code_lines(ROOT / "cli.py")
    core = {module: sizes[module] for module in CORE}
    print(sizes, sum(core.values()), sum(sizes.values()) + door)
    gpu = sum(sizes[module] for module in GPU)
    assert sum(core.values()) < CORE_LINES and sum(sizes.values()) + door - gpu < LINES and door < 15
    assert gpu < GPU_LINES
    for module in CORE:
        assert len((PACKAGE / f"{module}.py").read_text().splitlines()) <= CORE_FILE_LINES, module


def readme_blocks(language):
    """The fenced blocks of the README in one language."""
    return [part.split("\n```")[0] for part in (ROOT / "README.md").read_text().split(f"```{language}\n")[1:]]


def test_the_readme_quotes_the_source_as_it_is():
    sources = "".join(path.read_text() for path in MODULES)
    quotes = [block for block in readme_blocks("python") if block.startswith("    ")]
    assert len(quotes) == 2
    for quote in quotes:
        assert quote in sources


def test_the_readme_example_runs():
    pytest.importorskip("matplotlib")
    (example,) = (block for block in readme_blocks("python") if not block.startswith("    "))
    names = {}
    exec(example, names)  # our own words, in this repository
    assert len(example.splitlines()) <= 14 and len(names["best"]) == 5 and 0 < names["substituted"] < 1
    assert names["figure"].axes and names["comparison"]


def test_the_readme_opens_with_two_commands_of_one_line():
    assert [len(block.splitlines()) for block in readme_blocks("bash")[:2]] == [1, 1]


TEXTS = ("README.md", "datasets/README.md", "datasets/results/README.md", "tests/benchmarks/README.md")
OUR_TEXTS = "\n".join((ROOT / name).read_text() for name in TEXTS)


def test_every_command_that_our_texts_quote_is_one_that_the_command_line_takes(monkeypatch):
    commands = re.findall(r"python cli\.py ?([^`#&|\n]*?)(?:  |[`#&|\n])", OUR_TEXTS)
    assert len(commands) > 15
    for line in commands:
        rest = [word for word in shlex.split(line) if word not in ("...", "--help")]
        context = main.make_context("cli.py", list(rest))
        while isinstance(context.command, click.Group) and rest:  # parses and checks; runs nothing
            name, command, rest = context.command.resolve_command(context, rest)
            context = command.make_context(name, list(rest), parent=context)
            rest = rest if isinstance(command, click.Group) else []


def test_wherever_mpiexec_is_named_the_option_for_more_processes_than_cores_is_named_too(monkeypatch):
    texts = [command.help for command in main.commands.values()] + [(ROOT / name).read_text() for name in TEXTS]
    naming = [text for text in texts if "mpiexec -n" in text]
    assert len(naming) == 3 and all("mpiexec --oversubscribe" in text for text in naming)


def test_every_benchmark_that_our_texts_quote_takes_these_options():
    scripts = {path.stem: path.read_text() for path in (ROOT / "tests/benchmarks").glob("*.py")}
    found = re.findall(rf"`(?:python tests/benchmarks/)?({'|'.join(scripts)})\.py( [^`]*)?`", OUR_TEXTS)
    assert {"training", "inference", "growth"} <= {name for name, _ in found}
    for name, options in found:
        for option in re.findall(r"--[\w-]+", options):
            assert f'"{option}"' in scripts[name], f"{name}.py {option}"


@pytest.mark.parametrize("path", [*MODULES, ROOT / "cli.py"], ids=lambda path: path.stem)
def test_heavy_libraries_are_imported_inside_functions(path):
    assert not {name.split(".")[0] for name in imports(path.read_text(), at_top=True)} & set(HEAVY)


@pytest.mark.parametrize(
    "line", ["import cupy", "from scipy import stats", "try:\n    import mpi4py.MPI\nexcept E:\n    pass"]
)
def test_a_heavy_import_at_the_top_is_seen(line):
    assert {name.split(".")[0] for name in imports(line, at_top=True)} & set(HEAVY)
    inside = "def f():\n    " + line.replace("\n", "\n    ")
    assert not list(imports(inside, at_top=True)) and list(imports(inside))


def test_heavy_libraries_are_not_imported_unasked():
    code = f"import sys, cli; print([m for m in {HEAVY} if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout.strip() == "[]", process.stderr
