"""The recording: every value that the core's functions bind or write while one tiny example runs.

Nothing here computes the model a second time. Python's trace hook follows the functions of the core line by line. The
source says which names a line writes (`targets`); when the line is done, their values are copied. The page and the
printed walk both show what is recorded here, so neither can differ from what the model did.

The example: three users; one block, for a second would show the same lines again; no dropout; float64; larger weights
than in training, so that there is something to see.
"""

import ast
import copy
import inspect
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import cache, wraps
from typing import NamedTuple

import numpy as np

from minirec import attention, backend, decompose, loss, model, ops, optimizer, packing, parameters, plain

SEQUENCES = [np.array(s) for s in ([3, 1, 4, 1, 5], [2, 0, 3], [5, 2, 0, 4])]  # inputs are s[:-1], targets s[1:]
STD = 0.5  # of the parameters
SEED = 9  # with it, no relu unit is always off, and gradients are large enough to follow
CORE = (plain, backend, ops, packing, attention, loss, parameters, optimizer, model, decompose)  # in reading order
FILES = {module.__file__: module for module in CORE}


# What a line writes


@cache
def statements(module):
    """Return {line: statement, as a node of the syntax tree} of all functions of a module, and of their defs."""
    lines, tree = {}, ast.parse(inspect.getsource(module))
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        for node in ast.walk(function):  # outer statements come first, so the innermost one remains
            if isinstance(node, ast.stmt):
                stop = max(node.body[0].lineno, node.lineno + 1) if hasattr(node, "body") else node.end_lineno + 1
                lines |= dict.fromkeys(range(node.lineno, stop), node)
    return lines


@cache
def targets(node):
    """Return what a statement writes: assigned names, subscripts, `out=`, and what `append` and `add.at` change."""
    written = []
    for target in filter(None, getattr(node, "targets", [getattr(node, "target", None)])):
        names = [part for part in ast.walk(target) if isinstance(part, (ast.Name, ast.Subscript))]
        written += [part for part in names if isinstance(part.ctx, ast.Store)]  # of x[i] neither x nor i
    for call in (part for part in ast.walk(node) if isinstance(part, ast.Call) and not hasattr(node, "body")):
        written += [keyword.value for keyword in call.keywords if keyword.arg == "out"]
        name = getattr(call.func, "attr", None)
        written += [call.args[0]] if name == "at" else [call.func.value] if name == "append" else []
    return written


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


@dataclass(unsafe_hash=True)
class Call:
    """One call of a function of the core. Calls of two recordings are equal where they were made at the same place."""

    module: object
    function: str
    start: int  # the line of its def
    caller: object  # the Call that it was made by
    line: int  # in which line of the caller
    time: int  # 1 for the first call of this function that the line makes, 2 for the second, ...
    arguments: dict = field(compare=False)
    returned: object = field(default=None, compare=False)
    forward: object = field(default=None, compare=False)  # the Call that this one is the backward of

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


class Event(NamedTuple):
    """One name written: its value as the line left it."""

    call: Call
    line: int
    name: str  # "return" for what the function returns; an argument's line is that of the def
    value: object


@wraps(np.empty)
def empty(shape, dtype=float):  # NaN instead of what happens to lie in memory; whole numbers have none
    return np.full(shape, np.nan if np.issubdtype(dtype, np.floating) else 0, dtype)


@wraps(np.empty_like)
def empty_like(array):
    return empty(array.shape, array.dtype)


def record(run):
    """Run a function without arguments; return the Events, in order. Tracer and NumPy are put back as they were."""
    calls, events, active, times = [], [], [], Counter()

    def keep(call, line, name, value):
        events.append(Event(call, line, name, copy.deepcopy(value, {id(np): np})))  # but for xp, which is no value

    def enter(frame, event, _):
        module, code = FILES.get(frame.f_code.co_filename), frame.f_code
        if module is None or code.co_name.startswith("<"):
            return None
        lines, running = statements(module), None
        start = min(line for line in lines if line >= code.co_firstlineno)  # past its mark @fused
        caller, line = (active[-1][0], active[-1][1].f_lineno) if active else (None, 0)
        place = module, code.co_qualname, start, caller, line
        times[place] += 1
        call = Call(*place, times[place], dict(frame.f_locals))
        if call.function.endswith("_backward"):
            call.forward = call.partner(calls)
        calls.append(call)
        active.append((call, frame))
        for name, value in call.arguments.items():
            keep(call, start, name, value)

        def inside(frame, event, value):
            nonlocal running
            following = lines.get(frame.f_lineno) if event == "line" else None
            if event in ("line", "return") and following is not running:
                ended = isinstance(running, ast.For) and following is not running.body[0]  # and wrote no target
                for target in targets(running) if running and not ended else ():
                    keep(call, running.lineno, *resolve(target, frame))
                if event == "return":
                    call.returned = value
                    if isinstance(running, ast.Return):
                        keep(call, running.lineno, "return", value)
                    active.pop()
                running = following
            return inside

        return inside

    before = sys.gettrace(), np.empty, np.empty_like
    np.empty, np.empty_like = empty, empty_like
    sys.settrace(enter)
    try:
        run()
    finally:
        sys.settrace(before[0])
        np.empty, np.empty_like = before[1:]
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


def mixing_arguments(config, p):
    """Return {name: argument} of decompose.mixing_ratios, for the block of the example and its first user's history."""
    history = SEQUENCES[0][:-1]
    batch, (cache,) = decompose.block_caches(p, config, history, np.array([0]), np.array([len(history)]))
    return {"cache": cache, "p": parameters.sub_dict(p, "blocks.0."), "buckets": batch.buckets}
