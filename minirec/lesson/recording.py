"""The recording: every value that the core's functions bind or write while one tiny example runs.

Nothing here computes the model a second time. Python's trace hook follows the functions of the core line by line. The
source says which names a line writes (`statements`); when the line is done, their values are copied. The page and the
printed walk both show what is recorded here, so neither can differ from what the model did.

The example: three users; one block, for a second would show the same lines again; no dropout; float64; larger weights
than in training, so that there is something to see.
"""

import ast
import contextlib
import inspect
import itertools
import linecache
import sys
from functools import cache, wraps
from typing import NamedTuple

import numpy as np

from minirec import attention, backend, decompose, loss, model, ops, optimizer, packing, parameters, plain

SEQUENCES = [np.array(s) for s in ([3, 1, 4, 1, 5], [2, 0, 3], [5, 2, 0, 4])]  # inputs are s[:-1], targets s[1:]
STD = 0.5  # of the parameters
SEED = 9  # with it, no relu unit is always off, and gradients are large enough to follow
CORE = (plain, backend, ops, packing, attention, loss, parameters, model, optimizer, decompose)  # in reading order
FILES = {module.__file__: module for module in CORE}


# What a line writes


class Statement(NamedTuple):
    """A statement of a function: compound ones without their body."""

    start: int  # its first line
    stop: int  # its last line
    targets: tuple  # what it writes, as nodes of the syntax tree
    returns: bool
    loop: range | None  # the lines of a for loop's body: its targets are written only where one of them follows


def targets_of(node):
    """Yield what a statement writes: assigned names, subscripts, `out=`, and what `append` and `add.at` change."""
    written = getattr(node, "targets", [getattr(node, "target", None)]) if not isinstance(node, ast.Delete) else []
    written = [*written, *(item.optional_vars for item in getattr(node, "items", ()))]
    body = [part for name in ("body", "orelse", "finalbody") for part in getattr(node, name, [])]
    waiting = [part for part in ast.iter_child_nodes(node) if part not in body]
    while waiting:
        part = waiting.pop()
        if isinstance(part, (ast.Lambda, ast.GeneratorExp, ast.ListComp, ast.DictComp, ast.SetComp)):
            continue  # their names are not the function's
        waiting += ast.iter_child_nodes(part)
        if isinstance(part, ast.NamedExpr):
            written.append(part.target)
        elif isinstance(part, ast.Call):
            written += [keyword.value for keyword in part.keywords if keyword.arg == "out"]
            name = getattr(part.func, "attr", None)
            written += [part.args[0]] if name == "at" else [part.func.value] if name == "append" else []
    while written:
        part = written.pop(0)
        if isinstance(part, (ast.Tuple, ast.List)):
            written[:0] = part.elts
        elif isinstance(part, ast.Starred):
            written.insert(0, part.value)
        elif part is not None:
            yield part


@cache
def statements(module):
    """Return {line: Statement} of the lines of all functions of a module."""
    lines, tree = {}, ast.parse(inspect.getsource(module))
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        for node in ast.walk(function):  # outer statements come first, so the innermost one remains
            if isinstance(node, ast.stmt) and node is not function:
                stop = node.body[0].lineno - 1 if getattr(node, "body", None) else node.end_lineno
                targets = () if isinstance(node, ast.FunctionDef) else tuple(targets_of(node))
                loop = range(node.body[0].lineno, node.end_lineno + 1) if isinstance(node, ast.For) else None
                found = Statement(node.lineno, max(stop, node.lineno), targets, isinstance(node, ast.Return), loop)
                lines |= dict.fromkeys(range(found.start, found.stop + 1), found)
    return lines


def resolve(node, frame):
    """Return name and value of a target: c["q"] of a dict or list, the whole array where a part of it is written."""
    if isinstance(node, ast.Name):
        return node.id, frame.f_locals.get(node.id)
    view = isinstance(node, ast.Call)  # x.reshape(...)[...] writes into x
    name, value = resolve(node.func.value if view else node.value, frame)
    if isinstance(node, ast.Subscript) and isinstance(value, (dict, list)):
        key = eval(compile(ast.Expression(node.slice), "<key>", "eval"), frame.f_globals, frame.f_locals)
        if not isinstance(key, slice):
            return f"{name}[{key!r}]".replace("'", '"'), value[key]
    return name, value


def snapshot(value):
    """Return a value of which the arrays, also those within dicts, lists and tuples, are copies."""
    if isinstance(value, dict):
        return {name: snapshot(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = map(snapshot, value)
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value.copy() if isinstance(value, np.ndarray) else value


def parts_of(value):
    """Return the parts of a dict, list or tuple as a dict: by name, or by number."""
    names = getattr(value, "_fields", range(len(value)))
    return value if isinstance(value, dict) else dict(zip(names, value, strict=True))


def arrays_in(value, name):
    """Yield (name, array) of all arrays in nests of dicts, lists and tuples."""
    if isinstance(value, np.ndarray):
        yield name, value
    elif isinstance(value, (dict, list, tuple)):
        for key, part in parts_of(value).items():
            inner = f".{key}" if hasattr(value, "_fields") else f"[{key!r}]".replace("'", '"')
            yield from arrays_in(part, name + inner)


# The recorder


class Event(NamedTuple):
    """One name written: its value as the line left it."""

    call: object
    line: int
    name: str  # "return" for what the function returns; an argument's line is that of the def
    value: object


class Call:
    """One call of a function of the core."""

    def __init__(self, module, code, caller, line):
        self.module, self.function = module, code.co_qualname
        defines = lambda n: linecache.getline(code.co_filename, n).lstrip().startswith("def ")
        self.start = next(filter(defines, itertools.count(code.co_firstlineno)))  # past its mark @fused
        self.caller, self.line = caller, line  # the call that it was made by, and in which line of it
        self.arguments, self.returned, self.events, self.forward = {}, None, [], None

    def partner(self, calls):
        """Return the call that this one is the backward of: the latest that left its cache, or has its names."""
        for call in reversed(calls):
            if (call.module, call.function) == (self.module, self.function.removesuffix("_backward")):
                texts = [n for n, v in call.arguments.items() if isinstance(v, str) and n in self.arguments]
                left = call.returned[1] if isinstance(call.returned, tuple) else None
                if all(self.arguments[n] == call.arguments[n] for n in texts):
                    if "cache" not in self.arguments or left is self.arguments["cache"]:
                        return call
        return None


@contextlib.contextmanager
def unwritten_is_nan():
    """Let new arrays that NumPy leaves unwritten hold NaN instead of what happens to lie in memory."""
    before, nothing = (np.empty, np.empty_like), {"f": np.nan}  # of whole numbers: 0

    def blank(make):
        fill = lambda array: (array, array.fill(nothing.get(array.dtype.kind, 0)))[0]
        return wraps(make)(lambda *arguments, **options: fill(make(*arguments, **options)))

    np.empty, np.empty_like = map(blank, before)
    try:
        yield
    finally:
        np.empty, np.empty_like = before


def record(run):
    """Run a function without arguments; return the Events, in order. The tracer that was there before is put back."""
    calls, events, active = [], [], {}

    def keep(call, line, name, value):
        call.events.append(Event(call, line, name, snapshot(value)))
        events.append(call.events[-1])

    def enter(frame, event, _):
        module, code = FILES.get(frame.f_code.co_filename), frame.f_code
        if module is None or code.co_name.startswith("<"):
            return None
        above = frame.f_back
        while above and above not in active:
            above = above.f_back
        call = Call(module, code, active.get(above), above.f_lineno if above else 0)
        call.arguments = dict(frame.f_locals)
        if call.function.endswith("_backward"):
            call.forward = call.partner(calls)
        active[frame] = call
        calls.append(call)
        for name, value in call.arguments.items():
            keep(call, call.start, name, value)
        lines, running = statements(module), None

        def inside(frame, event, value):
            nonlocal running
            now = lines.get(frame.f_lineno) if event == "line" else None
            if event in ("line", "return") and now is not running:
                written = running and (running.loop is None or (event == "line" and frame.f_lineno in running.loop))
                for target in running.targets if written else ():
                    keep(call, running.start, *resolve(target, frame))
                if event == "return":
                    call.returned = value
                    if running and running.returns:
                        keep(call, running.start, "return", value)
                    del active[frame]
                running = now
            return inside

        return inside

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        with unwritten_is_nan():
            run()
    finally:
        sys.settrace(before)
    return events


# The example


def example(attn="softmax", seed=SEED):
    """Return the config and the parameters (float64, N(0, 0.5), gammas around 1) that the lesson runs on."""
    config = model.Config(n_items=6, hidden_size=4, n_blocks=1, n_heads=2, max_length=4, dropout=0, attn=attn)
    rng = np.random.default_rng(seed)
    parameters = model.init_parameters(config, seed, np.float64)
    for name, value in parameters.items():
        value[...] = rng.normal(1 if name.endswith("gamma") else 0, STD, value.shape)
    return config, parameters
