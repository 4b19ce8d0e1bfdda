"""The printed walk: the recording for the terminal. Each line that ran stands above the arrays that it wrote.

Arguments and returned values are not printed again: they are what the caller's lines wrote. The helpers of backend.py
and packing.py are left out too; the page of the lesson has them.
"""

import inspect
import textwrap

import numpy as np

from minirec import attention, decompose, loss, model, ops, packing
from minirec.lesson import gradcheck, recording

WIDTH = 80  # columns of the terminal
SHOWN = (ops, attention, loss, model, decompose)


def block(name, x):
    """Return a number, vector or matrix below its name and shape, as lines of one width."""
    rows = np.atleast_2d(x).tolist()
    cells = [[f"{n:.4f}".replace("-0.0000", "0.0000") if isinstance(n, float) else str(n) for n in r] for r in rows]
    width = max(len(cell) for row in cells for cell in row)
    text = [f"{name} {list(x.shape)}" if x.ndim else name, *(" ".join(c.rjust(width) for c in row) for row in cells)]
    return [line.ljust(max(map(len, text))) for line in text]


def side_by_side(arrays):
    """Yield {name: array} as lines of at most WIDTH columns; of more than two dimensions, a matrix at a time."""
    blocks = []
    for name, x in arrays.items():
        places = np.ndindex(x.shape[:-2])
        blocks += [block(f"{name}{list(place)}" if place else name, x[place]) for place in places]
    while blocks:
        shelf = blocks.pop(0)
        while blocks and len(blocks[0]) == len(shelf) and 4 + len(shelf[0]) + len(blocks[0][0]) <= WIDTH:
            shelf = [f"{left}  {right}" for left, right in zip(shelf, blocks.pop(0), strict=True)]
        yield from (f"  {line}".rstrip() for line in shelf)


def source(call, line):
    """Return a line of the function that a call runs."""
    return inspect.getsource(call.module).splitlines()[line - 1].strip()


def walk(events):
    """Yield the lines of source that wrote numbers, each with its numbers below it, in the order in which they ran."""
    before, printed = None, {}  # the call and line before; {an array's bytes: under which name it was printed last}
    for call, line, name, value in events:
        result = name == "return" and call.caller is None  # other results are written by the caller's line
        value = np.asarray(value) if isinstance(value, float) else value
        nest = value if result or isinstance(value, np.ndarray) else ()
        arrays = dict(recording.arrays_in(nest, "" if result else name))
        if call.module not in SHOWN or line == call.start or not arrays or (name == "return") != result:
            continue
        title = f"{call.module.__name__.removeprefix('minirec.')}.{call.function}"
        if before is None or before[0] is not call:
            caller = f", for {call.caller.function}: {source(call.caller, call.line)}" if call.caller else ""
            yield f"\n-- {title}{caller}"[: WIDTH + 1]
        if before != (call, line):
            yield from textwrap.wrap(source(call, line), WIDTH, subsequent_indent="    ")
        before = call, line
        for part, x in arrays.items():
            known = f"  {part} {list(x.shape)} = {printed.get((x.shape, x.tobytes()))}"
            again = x.ndim and (x.shape, x.tobytes()) in printed and len(known) <= WIDTH
            if x.size and x.dtype.kind == "f" and np.isnan(x).all():
                yield f"  {part} {list(x.shape)}: not written yet"
            else:
                yield from [known] if again else side_by_side({part: x})
            printed[x.shape, x.tobytes()] = f"{part} of {call.function}"


def heading(text):
    return f"\n== {text} ".ljust(WIDTH + 1, "=")


def lines(attn="softmax", seed=recording.SEED):
    """Yield the lines of the walk. attn: one of attention.known_weightings()."""
    config, p = recording.example(attn, seed)
    yield heading("the parameters")
    for name, value in p.items():
        yield from side_by_side({name: value})
    yield heading("the batch: three users, shortest first")
    batch = packing.pack_list(recording.SEQUENCES, config, np, with_targets=True)
    users = np.repeat(batch.order, batch.lengths)
    rows = {"user": users, "items": batch.items, "positions": batch.positions, "targets": batch.targets}
    yield from side_by_side(rows)
    yield heading(f"one step, forwards and backwards, {attn} weighting")
    yield from walk(recording.record(lambda: model.loss_and_gradients(p, config, recording.SEQUENCES)))
    yield heading("each gradient beside its central difference")
    yield f"{'parameter':<40}{'largest entry':>20}{'off by':>20}"
    errors = []
    for name, gradient, numeric in gradcheck.gradients(p, config, recording.SEQUENCES):
        off, largest = np.abs(gradient - numeric).max(), np.abs(numeric).max()
        errors.insert(0, (name, off / max(largest, 1e-3)))
        yield f"{name + ' ' + str(list(gradient.shape)):<40}{largest:20.6f}{off:20.0e}"
    yield gradcheck.first_fault(gradcheck.check_operations(attn), errors) or "all agree; so does every operation alone"
    yield heading("the loss of the same parameters under each weighting")
    for other in attention.known_weightings():
        changed = recording.example(other, seed)[0]
        yield f"{other:<12}{model.loss_and_gradients(p, changed, recording.SEQUENCES)[0]:.4f}"
    yield heading("how much the positions of user 0 mix")
    arguments = recording.mixing_arguments(config, p)
    events = recording.record(lambda: decompose.mixing_ratios(**arguments))
    events += recording.record(lambda: decompose.contributions(p, config, recording.SEQUENCES[0][:-1]))
    yield from walk(event for event in events if event.call.module is decompose)
