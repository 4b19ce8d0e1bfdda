"""Exercises: a function of ours to write oneself, checked against central differences or our own, in float64.

The file that a student fills is made from the source: what the function may use, its signature, and what is asked. The
solution is the function as it stands there. What is asked, the hints and the typical mistakes are words, in
exercises.json. A mistake is a change of our source: the numbers that it leads to are computed by making it.

A student's file is run and judged in a process of its own, with a time limit: `python -m minirec.lesson.exercises NAME
FILE` prints the verdict as JSON. Each result is right, or off by a pattern that has a name.

Symbols: N tokens, D hidden size, M columns of a result, V items, L positions, K head size.
"""

import ast
import contextlib
import copy
import inspect
import json
import math
import os
import subprocess
import sys
import textwrap
import traceback
from functools import cache
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from minirec import attention, decompose, loss, ops, plain
from minirec.lesson import recording
from minirec.lesson.gradcheck import TOLERANCE, central_differences
from minirec.training import ranking

TIME_LIMIT = 20  # seconds
MODULES = {module.__name__.removeprefix("minirec."): module for module in (*recording.CORE, ranking)}


# The cases


class Case(NamedTuple):
    """One call of the function that is asked for."""

    says: str  # what is special about it
    arguments: dict  # {name: value}
    returns: tuple  # names of what comes back; of a dict, its keys
    writes: tuple = ()  # names of arguments that it changes; judged by how much they grow
    wanted: dict = {}  # {name: array} where central differences say so; of the rest, our own function does
    sizes: dict = {}  # {name: number}: what a wrong factor could be
    destroys: tuple = ()  # names of arguments that may hold anything afterwards


def draw(*shapes):
    """Return random arrays of these shapes."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape) for shape in shapes]


def differences(forward, d_out, **arrays):
    """Return {"d_x": gradient} of sum(forward() * d_out) for arrays x, ... that forward reads."""
    value = lambda: float((forward() * d_out).sum())
    return {f"d_{name}": central_differences(value, array) for name, array in arrays.items()}


def relu_backward():
    x, d_out = draw((5, 4), (5, 4))
    wanted = differences(lambda: ops.relu(x)[0], d_out, x=x)
    yield Case("random rows", {"d_out": d_out, "out": ops.relu(x)[0]}, ("d_x",), wanted=wanted)


def dropout_backward():
    (d_out,), rng = draw((5, 4)), np.random.default_rng(0)
    yield Case("a mask", {"d_out": d_out, "mask": ops.dropout_mask((5, 4), 0.4, rng, d_out)}, ("d_x",))
    yield Case("no dropout: mask is None", {"d_out": d_out, "mask": None}, ("d_x",))


def linear_backward():
    for says, n, d, m in (("D = M", 5, 4, 4), ("D and M differ", 5, 4, 3)):
        x, w, b, d_out, d_w, d_b = draw((n, d), (d, m), m, (n, m), (d, m), m)
        wanted = differences(lambda x=x, w=w, b=b: ops.linear(x, w, b)[0], d_out, x=x, w=w, b=b)
        arguments = {"d_out": d_out, "cache": ops.linear(x, w, b)[1], "d_w": d_w, "d_b": d_b}
        yield Case(says, arguments, ("d_x",), ("d_w", "d_b"), wanted, {"N": n, "D": d, "M": m})


def embedding_backward():
    (d_out, d_table, table), index = draw((6, 3), (5, 3), (5, 3)), np.array([3, 1, 3, 0, 3, 1])
    wanted = differences(lambda: ops.embedding(table, index)[0], d_out, table=table)
    arguments = {"d_out": d_out, "index": index, "d_table": d_table}
    yield Case("rows that are looked up several times", arguments, (), ("d_table",), wanted)


def softmax():
    small, large = draw((2, 2, 4, 4), (1, 1, 5, 5))
    for says, scores in (("two sequences, two heads", small), ("large scores", 10000 * large)):
        arguments = {"scores": scores, "mask": attention.causal_mask(scores.shape[-1], scores)}
        yield Case(says, arguments, ("weights",), destroys=("scores",))


def user_values():
    names = tuple(f"{metric}@{k}" for k in ranking.CUTOFFS for metric in ("HR", "NDCG", "MRR"))
    yield Case("ranks from 0, and a miss", {"ranks": np.array([0, 1, 4, 5, 9, 10, 99, 100, ranking.MISS])}, names)


def fixed_weights():
    for weighting in attention.FIXED:
        yield Case(weighting, {"weighting": weighting, "length": 5, "like": np.ones(1)}, ("a",))


def adam_step():
    for says, step, scale in (("the first step", 1, 1), ("step 10", 10, 1), ("tiny gradients: eps counts", 3, 1e-8)):
        w, g, m, v = draw(6, 6, 6, 6)
        arguments = {"parameters": w, "gradient": g * scale, "first_moment": m * scale * (step > 1)}
        arguments |= {"second_moment": v**2 * scale**2 * (step > 1), "step": step, "learning_rate": 0.01}
        written = "parameters", "first_moment", "second_moment"
        yield Case(says, arguments, (), written, sizes={"1 - b1": 0.1, "1 - b2": 0.001, "lr": 0.01})


def layer_norm_backward():
    x, gamma, beta, d_out, d_gamma, d_beta = draw((5, 4), 4, 4, (5, 4), 4, 4)
    wanted = differences(lambda: ops.layer_norm(x, gamma, beta)[0], d_out, x=x, gamma=gamma, beta=beta)
    arguments = {"d_out": d_out, "cache": ops.layer_norm(x, gamma, beta)[1], "d_gamma": d_gamma, "d_beta": d_beta}
    yield Case("random rows", arguments, ("d_x",), ("d_gamma", "d_beta"), wanted, {"N": 5, "D": 4})


def cross_entropy():
    (tokens, items, d_items), targets = draw((5, 4), (7, 4), (7, 4)), np.array([3, 0, 6, 3, 2])
    for says, x in (("random tokens", tokens), ("large logits", 500 * tokens)):
        wanted = differences(lambda x=x: loss.cross_entropy(x, items, targets, 0.3, 0 * items)[0], 1, x=x, items=items)
        arguments = {"x": x, "items": items, "targets": targets, "scale": 0.3, "d_items": d_items}
        yield Case(says, arguments, ("loss", "d_x"), ("d_items",), wanted, {"scale": 0.3, "N": 5, "D": 4, "V": 7})


def mixing_ratios():
    yield Case("one sequence of four positions", recording.mixing_arguments(*recording.example()), decompose.RATIOS)


def attention_backward(rate=0.0):
    q, k, v, d_mixed = draw((5, 3), (5, 3), (5, 3), (5, 3))
    mask = (np.random.default_rng(1).random((5, 5)) >= rate) / (1 - rate) if rate else 1
    for attn in ("softmax", "uniform"):
        weights = lambda attn=attn: plain.attention_weights(attn, q, k)
        wanted = differences(lambda weights=weights: (weights() * mask) @ v, d_mixed, q=q, k=k, v=v)
        arguments = {"attn": attn, "d_mixed": d_mixed, "q": q, "k": k, "v": v, "a": weights(), "mask": mask}
        yield Case(f"{attn} weights", arguments, ("d_q", "d_k", "d_v"), wanted=wanted, sizes={"K": 3, "L": 5})


CASES = (relu_backward, dropout_backward, linear_backward, embedding_backward, softmax, user_values, fixed_weights)
CASES += (adam_step, layer_norm_backward, cross_entropy, mixing_ratios, attention_backward)
CASES = {cases.__name__: cases for cases in CASES}  # the exercises, from easy to hard
CASES["attention_backward_dropout"] = lambda: attention_backward(rate=0.4)


# The words


@cache
def exercises():
    """Return {name: exercise}, from easy to hard, with the words of exercises.json as attributes:

    module, function    where our function stands, and its name
    uses                names of the module that the text shows: the forward, and what may be called
    asks                what the function must do
    hints               {result: hint}, in the order in which the results are judged
    slips               typical mistakes: [what it is, our source, what stands there instead]
    """
    words = json.loads(resources.files("minirec.lesson").joinpath("exercises.json").read_text("utf-8"))
    return {name: SimpleNamespace(**words[name]) for name in CASES}


@cache
def definitions(module):
    """Return {name: source} of the functions, classes and constants of a module, in their order and without marks."""
    text, found = inspect.getsource(module), {}
    for node in ast.parse(text).body:
        names = [part for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]
        names = [node.name] if hasattr(node, "name") else [part.id for part in names]
        found |= dict.fromkeys(names, "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno]))
    return found


def ours(exercise, old="", new=""):
    """Return our function of an exercise, with one change of its source."""
    module = MODULES[exercise.module]
    source, namespace = definitions(module)[exercise.function], vars(module) | {"np": np}
    assert old in source, f"{exercise.function} has no {old}"
    exec(source.replace(old, new), namespace)  # our own words
    return namespace[exercise.function]


# The text


def source_of(name, **replaced):
    """Return our function and what it uses as source, with their imports; replaced: other source for some names."""
    exercise = exercises()[name]
    module = MODULES[exercise.module]
    sources, names = definitions(module) | replaced, [exercise.function, *exercise.uses]
    for name in names:  # which grow meanwhile
        used = [node.id for node in ast.walk(ast.parse(sources.get(name, ""))) if isinstance(node, ast.Name)]
        names += [other for other in used if other in vars(module) and other not in names]
    imports = {"import numpy as np"}
    for name in {*names} - {*sources, "np"}:
        value = getattr(module, name)
        imports.add(f"import {name}" if inspect.ismodule(value) else f"from {value.__module__} import {name}")
    imports = "\n".join(sorted(imports, key=lambda line: (line.startswith("from"), line)))
    return "\n\n\n".join([imports, *dict.fromkeys(sources[name] for name in sources if name in names)]) + "\n"


def text_of(name):
    """Return the file in which a function is to be written."""
    exercise = exercises()[name]
    signature = f"def {exercise.function}{inspect.signature(ours(exercise))}:"
    words = textwrap.fill(f'"""{exercise.asks}', 100, initial_indent="    ", subsequent_indent="    ")
    unwritten = f'{signature}\n{words}\n    """\n    raise NotImplementedError("not written yet")'
    title = f"Exercise: write {exercise.function}. Is it right?\n\n    python cli.py exercise {name} --check {name}.py"
    return f'"""{title}\n"""\n\n{source_of(name, **{exercise.function: unwritten})}'


# Running and judging


class Fault(Exception):
    """What is wrong with a student's function, in one line, before its numbers can be judged."""


@contextlib.contextmanager
def naming_its_line(path):
    """Turn whatever a student's file can raise, SystemExit included, into a Fault that says in which line of it."""
    try:
        yield
    except BaseException as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = lines[-1] if lines else getattr(error, "lineno", None)
        says = str(error) if isinstance(error, Fault) else " ".join(f"{type(error).__name__}: {error}".split())
        raise Fault(f"line {line}: {says}" if line else says) from None


def arrays_of(arguments):
    """Return {name: array} of all arrays in a function's arguments: cache.x, for instance."""
    return {part: x for name, value in arguments.items() for part, x in recording.arrays_in(value, name)}


def results(case, function):
    """Return {name: float64 array} of what a function gives for a Case. Raises Fault."""
    arguments = copy.deepcopy(case.arguments)
    with np.errstate(all="ignore"):  # what is no number is named below
        found = function(**arguments)
    if found is None and case.returns:
        raise Fault(f"it returns nothing, where {', '.join(case.returns)} should come back: is a `return` missing?")
    if len(case.returns) < 2:
        found = dict.fromkeys(case.returns, found)
    elif isinstance(found, (tuple, list)) and len(found) == len(case.returns):
        found = dict(zip(case.returns, found, strict=True))
    elif not isinstance(found, dict):
        raise Fault(f"it should return {len(case.returns)} values: {', '.join(case.returns)}")
    if missing := [name for name in case.returns if name not in found]:
        raise Fault(f"what it returns has no {missing[0]}")
    before, after = arrays_of(case.arguments), arrays_of(arguments)
    kept = [name for name in before if name not in (*case.writes, *case.destroys)]
    if changed := [name for name in kept if (before[name] != after[name]).any()]:
        raise Fault(f"it changes {changed[0]}, which others may still need: write into a copy")
    values = {name: after[name] - before[name] for name in case.writes}
    for name in case.returns:
        try:
            values[name] = np.asarray(found[name], np.float64)
        except (TypeError, ValueError):
            raise Fault(f"{name} is of type {type(found[name]).__name__}, where an array of numbers belongs") from None
    return values


def off(got, wanted):
    """Return which entries are off by more than the error of central differences, of arrays that are all 0 too."""
    return ~(np.abs(got - wanted) <= TOLERANCE * (np.abs(wanted).max(initial=0) or 1))


def close(got, wanted):
    """Whether arrays agree."""
    return got.shape == wanted.shape and not off(got, wanted).any()


def known_size(factor, sizes):
    """Return ", which is sqrt(K)" where a factor is made of a size that the student knows, else ""."""
    for name, size in sizes.items():
        for form, power in (name, 1), (f"1/({name})", -1), (f"sqrt({name})", 0.5), (f"1/sqrt({name})", -0.5):
            if math.isclose(factor, size**power, rel_tol=1e-4):
                return f", which is {form}"
    return ""


def factors(got, wanted, axis=None):
    """Return by what wanted must be multiplied to come nearest to got: one factor, or one a line along an axis."""
    squares = (wanted * wanted).sum(axis=axis, keepdims=True)
    return (got * wanted).sum(axis=axis, keepdims=True) / np.where(squares > 0, squares, 1)


def pattern(got, wanted, before, sizes):
    """Return by what pattern an array of the right shape is off; before: what an argument held that is written to."""
    if before is not None and not got.any():
        return "unchanged: `x = ...` gives the name x to another array; `x += ...` writes into the one that is there"
    if before is not None and close(got + before, wanted):
        return "overwritten: it should be added to what is there"
    if not got.any():
        return "0 everywhere"
    if got.ndim == 2 and close(got.T, wanted):
        return "transposed"
    if got.size > 1 and close(got, np.full_like(got, wanted.sum())):
        return "one number everywhere, the sum of all entries: summed over one axis too many"
    factor = factors(got, wanted)
    if close(got, factor * wanted):
        return f"everywhere {factor.item():.5g} times what it should be{known_size(factor.item(), sizes)}"
    lines = ((-1, "along each row", "row"), (0, "down each column", "column")) if got.ndim > 1 else ()
    for axis, along, line in lines:
        if close(got, factors(got, wanted, axis) * wanted):
            return f"wrong by one factor {along}: something that each {line} has for itself is missing, or too much"
        if close(got, wanted + (got - wanted).mean(axis=axis, keepdims=True)):
            return f"wrong by one number {along}: a mean or a sum over the {line} is missing, or too much"
    return "wrong by no pattern that this check knows"


def slip(exercise, case, name, got):
    """Return which typical mistake gives a result; None where none does."""
    for says, *change in exercise.slips:
        with contextlib.suppress(Exception):  # not every mistake runs on every Case
            if close(got, results(case, ours(exercise, *change))[name]):
                return says
    return None


def wrong(exercise, case, name, got, wanted):
    """Return what is wrong with a result, in a line or two; None where it is right."""
    if got.shape != wanted.shape:
        axes = [axis for axis in range(wanted.ndim) if close(got.squeeze(), wanted.sum(axis=axis))]
        found = "transposed: " if close(got.T, wanted) else f"summed over axis {axes[0]}: " if axes else ""
        return f"{found}its shape is {list(got.shape)}, where {list(wanted.shape)} belongs"
    if close(got, wanted):
        return None
    no_number = ~np.isfinite(got)
    entries = no_number if no_number.any() else off(got, wanted)
    first = np.argwhere(entries)[0].tolist()
    where = f"{entries.sum()} of {got.size} entries" + (f", the first at {first}" if first else "")
    if no_number.any():
        return f"NaN or infinity in {where}"
    before = case.arguments[name] if name in case.writes else None
    says = slip(exercise, case, name, got) or pattern(got, wanted, before, case.sizes)
    return f"{says}\n      {where}: {got[*first]:.5g}, where {wanted[*first]:.5g} belongs"


def judge(name, path):
    """Run a student's file; return whether its function is right, and a text on all Cases up to one that is off."""
    exercise, cases, lines = exercises()[name], list(CASES[name]()), []
    case, namespace = cases[0], {"__name__": name}
    try:
        with naming_its_line(path):
            exec(compile(Path(path).read_bytes(), path, "exec"), namespace)  # in a process of its own: judge_apart
        if not callable(namespace.get(exercise.function)):
            raise Fault(f"it defines no function {exercise.function}")
        for case in cases:
            lines.append(f"{case.says}:")
            with naming_its_line(path):
                found = results(case, namespace[exercise.function])
            wanted, hints = results(case, ours(exercise)) | case.wanted, []
            for result in sorted(found, key=[*exercise.hints, *found].index):
                says = wrong(exercise, case, result, found[result], wanted[result])
                lines.append(f"  {result:<{1 + max(map(len, found))}} {f'off: {says}' if says else 'right'}")
                hints += [exercise.hints.get(result, [*exercise.hints.values()][-1])] if says else []
            if hints:
                return False, "\n".join([*lines, f"hint: {hints[0]}"])
    except Fault as fault:
        shapes = ", ".join(f"{part} {list(x.shape)}" for part, x in arrays_of(case.arguments).items())
        unwritten = "not written yet" in str(fault)
        hint = [*exercise.hints.values()][0] if unwritten else f"it was called with {shapes}"
        return False, "\n".join([*lines, f"off: {fault}", f"hint: {hint}"])
    return True, "\n".join([*lines, f"right: {name} is solved"])


def judge_apart(name, path):
    """Judge a student's file in a process of its own, with a time limit. What the file prints goes to stderr."""
    home = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))}
    command = [sys.executable, "-P", "-W", "ignore", "-m", "minirec.lesson.exercises", name, str(path)]
    try:
        process = subprocess.run(command, stdout=subprocess.PIPE, env=environment, timeout=TIME_LIMIT)
        return json.loads(process.stdout)
    except subprocess.TimeoutExpired:
        return False, f"off: not done after {TIME_LIMIT} seconds: is there a loop without an end?"
    except ValueError:
        return False, f"off: its process ended without an answer (exit status {process.returncode})"


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what a student's file prints is no part of the answer
        json.dump(judge(*sys.argv[1:]), answers)
    os._exit(0)  # whatever threads and exit handlers it leaves behind
