"""The printed walk: every number of one tiny training step, its gradients, a substitution, a decomposition.

Nothing here computes the model a second time. `record` runs model.loss_and_gradients while Python's
profiler hook copies what goes into and comes out of each function of WATCHED; the steps below name and
print it. The few values that no function returns (logits, dL/dA, F_ij) are made in one line each, and
`same` holds that line against what the model did.

Three users, one of them printed; one block, for a second would print the same lines again; no dropout;
float64; larger weights than in training, so that there is something to see.

Symbols: those of model.py. Of a packed array [N, ...] the last L rows are printed, the longest user's.
"""

import inspect
import math
import sys
from collections import defaultdict
from copy import deepcopy
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from minirec import attention, decompose, loss, model, ops, packing
from minirec.lesson import gradcheck
from minirec.parameters import sub_dict

SEQUENCES = [np.array(s) for s in ([3, 1, 4, 1, 5], [2, 0, 3], [5, 2, 0, 4])]  # the first is printed
LENGTH = len(SEQUENCES[0]) - 1  # L: inputs are s[:-1], targets s[1:]
STD = 0.5  # of the parameters
SEED = 9  # with it, no relu unit is always off, and gradients are large enough to follow
SHOWN = 3  # entries of each gradient in the table
WIDTH = 100  # columns of the terminal
WATCHED = {
    inspect.unwrap(function).__code__: function.__name__  # without its mark @fused
    for function in (
        *(ops.embedding, ops.linear, ops.relu, ops.layer_norm, attention.attention, attention.softmax),
        *(ops.linear_backward, ops.relu_backward, ops.layer_norm_backward, attention.attention_backward),
        loss.cross_entropy,
    )
}


# What happens


class Call(NamedTuple):
    """One call of a watched function: its arguments as they were before, and what it returned."""

    given: dict
    out: object


class Walk(NamedTuple):
    """One step of the model: what went in, what came out, and the calls in between."""

    config: model.Config
    parameters: dict
    batch: packing.Batch
    loss: float
    gradients: dict
    calls: dict  # {function: [Call, ...]}, in the order in which they returned


def example(attn="softmax", seed=SEED):
    """Return the config and the parameters (float64, N(0, 0.5), gammas around 1) that are walked through."""
    config = model.Config(n_items=6, hidden_size=4, n_blocks=1, n_heads=2, max_length=LENGTH, dropout=0, attn=attn)
    rng = np.random.default_rng(seed)
    parameters = model.init_parameters(config, seed, np.float64)
    for name, value in parameters.items():
        value[...] = rng.normal(1 if name.endswith("gamma") else 0, STD, value.shape)
    return config, parameters


def record(config, parameters):
    """Run one forward and backward over SEQUENCES; return the Walk."""
    calls, running = defaultdict(list), []

    def watch(frame, event, out):
        if frame.f_code in WATCHED and event == "call":
            running.append(deepcopy(dict(frame.f_locals)))
        elif frame.f_code in WATCHED and event == "return":
            calls[WATCHED[frame.f_code]].append(Call(running.pop(), deepcopy(out)))

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        value, gradients = model.loss_and_gradients(parameters, config, SEQUENCES)
    finally:
        sys.setprofile(before)
    batch = packing.pack_list(SEQUENCES, config, np, with_targets=True)
    return Walk(config, parameters, batch, value, gradients, calls)


def same(ours, models):
    """Return `ours`, having checked that it is what the model computed."""
    assert np.abs(np.subtract(ours, models)).max() <= 1e-10 * max(1, np.abs(models).max())
    return ours


def own(x):
    """Return the printed user's rows of packed x [N, ...]: the longest sequence is packed last."""
    return x[-LENGTH:]


def heads(walk, x):
    """Return the printed user's rows of packed x [N, D] as [H, L, K]."""
    return packing.to_heads(x, walk.batch.buckets[-1], walk.config.n_heads)[0]


def weights(walk):
    """Return A of the printed user, [H, L, L]."""
    _, cache = walk.calls["attention"][0].out
    return np.broadcast_to(cache[-1].weights, (1, walk.config.n_heads, LENGTH, LENGTH))[0]


def probabilities(walk):
    """Return logits and softmax of all tokens, both [N, V]: the loss makes them in chunks and keeps neither."""
    given = walk.calls["cross_entropy"][0].given
    logits = given["x"] @ given["items"].T
    p = attention.softmax(logits.copy(), 0)
    same(-np.log(p[np.arange(len(p)), given["targets"]]).mean(), walk.loss)
    return logits, p


# The steps


class Step(NamedTuple):
    """What is printed together: arrays beside the formula they follow and the function they come from."""

    title: str
    where: str
    says: str
    arrays: dict  # {name: [rows, columns]}, or [H, rows, columns], printed head by head
    rows: tuple = ()  # labels; none: 0, 1, 2, ...
    decimals: int = 3


LAYER_NORM = "LN(z) = gamma n + beta,  n = (z - mean z) / sigma,  sigma = sqrt(mean (z - mean z)^2 + 1e-8)"
LAYER_NORM_BACKWARD = "d_z = (e - mean e - n mean(e n)) / sigma,  e = gamma d_LN(z),  n and sigma as printed above"
LEARNED = "s = q k^T / sqrt(K), -inf for j > i (the future);  A = exp(s) / its row sum: each row sums to 1"
FIXED = "the same A whatever the items are: 0 for j > i (the future), each row sums to 1"


def normed(call, name):
    """Return what a layer norm computes, for a Step."""
    out, (n, sigma, *_) = call.out
    return {"sigma": own(sigma), "n": own(n), f"{name} = LN(z)": own(out)}


def forward_steps(walk):
    """Yield the Steps from items to loss, numbered as in model.forward and model.block."""
    config, batch, c = walk.config, walk.batch, walk.calls
    item, position = (own(call.out[0]) for call in c["embedding"])
    norm_e, norm_a, norm_f = c["layer_norm"]
    *qkv, o, u, f = (call.out[0] for call in c["linear"])
    learned = len(qkv) == 3
    says = f"{config.attn} weighting;  B = 3 users, N = {len(batch.items)} tokens, D = 4, H = 2 heads, K = D/H = 2, "
    says += f"V = 6 items;\ninputs s[:-1], targets s[1:], shortest first, no padding; below: the last {LENGTH} rows"
    users = np.repeat(batch.order, batch.lengths)
    arrays = {"user": users, "position": batch.positions, "item": batch.items, "target": batch.targets}
    yield Step("the batch", "packing.pack", says, arrays, rows=("",))
    says = "z = E[item] sqrt(D) + P[position];  rows are positions i, here and below"
    arrays = {"E[item]": item, "P[position]": position, "z": own(norm_e.given["x"])}
    yield Step("forward 1. embed", "model.forward", says, arrays)
    yield Step("forward 1. layer norm", "ops.layer_norm", LAYER_NORM, normed(norm_e, "x"))
    says = "q = x W_q + b_q,  k = x W_k + b_k,  " if learned else "A needs neither query nor key;  "
    says += "v = x W_v + b_v;  v_h: the columns of head h"
    arrays = dict(zip("qkv" if learned else "v", (heads(walk, x) for x in qkv), strict=True))
    yield Step("block 1. query, key, value", "model.block", says, arrays)
    arrays = {"s": c["softmax"][-1].given["scores"][0] + c["softmax"][-1].given["mask"]} if learned else {}
    yield Step("block 2. A", "attention.attention", LEARNED if learned else FIXED, arrays | {"A": weights(walk)})
    says = "mixed_h = A_h v_h for each head h;  o = [mixed_0 mixed_1] W_o + b_o"
    arrays = {"mixed": heads(walk, c["attention"][0].out[0]), "o": own(o), "z = x + o": own(norm_a.given["x"])}
    yield Step("block 2. mix positions, then heads", "attention.attention", says, arrays)
    yield Step("block 3. layer norm", "ops.layer_norm", LAYER_NORM, normed(norm_a, "y"))
    says = "u = y W_1 + b_1,  f = relu(u) W_2 + b_2"
    arrays = {"u": own(u), "relu(u)": own(c["relu"][0].out[0]), "f": own(f), "z = y + f": own(norm_f.given["x"])}
    yield Step("block 4. feed-forward", "model.block", says, arrays)
    yield Step("block 5. layer norm", "ops.layer_norm", LAYER_NORM, normed(norm_f, "x"))
    logits, p = map(own, probabilities(walk))
    losses = -np.log(np.take_along_axis(p, own(batch.targets)[:, None], axis=1))
    says = f"logits = x E^T (tied),  p = softmax(logits),  -log p[target] for the targets {own(batch.targets)};\n"
    says += f"loss = the mean of -log p[target] over all N tokens = {walk.loss:.4f}"
    yield Step("logits and loss", "loss.cross_entropy", says, {"logits": logits, "p": p, "-log": losses})


def backward_steps(walk):
    """Yield the Steps from loss back to the embeddings, the forward's numbers in reverse; d_z is dL/dz."""
    config, batch, c = walk.config, walk.batch, walk.calls
    norm_f, norm_a, norm_e = c["layer_norm_backward"]
    d_relu, d_y_by_f, _, *d_x_by = (own(call.out) for call in c["linear_backward"])
    given, (_, d_x) = c["cross_entropy"][0]
    _, p = probabilities(walk)
    d_logits = (p - np.eye(config.n_items)[batch.targets]) / len(p)
    same(d_logits @ given["items"], d_x)
    says = f"d_logits = (p - onehot) / N, N = {len(p)}: each row sums to 0;  d_x = d_logits E"
    yield Step("backward: loss", "loss.cross_entropy", says, {"d_logits": own(d_logits), "d_x": own(d_x)})
    arrays = {"d_LN(z) = d_x": own(d_x), "d_z, for y and for f": own(norm_f.out)}
    yield Step("block 5. layer norm", "ops.layer_norm_backward", LAYER_NORM_BACKWARD, arrays)
    says = "d_relu = d_z W_2^T,  d_u = d_relu where u > 0,  d_y = d_z (residual) + d_u W_1^T"
    arrays = {"d_relu": d_relu, "d_u": own(c["relu_backward"][0].out), "d_u W_1^T": d_y_by_f}
    yield Step("block 4. feed-forward", "model.block_backward", says, arrays | {"d_y": own(norm_a.given["d_out"])})
    arrays = {"d_LN(z) = d_y": own(norm_a.given["d_out"]), "d_z, for x and for o": own(norm_a.out)}
    yield Step("block 3. layer norm", "ops.layer_norm_backward", LAYER_NORM_BACKWARD, arrays)
    yield attention_backward_step(walk)
    names = ("d_v W_v^T", "d_k W_k^T", "d_q W_q^T")[: len(d_x_by)]
    says = f"d_x = d_z (residual) + {' + '.join(names)}: what comes back on every way that x goes"
    arrays = dict(zip(names, d_x_by, strict=True)) | {"d_x": own(norm_e.given["d_out"])}
    yield Step("block 1. query, key, value", "model.block_backward", says, arrays)
    arrays = {"d_LN(z) = d_x": own(norm_e.given["d_out"]), "d_z": own(norm_e.out)}
    yield Step("backward 1. layer norm", "ops.layer_norm_backward", LAYER_NORM_BACKWARD, arrays)
    as_input, as_output = np.zeros_like(given["items"]), d_logits.T @ given["x"]
    ops.embedding_backward(norm_e.out * math.sqrt(config.hidden_size), batch.items, as_input)
    same(as_input + as_output, walk.gradients["item_embedding"])
    says = "d_E = sqrt(D) d_z, summed over the tokens of each item (E as input), + d_logits^T x (E as output);\n"
    says += "rows are items, and the sums run over all N tokens of the batch, not over the printed ones alone"
    arrays = {"input": as_input, "output": as_output, "d_E": walk.gradients["item_embedding"]}
    yield Step("backward 1. E, which serves twice", "model.add_gradients", says, arrays)


def attention_backward_step(walk):
    """Return the Step through A, with r in its plain form; attention_backward takes d_mixed . mixed instead."""
    given, d_qkv = walk.calls["attention_backward"][0]
    d_mixed, a, where = heads(walk, given["d_mixed"]), weights(walk), "attention.attention_backward"
    says = "d_mixed = d_z W_o^T,  d_v = A^T d_mixed"
    arrays = {"d_mixed": d_mixed, "d_v": same(a.swapaxes(1, 2) @ d_mixed, heads(walk, d_qkv[2]))}
    if walk.config.attn != "softmax":
        return Step("block 2. mix positions", where, says + ";  A is fixed: nothing goes back through it", arrays)
    q, k, v = (heads(walk, call.out[0]) for call in walk.calls["linear"][:3])
    mixed, root = heads(walk, walk.calls["attention"][0].out[0]), math.sqrt(q.shape[2])
    d_a = d_mixed @ v.swapaxes(1, 2)
    r = same((d_a * a).sum(axis=2, keepdims=True), (d_mixed * mixed).sum(axis=2, keepdims=True))
    d_s = a * (d_a - r)
    d_q = same(d_s @ k / root, heads(walk, d_qkv[0]))
    d_k = same(d_s.swapaxes(1, 2) @ q / root, heads(walk, d_qkv[1]))
    says += ";  d_A = d_mixed v^T,  r = rowsum(d_A A) = d_mixed . mixed;\n"
    says += "d_s = A (d_A - r): its rows sum to 0;  d_q = d_s k / sqrt(K),  d_k = d_s^T q / sqrt(K)"
    return Step("block 2. A", where, says, arrays | {"d_A": d_a, "r": r, "d_s": d_s, "d_q": d_q, "d_k": d_k})


def gradient_step(walk):
    """Return the Step that sets every parameter's gradient beside central differences."""
    now = lambda: model.loss_and_gradients(walk.parameters, walk.config, SEQUENCES)[0]
    hand, numeric, off = [], [], []
    for name, value in walk.parameters.items():
        differences = gradcheck.central_differences(now, value)
        hand.append(walk.gradients[name].ravel()[:SHOWN])
        numeric.append(differences.ravel()[:SHOWN])
        off.append([f"{np.abs(walk.gradients[name] - differences).max():.0e}"])
    says = f"by hand, and (L(w+h) - L(w-h)) / 2h with h = {gradcheck.STEP:.0e}: the first {SHOWN} entries of each;\n"
    says += "off by: the largest difference over all of its entries"
    arrays = {"by hand": np.array(hand), "numeric": np.array(numeric), "off by": np.array(off)}
    rows = tuple(f"{name} {shape(value)}" for name, value in walk.parameters.items())
    return Step("every parameter's gradient", "gradcheck.central_differences", says, arrays, rows)


def substitution_step(walk):
    """Return the Step that puts every weighting into the same parameters."""
    walks = [record(replace(walk.config, attn=attn), walk.parameters) for attn in attention.known_weightings()]
    a = np.stack([weights(w)[:, -1] for w in walks], axis=1)  # [H, weightings, L]
    mixed = np.stack([w.calls["attention"][0].out[0][-1] for w in walks])
    logits, p = (np.stack([x[-1] for x in both]) for both in zip(*map(probabilities, walks), strict=True))
    target = walk.batch.targets[-1]
    judged = np.stack([p[:, target], [w.loss for w in walks]], axis=1)
    says = "the same parameters with each weighting: only A changes, and what follows from it\n"
    says += f"(of a trained model: `evaluate --attn`);  target {target};  loss: the mean over all N tokens"
    arrays = {"A": a, "mixed": mixed, "logits": logits, f"p[{target}], loss": judged}
    title = f"position {LENGTH - 1} with another A"
    return Step(title, "attention.attention", says, arrays, attention.known_weightings())


def decomposition_steps(walk):
    """Yield the Steps that take the last position's layer norm output apart, as in decompose.py."""
    i, p, norm = LENGTH - 1, sub_dict(walk.parameters, "blocks.0."), walk.calls["layer_norm"][1]
    history, start, length = SEQUENCES[0][:-1], np.array([0]), np.array([LENGTH])
    batch, (cache,) = decompose.block_caches(walk.parameters, walk.config, history, start, length)
    x, b_o, beta, zero = cache["x"], p["attention.b_o"], p["attention_norm.beta"], np.zeros(walk.config.hidden_size)
    sigma = cache["attention_norm"].sigma[i]
    g = lambda z: decompose.centred(z, p["attention_norm.gamma"]) / sigma
    v = heads(walk, walk.calls["linear"][-4].out[0])
    f = np.hstack(weights(walk)[:, i, :, None] * v) @ p["attention.w_o"]  # F_ij, a row for each j
    f_res = f + (np.arange(LENGTH) == i)[:, None] * x[i]
    arrays = {}
    for name, parts, bias, shift, total in (
        ("F_ij", f, b_o, zero, walk.calls["linear"][-3].out[0]),
        ("F_ij + [i=j] x_i", f_res, b_o, zero, norm.given["x"]),
        ("g_i(F_ij + [i=j] x_i)", g(f_res), g(b_o), beta, norm.out[0]),
    ):
        whole = parts.sum(axis=0)
        arrays[name] = np.array([*parts, whole, bias, shift, same(whole + bias + shift, own(total)[i])])
    says = "F_ij = sum_h A_h[i,j] v_h[j] W_o,h;  g_i(z) = gamma (z - mean z) / sigma_i, also of b_o;\n"
    says += "the totals are o_i, z_i = x_i + o_i and y_i = LN(z_i), as printed in blocks 2 and 3 forwards"
    rows = (*(f"j = {j}" for j in range(LENGTH)), "sum", "b_o", "beta", "total")
    yield Step(f"position {i} taken apart", "decompose", says, arrays, rows)
    ratios = decompose.mixing_ratios(cache, p, batch.buckets)
    keep, mix = (part[i] for part in decompose.keep_and_mix(cache, p, batch.buckets))
    same(mix, f[:i].sum(axis=0))
    keeps, mixes = np.stack([keep, keep + x[i], g(keep + x[i])]), np.stack([mix, mix, g(mix)])
    kept, mixed = decompose.norms(keeps), decompose.norms(mixes)
    ratio = same(mixed / (mixed + kept), [ratios[name][i] for name in decompose.RATIOS])
    says = "keeps: row j = i above;  mixes: the sum of the others;  ratio = |mixes| / (|mixes| + |keeps|)"
    arrays = {"keeps": keeps, "mixes": mixes, "|keeps|, |mixes|, ratio": np.stack([kept, mixed, ratio], axis=1)}
    yield Step(f"how much position {i} mixes", "decompose.mixing_ratios", says, arrays, decompose.RATIOS)


def steps(attn="softmax", seed=SEED):
    """Yield all Steps of one walk. attn: one of attention.known_weightings()."""
    walk = record(*example(attn, seed))
    yield from forward_steps(walk)
    for step in (*backward_steps(walk), gradient_step(walk)):
        yield step._replace(decimals=4)  # gradients are smaller
    yield substitution_step(walk)
    yield from decomposition_steps(walk)


# Printing


def shape(x):
    """Return "[4,2]"."""
    return f"[{','.join(map(str, x.shape))}]"


def column(name, x, decimals):
    """Return a matrix below its name and shape, as lines of one width."""
    rows = np.atleast_2d(x).tolist()
    cells = [[f"{round(n, decimals) + 0.0:.{decimals}f}" if isinstance(n, float) else str(n) for n in r] for r in rows]
    width = max(len(cell) for row in cells for cell in row)
    text = [f"{name} {shape(x)}", *(" ".join(cell.rjust(width) for cell in row) for row in cells)]
    return [line.ljust(max(map(len, text))) for line in text]


def lines(step):
    """Yield a Step as lines of at most WIDTH columns, its arrays side by side as far as they fit."""
    yield f"-- {step.title} ".ljust(WIDTH - len(step.where) - 1, "-") + f" {step.where}"
    yield from step.says.split("\n")
    columns = []
    for name, x in step.arrays.items():
        parts = {f"{name}_{h}": x[h] for h in range(len(x))} if x.ndim == 3 else {name: x}
        columns += [column(*part, step.decimals) for part in parts.items()]
    labels = ["", *map(str, step.rows or range(len(columns[0]) - 1))]
    labels = [label.ljust(max(map(len, labels))) for label in labels]
    while columns:
        shelf = labels
        while columns and len(shelf[0]) + 2 + len(columns[0][0]) <= WIDTH or shelf is labels:
            shelf = [f"{left}  {right}" for left, right in zip(shelf, columns.pop(0), strict=True)]
        yield from (line.rstrip() for line in shelf)
    yield ""
