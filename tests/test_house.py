"""The order of the house: imports point up the reading order, the core stays small, heavy libraries stay out."""

import ast
import importlib
import io
import re
import shlex
import subprocess
import sys
import tokenize

import click
import pytest
from conftest import ROOT

import minirec

PACKAGE = ROOT / "minirec"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.stem != "__init__")
CORE = (
    "plain",
    "errors",
    "backend",
    "ops",
    "packing",
    "attention",
    "loss",
    "parameters",
    "model",
    "optimizer",
    "decompose",
)
CORE_LINES = 850  # of code, all files together
CORE_FILE_LINES = 260  # of one file, derivations included
HEAVY = ("cupy", "mpi4py", "matplotlib", "scipy", "torch")
OURS = ("minirec", "cli", "tests", "conftest")


def reading_order():
    """The modules as the package's docstring lists them."""
    return minirec.__doc__.split("in this order:")[1].strip(" .\n").replace("\n", " ").split(", ")


def dotted(path):
    """The name of a module in the reading order: data.log for minirec/data/log.py."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


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


def against_the_order(module, source):
    """Of the names that a module imports, ours that are not read before it; a cycle needs at least one."""
    order = reading_order()
    before = order[: order.index(module)] if module in order else []
    if module == "plain":  # its main() trains on a dataset, which nothing that imports plain needs
        source = source.split("\ndef main():")[0]
    for name in imports(source):
        ours, _, rest = name.partition(".")
        if ours in OURS and not (ours == "minirec" and any(f"{rest}.".startswith(f"{known}.") for known in before)):
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


def test_the_reading_order_names_every_module():
    assert sorted(reading_order()) == sorted(map(dotted, MODULES))


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_point_up_the_reading_order(path):
    assert list(against_the_order(dotted(path), path.read_text())) == [], f"{path} imports what is read later"


@pytest.mark.parametrize(
    "line",
    [
        "from minirec import model",
        "from minirec import backend, model",
        "from minirec.model import forward",
        "import minirec.model",
        "import numpy, minirec.model as m",
        "from . import model",
        "from .model import forward",
        "def f():\n    from minirec.model import forward",
        "class C:\n    def f(self):\n        if self:\n            import minirec.model",
        "importlib.import_module('minirec.model')",
        "__import__('minirec.model')",
        "from minirec import *",
        "import minirec",
        "import minirec.ops",
        "import cli",
        "from tests.conftest import ROOT",
    ],
)
def test_an_import_against_the_reading_order_is_seen(line):
    assert len(list(against_the_order("ops", line))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "import numpy as np",
        "from minirec.backend import load",
        "from .errors import UserError",
        "import minirec.errors",
    ],
)
def test_an_import_up_the_reading_order_is_let_through(line):
    assert list(against_the_order("ops", line)) == []


def test_the_core_stays_under_its_limit():
    sizes = {module: code_lines(PACKAGE / f"{module}.py") for module in CORE}
    print(sizes, sum(sizes.values()))
    assert sum(sizes.values()) < CORE_LINES
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
    (example,) = (block for block in readme_blocks("python") if not block.startswith("    "))
    names = {}
    exec(example, names)  # our own words, in this repository
    assert names["ratios"].shape == (6,) and len(names["representations"]) == 2


def test_the_readme_opens_with_two_commands_of_one_line():
    assert [len(block.splitlines()) for block in readme_blocks("bash")[:2]] == [1, 1]


OUR_TEXTS = "\n".join((ROOT / name).read_text() for name in ("README.md", "datasets/README.md"))


def test_every_command_that_our_texts_quote_is_one_that_the_command_line_takes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    main = importlib.import_module("cli").main
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
    monkeypatch.syspath_prepend(ROOT)
    main = importlib.import_module("cli").main
    texts = [command.help for command in main.commands.values()] + [(ROOT / "README.md").read_text()]
    naming = [text for text in texts if "mpiexec -n" in text]
    assert len(naming) == 3 and all("mpiexec --oversubscribe" in text for text in naming)


def test_every_benchmark_that_our_texts_quote_takes_these_options():
    scripts = {path.stem: path.read_text() for path in (ROOT / "tests/benchmarks").glob("*.py")}
    found = re.findall(rf"`(?:python tests/benchmarks/)?({'|'.join(scripts)})\.py( [^`]*)?`", OUR_TEXTS)
    assert {"training", "inference", "growth"} <= {name for name, _ in found}
    for name, options in found:
        for option in re.findall(r"--[\w-]+", options):
            assert f'"{option}"' in scripts[name], f"{name}.py {option}"


@pytest.mark.parametrize("path", [*MODULES, PACKAGE / "__init__.py", ROOT / "cli.py"], ids=lambda path: path.stem)
def test_heavy_libraries_are_imported_inside_functions_and_cupy_by_backend_alone(path):
    source = path.read_text()
    assert not {name.split(".")[0] for name in imports(source, at_top=True)} & set(HEAVY)
    assert path.stem == "backend" or "cupy" not in {name.split(".")[0] for name in imports(source)}


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
