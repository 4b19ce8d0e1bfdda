"""The lesson as a page: the core's source, with what each line computes beside it, in one HTML file.

Nothing is written twice. The text is the docstrings and comments of the source, the code is the source, and the numbers
are those of the recording, under each weighting. lesson.html shows them.
"""

import ast
import contextlib
import html
import inspect
import io
import itertools
import keyword
import re
import textwrap
import tokenize
from collections import Counter
from importlib import resources
from types import FunctionType, ModuleType

import numpy as np

from minirec import decompose, errors, files, loss, model, ops, optimizer, parameters, plain
from minirec.attention import known_weightings
from minirec.lesson import gradcheck, recording
from minirec.lesson.exercises import exercises

CHAPTERS = (plain, errors, *recording.CORE[1:])
NAMES = [module.__name__.removeprefix("minirec.") for module in CHAPTERS]
INDENT = " " * 4  # what stands further to the right in a docstring is a derivation, or a table


# The text


def prose(text):
    """Return a docstring or comment as HTML: paragraphs, and what is indented as it stands."""
    out = ""
    for block in re.findall(rf"(?:{INDENT}.+\n+)+|(?:(?!{INDENT}).+\n)+", inspect.cleandoc(text) + "\n"):
        shown = html.escape(textwrap.dedent(block).rstrip(), quote=False)
        if not block.startswith(INDENT):
            shown = re.sub(r"`([^`]+)`", r"<code>\1</code>", shown)
            shown = re.sub(rf"\b({'|'.join(NAMES)})\.py\b", r'<a href="#\1">\1.py</a>', shown)
        out += f"<pre>{shown}</pre>" if block.startswith(INDENT) else f"<p>{shown}</p>"
    return out


def coloured(source):
    """Return the lines of a source as HTML: keywords, strings, comments, numbers and names in elements of their own.

    Lines within a docstring are left empty.
    """
    lines = source.splitlines()
    out, done = [""] * len(lines), Counter()  # done: {row: columns}
    kinds = {tokenize.COMMENT: "c", tokenize.NUMBER: "m", tokenize.STRING: "s", tokenize.NAME: "n"}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        (row, start), (last, stop) = token.start, token.end
        if token.string.strip() and row == last:
            kind = kinds.get(token.type, "s" if tokenize.tok_name[token.type].startswith("FSTRING") else "")
            kind = "k" if keyword.iskeyword(token.string) else kind
            blanks, text = lines[row - 1][done[row] : start], html.escape(lines[row - 1][start:stop], quote=False)
            out[row - 1] += blanks + (f'<span class="{kind}">{text}</span>' if kind else text)
            done[row] = stop
    return out


def line_of_code(place, n, code):
    """Return line n of a module as HTML, with room for its values; place: by what the page links to it."""
    indent = len(code) - len(code.lstrip())
    number = f'<a href="#{place}" tabindex="-1" aria-hidden="true">{n}</a>'
    shown = f'{number}<code>{code}</code><span class="values"></span>'
    return f'<div class="line" id="{place}" style="--indent: {indent}">{shown}</div>'


def chapter(module):
    """Return a module as HTML: each of its parts with its text on the left and its code on the right."""
    source, name = inspect.getsource(module), module.__name__.removeprefix("minirec.")
    tree, lines, code = ast.parse(source), source.splitlines(), coloured(source)
    asked = [(title, words.function) for title, words in exercises().items() if words.module == name]
    parts = [f'<section id="{name}"><h2>{name}.py</h2><div class="prose">{prose(ast.get_docstring(tree))}</div>']
    words = {n: line.strip().removeprefix("# ") for n, line in enumerate(lines, 1) if line.lstrip().startswith("#")}
    units = {}  # {line: the function or class that it belongs to}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            places = range(node.body[0].lineno, node.body[0].end_lineno + 1)
            words |= dict(itertools.zip_longest(places, ast.get_docstring(node).splitlines(), fillvalue=""))
    for above, node in itertools.pairwise(tree.body):
        unit = node if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else None  # imports and constants: together
        units |= dict.fromkeys(range(above.end_lineno + 1, node.end_lineno + 1), unit)
    for unit, numbers in itertools.groupby(sorted(units), units.get):
        rows = [[f"<h3>{unit.name}</h3>" if unit else "", ""]]
        written = (n for n in numbers if n in words or lines[n - 1].strip())
        for told, group in itertools.groupby(written, words.__contains__):
            if told and rows[-1][1] and not rows[-1][0].endswith("</h3>"):
                rows.append(["", ""])
            if told:
                rows[-1][0] += prose("\n".join(words[n] for n in group))
            else:
                rows[-1][1] += "".join(line_of_code(f"{name}-{n}", n, code[n - 1]) for n in group)
        for title in [title for title, function in asked if unit and unit.name == function]:
            command = f"python cli.py exercise {title}"
            rows[-1][0] += f'<p class="try">Write it yourself: <code>{command}</code></p>'
        function = f' data-function="{name}.{unit.name}"' if unit else ""
        body = "".join(f'<div class="text">{text}</div><div class="code">{shown}</div>' for text, shown in rows)
        parts.append(f'<article{function}><div class="calls"></div>{body}</article>')
    return "".join(parts) + "</section>"


# The numbers


def scenes(attn):
    """Run what is recorded: a step of the plain model and of the fast one, and what else the core has to show."""
    config, p = recording.example(attn)
    rng, sequences = np.random.default_rng(0), recording.SEQUENCES
    copies = {name: value.copy() for name, value in p.items()}
    moments = [{name: np.zeros_like(value) for name, value in p.items()} for _ in range(2)]
    with contextlib.suppress(KeyError):  # plain.py does not know a weighting that was registered from outside
        _, g = plain.loss_and_gradients(sequences[::-1], copies, config.n_heads, (attn,))  # L = 3 first: it is not D
        plain.adam_step(copies, g, *moments, step=1)
        plain.hit_rate(sequences, p, config.n_heads, (attn,), k=3)
    plain.init_parameters(6, 4, 1, 4)
    plain.draw_masks(3, 4, 2, 1, 0.5, rng)
    parameters.init_parameters(config, 0)
    _, gradients = model.loss_and_gradients(p, config, sequences)
    vectors = [np.concatenate([x.ravel() for x in part.values()]) for part in (p, gradients)]
    optimizer.adam_step(*vectors, *np.zeros((2, len(vectors[0]))), 1, 1e-3)
    x = np.concatenate(model.encode(p, config, [s[:-1] for s in sequences]))
    targets = np.concatenate([s[1:] for s in sequences])
    items, negatives = p["item_embedding"], rng.integers(6, size=len(x))
    loss.sampled_cross_entropy(x, items, targets, negatives[:3], 1 / len(x), np.zeros_like(items))
    loss.binary_cross_entropy(x, items, targets, negatives, 1 / len(x), np.zeros_like(items))
    ops.dropout_backward(x, ops.dropout(x, 0.5, rng)[1])
    model.attention_matrices(p, config, sequences[0])
    decompose.summarise(decompose.decompose(p, config, [s[:-1] for s in sequences]))
    decompose.contributions(p, config, sequences[0][:-1])


class Values:
    """A list of values ready for JSON, each once: arrays [shape, numbers], nests {kind, parts}, and else a text."""

    def __init__(self):
        self.list, self.known = [], {}

    def add(self, value):
        """Return the index of a value."""
        if isinstance(value, (int, float, np.ndarray, np.generic)) and not isinstance(value, bool):
            x = np.asarray(value)
            key, entry = (x.shape, x.dtype.str, x.tobytes()), lambda: [list(x.shape), [shown(v) for v in x.flat]]
        elif isinstance(value, (dict, list, tuple)):
            parts = [[str(name), self.add(part)] for name, part in recording.parts_of(value).items()]
            entry = {"kind": type(value).__name__, "parts": parts}
            key = repr(entry)
        else:
            entry = value.__name__ if isinstance(value, (ModuleType, FunctionType)) else str(value)
            key = entry = re.sub(r" at 0x\w+| object", "", entry)[:200]
        if key not in self.known:
            self.known[key] = len(self.list)
            self.list.append(entry() if callable(entry) else entry)
        return self.known[key]


def shown(number):
    """Return a number with four digits, ready for JSON."""
    if isinstance(number, (int, np.integer, np.bool_)):
        return int(number)
    return float(f"{number:.4g}") if np.isfinite(number) else str(number).replace("-", "\u2212")


def calls_of(recordings, values):
    """Return the calls, ready for JSON: those of several recordings are one where they were made at the same place.

    A call: [function, the call that made it, the line there, the call that it is the backward of (-1: none),
    {line: [[name, value, value of the second time, ...], ...]}]. A value: its index, or one a recording (-1: none).
    """
    written = {}  # {call: {line: {name: [values, a list for each recording]}}}
    for which, events in enumerate(recordings):
        for call, line, name, value in events:
            names = written.setdefault(call, {}).setdefault(line, {})
            names.setdefault(name, [[] for _ in recordings])[which].append(values.add(value))
    number = {None: -1} | {call: n for n, call in enumerate(written)}
    one = lambda entry: entry[0] if len(set(entry)) == 1 else list(entry)
    found = []
    for call, lines in written.items():
        function = f"{call.module.__name__.removeprefix('minirec.')}.{call.function}"
        found.append([function, number[call.caller], call.line, number[call.forward], {}])
        for line, names in lines.items():
            times = {name: itertools.zip_longest(*entries, fillvalue=-1) for name, entries in names.items()}
            found[-1][4][line] = [[name, *map(one, entries)] for name, entries in times.items()]
    return found


def gradients(values):
    """Return [name, gradient, central difference, off by] of each parameter, a list of one a weighting each."""
    rows = {}
    for attn in known_weightings():
        config, p = recording.example(attn)
        for name, gradient, numeric in gradcheck.gradients(p, config, recording.SEQUENCES):
            off = float(f"{np.abs(gradient - numeric).max():.0e}")
            row = rows.setdefault(name, ([], [], []))
            for part, value in zip(row, (values.add(gradient), values.add(numeric), off), strict=True):
                part.append(value)
    return [[name, *row] for name, row in rows.items()]


def describe():
    """Return what the page shows beside the source, ready for JSON."""
    values, weightings = Values(), known_weightings()
    return {
        "weightings": weightings,
        "calls": calls_of([recording.record(lambda attn=attn: scenes(attn)) for attn in weightings], values),
        "gradients": gradients(values),
        "exercises": [[name, words.function, words.asks] for name, words in exercises().items()],
        "values": values.list,  # filled by the lines above
    }


def page():
    """Return the page, as UTF-8."""
    template = resources.files("minirec.lesson").joinpath("lesson.html").read_text("utf-8")
    return files.self_contained(template.replace("CHAPTERS-HERE", "".join(map(chapter, CHAPTERS))), describe())
