"""The order of the house: imports point up the reading order, the core stays small, heavy libraries stay out."""

import ast
import io
import subprocess
import sys
import tokenize

from conftest import ROOT

import minirec

PACKAGE = ROOT / "minirec"
CORE = ("backend", "ops", "attention", "loss", "model", "optimizer")
CORE_LINES = 600


def reading_order():
    """The modules as the package's docstring lists them."""
    return minirec.__doc__.split("in this order:")[1].strip(" .\n").replace("\n", " ").split(", ")


def imported(path):
    """The minirec modules that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "minirec":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minirec."):
            yield node.module.split(".")[1]


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


def test_imports_point_up_the_reading_order():
    order = reading_order()
    assert sorted([*order, "__init__"]) == sorted(path.stem for path in PACKAGE.glob("*.py"))
    for place, module in enumerate(order):
        for other in imported(PACKAGE / f"{module}.py"):
            assert order.index(other) < place, f"{module} imports {other}, which is read later"


def test_the_core_stays_under_its_limit():
    sizes = {module: code_lines(PACKAGE / f"{module}.py") for module in CORE}
    print(sizes, sum(sizes.values()))
    assert sum(sizes.values()) < CORE_LINES


def readme_blocks(language):
    """The fenced blocks of the README in one language."""
    return [part.split("\n```")[0] for part in (ROOT / "README.md").read_text().split(f"```{language}\n")[1:]]


def test_the_readme_quotes_the_source_as_it_is():
    sources = "".join(path.read_text() for path in PACKAGE.glob("*.py"))
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


def test_only_backend_imports_cupy():
    for path in (*PACKAGE.glob("*.py"), ROOT / "cli.py"):
        assert path.stem == "backend" or "import cupy" not in path.read_text(), path


def test_heavy_libraries_are_not_imported_unasked():
    code = "import sys, cli; print([m for m in ('cupy', 'mpi4py', 'matplotlib', 'scipy', 'torch') if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout.strip() == "[]", process.stderr
