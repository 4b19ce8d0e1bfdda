"""How much does attention mix positions? The norm-based decomposition, from the forward caches.

Symbols: N tokens, D hidden size, H heads, K = D/H, L positions, g sequences in a group.

What block input x_j contributes to the attention output at i (Kobayashi et al. 2020, 2021):

    f_h(x_j) = (x_j W_v,h + b_v,h) W_o,h        F_ij = sum_h A_h[i,j] f_h(x_j)

W_v,h [D, K] being head h's columns of W_v, W_o,h [K, D] its rows of W_o. For, given A, attention is linear:
    o_i = concat_h(sum_j A_h[i,j] v_h[j]) W_o + b_o = sum_j F_ij + b_o, a sum over positions.

    ratio         parts                                keeps          mixes
    attn          F_ij                                 F_ii           sum_{j != i} F_ij
    attn_res      F_ij + delta_ij x_i                  F_ii + x_i     the same
    attn_res_ln   g_i(F_ij + delta_ij x_i)             g_i(F_ii+x_i)  g_i of the rest

with g_i(z) = (z - mean z) / sigma_i * gamma, sigma_i that of the real layer norm's row x_i + o_i. Given
sigma_i, g_i is linear too, so that
    sum_j g_i(F_ij + delta_ij x_i) + g_i(b_o) + beta = the layer norm's output, exactly.
Mixing ratio r_i = |mixes| / (|mixes| + |keeps|): vectors are summed first, norms taken last.
It needs only the total and the diagonal, O(N D); no array [L, L, D] is ever built.
"""

import numpy as np

from minirec.attention import from_heads, make_groups, to_heads
from minirec.backend import get_array_module, plan, to_host
from minirec.errors import UserError
from minirec.model import below, check_items, forward, pack
from minirec.workers import cut

RATIOS = ("attn", "attn_res", "attn_res_ln")
RECENT = 15  # positions in a heatmap
MICRO_BATCHES = 2  # in a piece of work: without a loss and a backward, larger pieces keep threads busier
TINY = 1e-30  # keeps 0/0 at 0


def norms(x):
    """Return the Euclidean norm of each last-axis vector of x."""
    return get_array_module(x).sqrt(dots(x, x))


def dots(x, y):
    """Return the inner product of each pair of last-axis vectors of x and y."""
    xp = get_array_module(x)
    return (x * y) @ xp.ones(x.shape[-1], x.dtype)  # a row sum is fastest as a product


def through_layer_norm(z, layer_norm_cache):
    """Return gamma (z - mean z), [..., D]: g_i(z) but for the 1/sigma_i."""
    _, _, gamma, average = layer_norm_cache
    out = z - z @ average
    out *= gamma
    return out


def keep_and_mix(cache, p, groups):
    """Return F_ii and sum_{j != i} F_ij of one block, both [N, D].

    cache: the block's forward cache; p: the parameters below "blocks.I."; groups of the batch.
    The heads' outputs are split before W_o, so position 0, which sees only itself, mixes exactly 0.
    """
    xp = get_array_module(cache["x"])
    mixed, _ = cache["o"]  # concat_h A_h v_h, [N, D]
    kept = xp.empty_like(mixed)
    for group, (_, _, v, a, _, _) in zip(groups, cache["attention"], strict=True):
        own = xp.diagonal(a, axis1=-2, axis2=-1)[..., None]  # A_h[i,i]
        xp.multiply(own, v, out=to_heads(kept, group, v.shape[1]))  # a view, the group being dense
    return kept @ p["attention.w_o"], (mixed - kept) @ p["attention.w_o"]


def mixing_ratios(cache, p, groups):
    """Return {ratio: [N]} of one block (see keep_and_mix), and |g_i(F_ii + x_i)| [N]."""
    xp = get_array_module(cache["x"])
    keep, mix = keep_and_mix(cache, p, groups)
    keep_res = keep + cache["x"]
    layer_normed = [norms(through_layer_norm(z, cache["attention_norm"])) for z in (keep_res, mix)]
    mixes = norms(mix)
    parts = {
        "attn": (norms(keep), mixes),
        "attn_res": (norms(keep_res), mixes),
        "attn_res_ln": layer_normed,  # the 1/sigma_i cancels in the ratio
    }
    ratios = {name: mixes / xp.maximum(mixes + keeps, TINY) for name, (keeps, mixes) in parts.items()}
    return ratios, layer_normed[0] / cache["attention_norm"][1][:, 0]


def entropies(cache, groups):
    """Return the entropy of each row of A over its largest possible value, log(i + 1), as [N, H].

    Position 0 sees only itself; its 0/0 is 0 here and left out of every summary.
    """
    xp = get_array_module(cache["x"])
    first_v = cache["attention"][0][2]
    out = xp.empty((len(cache["x"]), first_v.shape[1]), first_v.dtype)
    for group, (_, _, v, a, _, _) in zip(groups, cache["attention"], strict=True):
        plogp = (a * xp.log(xp.where(a > 0, a, xp.ones_like(a)))).sum(axis=-1)  # [g, H, L] or [L]
        possible = xp.log(xp.arange(1, group.length + 1, dtype=a.dtype))
        entropy = -plogp / xp.maximum(possible, TINY)
        from_heads(xp.broadcast_to(entropy, v.shape[:3])[..., None], group, out)
    return out


def contribution_norms(cache, p, own, group, place, recent=None):
    """Return |g_i(F_ij + delta_ij x_i)| of one block and group: [g, n, n], query i, key j.

    cache, p as in keep_and_mix; own [N]: its diagonal, from mixing_ratios; group: the place-th of the
    batch; recent: keep only the last n positions, None = all L.
    For one key j, F_ij lies in the span of H vectors t_h = gamma (f_h(x_j) - mean), and only the
    weights A_h[i,j] depend on i. With T = [t_1 .. t_H] = Q R (Gram-Schmidt; Q orthonormal),
        |sum_h A_h t_h| = |Q R A| = |R A|,
    a vector of H numbers instead of D for each pair: O(L H^2 D + L^2 H^2), not O(L^2 H D).
    """
    xp = get_array_module(cache["x"])
    _, _, v, a, _, _ = cache["attention"][place]
    n_heads, length = v.shape[1], group.length
    n = min(recent or length, length)
    a = xp.broadcast_to(a, v.shape[:3] + (length,))[:, :, length - n :, length - n :]  # [g, H, n, n]
    r = triangle(key_vectors(cache, p, group, place, n))
    result = 0
    for i in range(n_heads):
        row = a[:, i] * r[i, i][:, None, :]  # of R A, [g, n, n]
        for h in range(i + 1, n_heads):
            row += a[:, h] * r[i, h][:, None, :]
        row *= row
        result += row
    xp.sqrt(result, out=result)
    result /= to_heads(cache["attention_norm"][1], group, 1)[:, 0, length - n :]  # sigma_i, [g, n, 1]
    each = xp.arange(n)
    result[:, each, each] = to_heads(own[:, None], group, 1)[:, 0, length - n :, 0]
    return result


def key_vectors(cache, p, group, place, n):
    """Return t_h = gamma (f_h(x_j) - mean) of the last n keys j, [H, g, n, D] (see contribution_norms)."""
    _, _, v, _, _, _ = cache["attention"][place]
    n_heads = v.shape[1]
    w_o = p["attention.w_o"].reshape(n_heads, -1, p["attention.w_o"].shape[1])  # [H, K, D]
    # gamma (z - mean z) is linear: done to W_o, it is done to every f_h(x_j).
    w_t = through_layer_norm(w_o, cache["attention_norm"])
    t = v[:, :, group.length - n :].swapaxes(0, 1).reshape(n_heads, group.count * n, -1) @ w_t
    return t.reshape(n_heads, group.count, n, -1)


def head_norms(cache, p, group, place):
    """Return |g_i(A_h[i,j] f_h(x_j))| of one block and group, each head alone: [g, H, L, L], query i, key j.

    Arguments as in contribution_norms. The residual x_i belongs to no head and is left out.
    """
    xp = get_array_module(cache["x"])
    a = cache["attention"][place][3]
    sizes = norms(key_vectors(cache, p, group, place, group.length)).swapaxes(0, 1)[:, :, None]  # [g, H, 1, L]
    sigma_inverse = 1 / to_heads(cache["attention_norm"][1], group, 1)  # [g, 1, L, 1]
    return xp.broadcast_to(a, sizes.shape[:2] + a.shape[-2:]) * sizes * sigma_inverse


def triangle(t):
    """Return {(i, h): [g, n]}, i <= h, the R of T = Q R for each sequence and key (Gram-Schmidt).

    t [H, g, n, D]: the H columns of T. What is left of a vector that depends on the earlier ones is
    rounding and no direction of its own: its row of R is 0.
    """
    xp = get_array_module(t)
    r, left = {}, []  # left: of each earlier vector, what is orthogonal to those before it, and 1/its norm
    for h, q in enumerate(t):
        square = 0
        for i, (earlier, inverse) in enumerate(left):
            r[i, h] = dots(earlier, q) * inverse
            q = q - earlier * (r[i, h] * inverse)[..., None]
            square = square + r[i, h] * r[i, h]
        size = norms(q)
        own = size > 100 * xp.finfo(t.dtype).eps * xp.sqrt(square + size * size)
        r[h, h] = size * own
        left.append((q, own / xp.maximum(size, TINY)))
    return r


def pieces(lengths, xp):
    """Cut sequences of lengths [B] into pieces of work: a list of index arrays."""
    return cut(lengths, 1, MICRO_BATCHES * plan(xp).micro_batch_tokens)[0]


def block_caches(parameters, config, sequence, starts, lengths):
    """Run sequence[start : start + length] without dropout; return the Batch and the blocks' caches.

    Groups are dense on every backend: the last positions of a group's sequences are then aligned.
    """
    xp = get_array_module(parameters["item_embedding"])
    batch = pack(sequence, starts, lengths, xp, with_targets=False)
    batch = batch._replace(groups=make_groups(batch.lengths, None, xp))
    _, cache = forward(parameters, config, batch)
    return batch, cache["blocks"]


def decompose(parameters, config, sequences, run=map, progress=None):
    """Decompose every block at every position of the sequences.

    sequences: list of 1-D integer arrays, oldest item first, none empty; the last max_length items of
    each are used. run: a workers.worker_map; progress: called with the number of tokens done since its
    last call. Returns a dict of host arrays; tokens [N] are in the
    order given, sequence after sequence, oldest position first:
        blocks      a list of {"attn", "attn_res", "attn_res_ln": [N], "entropy": [N, H],
                    "attention", "contribution": [RECENT, RECENT]}, the last two being means over
                    sequences, aligned at the LATEST position (the last row and column)
        sequences   [N] the number of the sequence; positions [N] 0 = oldest kept; latest [N] bool
    Raises UserError for an empty sequence or an item outside 0..V-1.
    """
    xp = get_array_module(parameters["item_embedding"])
    if not len(sequences) or not all(len(s) for s in sequences):
        raise UserError("decompose needs at least one sequence, and none empty")
    sequences = [np.asarray(s)[-config.max_length :] for s in sequences]
    flat, lengths = np.concatenate(sequences), np.array([len(s) for s in sequences])
    check_items(flat, config)
    offsets = np.cumsum(lengths) - lengths
    positions = np.arange(len(flat)) - np.repeat(offsets, lengths)
    dtype = parameters["item_embedding"].dtype
    blocks = [
        {name: np.empty(len(flat), dtype) for name in RATIOS}
        | {"entropy": np.empty((len(flat), config.n_heads), dtype)}
        | {name: np.zeros((RECENT, RECENT)) for name in ("attention", "contribution")}
        for _ in range(config.n_blocks)
    ]

    def decompose_piece(piece):
        batch, caches = block_caches(parameters, config, flat, offsets[piece], lengths[piece])
        # Row r of the packed batch is row `rows[r]` of the tokens in the order given.
        own = np.cumsum(batch.lengths) - batch.lengths
        rows = np.arange(len(batch.items)) + np.repeat(offsets[piece][batch.order] - own, batch.lengths)
        results = []
        for i, cache in enumerate(caches):
            p = below(parameters, f"blocks.{i}.")
            ratios, own = mixing_ratios(cache, p, batch.groups)
            values = ratios | {"entropy": entropies(cache, batch.groups)}
            values = {name: to_host(value) for name, value in values.items()}
            maps = {name: np.zeros((RECENT, RECENT)) for name in ("attention", "contribution")}
            for place, group in enumerate(batch.groups):
                n = min(RECENT, group.length)
                recent = (slice(RECENT - n, None),) * 2
                norm = contribution_norms(cache, p, own, group, place, RECENT)
                a = cache["attention"][place][3]
                a = xp.broadcast_to(a, (group.count, config.n_heads) + a.shape[-2:])[..., -n:, -n:]
                maps["attention"][recent] += to_host(a.mean(axis=1).sum(axis=0))
                maps["contribution"][recent] += to_host(norm.sum(axis=0))
            results.append((values, maps))
        return rows, results

    for rows, results in run(decompose_piece, pieces(lengths, xp)):
        for block, (values, maps) in zip(blocks, results, strict=True):
            for name, value in values.items():
                block[name][rows] = value
            for name, value in maps.items():
                block[name] += value
        if progress:
            progress(len(rows))
    # How many sequences reach back to each cell; keys after the query are no cells at all.
    reach = np.array([(lengths >= RECENT - i).sum() for i in range(RECENT)])
    seen = np.where(np.tri(RECENT, dtype=bool), reach[None, :], 0)
    for block in blocks:
        for name in ("attention", "contribution"):
            block[name] = np.where(seen > 0, block[name] / np.maximum(seen, 1), np.nan)
    return {
        "blocks": blocks,
        "sequences": np.repeat(np.arange(len(lengths)), lengths),
        "positions": positions,
        "latest": positions == np.repeat(lengths, lengths) - 1,
    }


def describe(values):
    """Return {"mean", "median", "std", "n"} of an array; std divides by n; None where n = 0."""
    if not values.size:
        return {"mean": None, "median": None, "std": None, "n": 0}
    values = values.astype(np.float64)
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "std": float(values.std()),
        "n": int(values.size),
    }


def summarise(result):
    """Summarise decompose's result: per block, and over all blocks at three choices of positions.

    all: every valid position (the paper's figure); without_first: without position 0, whose ratio
    is 0 by construction; latest: the position that predicts. Entropy never counts position 0.
    """
    first = result["positions"] == 0

    def over(blocks, chosen):
        summary = {name: describe(np.concatenate([b[name][chosen] for b in blocks])) for name in RATIOS}
        entropy = np.concatenate([b["entropy"][chosen & ~first] for b in blocks])
        return summary | {"entropy": describe(entropy)}

    everywhere = np.ones_like(first)
    return {
        "blocks": [over([block], everywhere) for block in result["blocks"]],
        "all": over(result["blocks"], everywhere),
        "without_first": over(result["blocks"], ~first),
        "latest": over(result["blocks"], result["latest"]),
    }


def contributions(parameters, config, sequence):
    """Return |g_i(F_ij + delta_ij x_i)| of one sequence, as a list of [L, L] host arrays, one a block."""
    sequence = np.asarray(sequence)[-config.max_length :]
    batch, caches = block_caches(parameters, config, sequence, np.array([0]), np.array([len(sequence)]))
    found = []
    for i, cache in enumerate(caches):
        p = below(parameters, f"blocks.{i}.")
        _, own = mixing_ratios(cache, p, batch.groups)
        found.append(to_host(contribution_norms(cache, p, own, batch.groups[0], 0)[0]))
    return found
