"""How much does attention mix positions? The norm-based decomposition, from the forward caches.

Symbols: N tokens, D hidden size, H heads, K = D/H, L positions, B sequences of a bucket; m last queries, n keys.

What block input x_j contributes to the attention output at i (Kobayashi et al. 2020, 2021):

    f_h(x_j) = (x_j W_v,h + b_v,h) W_o,h        F_ij = sum_h A_h[i,j] f_h(x_j)

where W_v,h [D, K] is head h's columns of W_v, and W_o,h [K, D] its rows of W_o. Attention is linear once A is known:
    o_i = concat_h(sum_j A_h[i,j] v_h[j]) W_o + b_o = sum_j F_ij + b_o, a sum over positions.

    ratio         parts                                keeps          mixes
    attn          F_ij                                 F_ii           sum_{j != i} F_ij
    attn_res      F_ij + delta_ij x_i                  F_ii + x_i     the same
    attn_res_ln   g_i(F_ij + delta_ij x_i)             g_i(F_ii+x_i)  g_i of the rest

with g_i(z) = (z - mean z) / sigma_i * gamma, sigma_i that of the real layer norm's row x_i + o_i. Once sigma_i is
known, g_i is linear too, so
    sum_j g_i(F_ij + delta_ij x_i) + g_i(b_o) + beta = the layer norm's output, exactly.
b_o and beta belong to no position: they are in neither part. The mixing ratio is r_i = |mixes| / (|mixes| + |keeps|):
vectors are summed first, norms are taken last. It needs only the total and the diagonal, arrays [N, D]. A heatmap of
|g_i(F_ij + delta_ij x_i)| needs F itself, so it is made for the last few positions only.
"""

import numpy as np

from minirec.backend import get_array_module, row_mean, row_sum, to_host
from minirec.errors import UserError
from minirec.model import forward
from minirec.packing import check_items, from_heads, make_buckets, micro_batches, pack, plan, spans
from minirec.parameters import sub_dict

RATIOS = ("attn", "attn_res", "attn_res_ln")
HEATMAPS = ("attention", "contribution")
RECENT = 15  # positions in a heatmap
CHUNK = 2  # micro-batches in a chunk of work: there is no backward, so larger chunks keep threads busier
TINY = 1e-30  # keeps 0/0 at 0


def norms(x):
    """Return the Euclidean norm of each last-axis vector of x."""
    return get_array_module(x).sqrt(row_sum(x * x))[..., 0]


def centred(z, gamma):
    """Return gamma (z - mean z), [..., D]: g_i(z) without the division by sigma_i."""
    return (z - row_mean(z)) * gamma


def keep_and_mix(cache, p, buckets):
    """Return F_ii and sum_{j != i} F_ij of one block, both [N, D].

    cache: the block's forward cache; p: its parameters, named without "blocks.I."; buckets: of the batch.
    The difference is taken before W_o, so position 0, which sees only itself, mixes exactly 0.
    """
    xp = get_array_module(cache["x"])
    total = cache["o"].x  # concat_h A_h v_h, [N, D]
    kept = xp.empty_like(total)
    for bucket, attention in zip(buckets, cache["attention"], strict=True):
        diagonal = xp.diagonal(attention.weights, axis1=-2, axis2=-1)[..., None]  # A_h[i,i]
        from_heads(diagonal * attention.v, bucket, kept)
    return kept @ p["attention.w_o"], (total - kept) @ p["attention.w_o"]


def mixing_ratios(cache, p, buckets):
    """Return {ratio: [N]} of one block (see keep_and_mix)."""
    xp = get_array_module(cache["x"])
    keep, mix = keep_and_mix(cache, p, buckets)
    keep_res, gamma = keep + cache["x"], p["attention_norm.gamma"]
    parts = {
        "attn": (keep, mix),
        "attn_res": (keep_res, mix),
        "attn_res_ln": (centred(keep_res, gamma), centred(mix, gamma)),  # 1/sigma_i cancels in the ratio
    }
    sizes = {name: (norms(keeps), norms(mixes)) for name, (keeps, mixes) in parts.items()}
    return {name: mixes / xp.maximum(mixes + keeps, TINY) for name, (keeps, mixes) in sizes.items()}


def entropies(cache, buckets):
    """Return the entropy of each row of A over its largest possible value, log(i + 1), as [N, H].

    Position 0 sees only itself; its 0/0 is 0 here and left out of every summary.
    """
    xp, first = get_array_module(cache["x"]), cache["attention"][0].v
    out = xp.empty((len(cache["x"]), first.shape[1]), first.dtype)
    possible = -xp.maximum(xp.log(xp.arange(1, int(max(b.length for b in buckets)) + 1, dtype=first.dtype)), TINY)
    for bucket, attention in zip(buckets, cache["attention"], strict=True):
        a = attention.weights
        plogp = (a * xp.log(xp.maximum(a, TINY))).sum(axis=-1)  # [B, H, L] or [L]; 0 log 0 is 0
        entropy = plogp / possible[: bucket.length]  # possible is negative too, so this is positive
        from_heads(xp.broadcast_to(entropy, attention.v.shape[:3])[..., None], bucket, out)
    return out


def recent_weights(attention, m, n):
    """Return A [B, H, m, n] of the last m queries and n keys of a dense bucket."""
    a = attention.weights[..., -m:, -n:]
    return get_array_module(a).broadcast_to(a, (*attention.v.shape[:2], m, n))


def recent_parts(cache, p, bucket, attention, m, n):
    """Return A [B, H, m, n], f_h(x_j) [B, H, n, D] and sigma_i [B, m, 1] of the last m queries i and n keys j.

    cache, p: as in keep_and_mix; bucket: a dense one; attention: its AttentionCache.
    """
    v = attention.v[:, :, -n:]  # [B, H, n, K]
    w_o = p["attention.w_o"].reshape(v.shape[1], v.shape[3], -1)  # [H, K, D]
    sigma = cache["attention_norm"].sigma[bucket.start : bucket.stop].reshape(bucket.count, bucket.length, 1)
    return recent_weights(attention, m, n), v @ w_o, sigma[:, -m:]


def contribution_norms(cache, p, bucket, attention, m, n):
    """Return |g_i(F_ij + delta_ij x_i)| of one block, [B, m, n]: of the last m queries i and n keys j.

    Arguments as in recent_parts, m <= n. F [B, m, n, D] is built as it is defined, so it should be small.
    """
    a, f, sigma = recent_parts(cache, p, bucket, attention, m, n)
    parts = sum(a[:, h, :, :, None] * f[:, h, None] for h in range(a.shape[1]))  # F_ij, [B, m, n, D]
    x = cache["x"][bucket.start : bucket.stop].reshape(bucket.count, bucket.length, -1)
    parts.reshape(bucket.count, m * n, -1)[:, n - m :: n + 1] += x[:, -m:]  # x_i where the key is the query itself
    return norms(centred(parts, p["attention_norm.gamma"])) / sigma


def head_norms(cache, p, bucket, attention, m, n):
    """Return |g_i(A_h[i,j] f_h(x_j))| of one block, each head alone, [B, H, m, n] (see contribution_norms).

    The residual x_i belongs to no head and is left out. A_h[i,j] is a number, so it can be taken out of the norm.
    """
    a, f, sigma = recent_parts(cache, p, bucket, attention, m, n)
    return a * norms(centred(f, p["attention_norm.gamma"]))[:, :, None] / sigma[:, None]


def recent_maps(cache, p, buckets):
    """Return {heatmap: [RECENT, RECENT]} of one block, summed over the sequences, aligned at the latest position."""
    maps = {name: get_array_module(cache["x"]).zeros((RECENT, RECENT)) for name in HEATMAPS}
    for bucket, attention in zip(buckets, cache["attention"], strict=True):
        n = min(RECENT, bucket.length)
        maps["attention"][-n:, -n:] += recent_weights(attention, n, n).mean(axis=1).sum(axis=0)
        maps["contribution"][-n:, -n:] += contribution_norms(cache, p, bucket, attention, n, n).sum(axis=0)
    return maps


def block_caches(parameters, config, flat, starts, lengths):
    """Run flat[start : start + length] without dropout; return the Batch and the blocks' caches.

    Its buckets are dense on every backend, so that the last positions of a bucket's sequences are aligned.
    """
    xp = get_array_module(parameters["item_embedding"])
    batch = pack(flat, starts, lengths, xp, with_targets=False)
    batch = batch._replace(buckets=make_buckets(batch.lengths, None, xp))
    _, cache = forward(parameters, config, batch)
    return batch, cache["blocks"]


def work_chunks(lengths, xp):
    """Cut sequences of lengths [B] into chunks of work: a list of index arrays."""
    return micro_batches(lengths, 1, CHUNK * plan(xp).micro_batch_tokens)[0]


def decompose(parameters, config, sequences, run=map, progress=None):
    """Decompose every block at every position of the sequences.

    sequences: list of 1-D integer arrays, oldest item first, none empty; the last max_length items of each are used.
    run: maps a function over chunks of work, perhaps in parallel; progress: called with the number of tokens done since
    its last call. Returns a dict of host arrays, tokens [N] sequence after sequence, oldest position first:
        blocks      a list of {"attn", "attn_res", "attn_res_ln": [N], "entropy": [N, H],
                    "attention", "contribution": [RECENT, RECENT]}. The last two are aligned at the LATEST
                    position (the last row and column). A cell is the mean over the sequences that are long
                    enough to have it, of attention also over heads; where the key is after the query, it is NaN
        sequences   [N] the number of the sequence; positions [N] 0 = oldest kept; latest [N] bool
    Raises UserError for an empty sequence or an item outside 0..V-1.
    """
    xp = get_array_module(parameters["item_embedding"])
    if not len(sequences) or not all(len(s) for s in sequences):
        raise UserError("decompose needs at least one sequence, and none empty")
    sequences = [np.asarray(s)[-config.max_length :] for s in sequences]
    flat, lengths = np.concatenate(sequences), np.array([len(s) for s in sequences])
    check_items(flat, config.n_items)
    starts = np.cumsum(lengths) - lengths

    def decompose_chunk(chunk):
        batch, caches = block_caches(parameters, config, flat, starts[chunk], lengths[chunk])
        results = []
        for i, cache in enumerate(caches):
            p = sub_dict(parameters, f"blocks.{i}.")
            values = mixing_ratios(cache, p, batch.buckets) | {"entropy": entropies(cache, batch.buckets)}
            parts = values, recent_maps(cache, p, batch.buckets)
            results.append([{name: to_host(x) for name, x in part.items()} for part in parts])
        return spans(starts[chunk][batch.order], batch.lengths), results  # where the batch's rows lie among the tokens

    shapes = dict.fromkeys(RATIOS, (len(flat),)) | {"entropy": (len(flat), config.n_heads)}
    empty = lambda: {name: np.empty(shape, parameters["item_embedding"].dtype) for name, shape in shapes.items()}
    blocks = [empty() | {name: np.zeros((RECENT, RECENT)) for name in HEATMAPS} for _ in range(config.n_blocks)]
    for tokens, results in run(decompose_chunk, work_chunks(lengths, xp)):
        for block, (values, maps) in zip(blocks, results, strict=True):
            for name, value in values.items():
                block[name][tokens] = value
            for name in HEATMAPS:
                block[name] += maps[name]
        if progress:
            progress(len(tokens))
    # How many sequences reach back to each cell; a cell above the diagonal, a key after its query, counts 0.
    reach = np.array([(lengths >= RECENT - i).sum() for i in range(RECENT)])
    counts = np.where(np.tri(RECENT, dtype=bool), reach[None, :], 0)
    for block in blocks:
        for name in HEATMAPS:
            block[name] = np.where(counts > 0, block[name] / np.maximum(counts, 1), np.nan)
    positions = spans(np.zeros_like(lengths), lengths)
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
    x = values.astype(np.float64)
    return {"mean": float(x.mean()), "median": float(np.median(x)), "std": float(x.std()), "n": x.size}


def summarise(result):
    """Summarise decompose's result: per block, and over all blocks at three choices of positions.

    all: every position (the paper's figure); without_first: without position 0, whose ratio is 0 by construction;
    latest: the last position of each sequence. Entropy never counts position 0.
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
    """Return |g_i(F_ij + delta_ij x_i)| of one sequence, as a list of [L, L] host arrays, one a block.

    Raises UserError where it is empty, or an item is outside 0..V-1.
    """
    sequence = np.asarray(sequence)[-config.max_length :]
    check_items(sequence, config.n_items)
    length = len(sequence)
    batch, caches = block_caches(parameters, config, sequence, np.array([0]), np.array([length]))
    squares = []
    for i, cache in enumerate(caches):
        p = sub_dict(parameters, f"blocks.{i}.")
        squares.append(contribution_norms(cache, p, batch.buckets[0], cache["attention"][0], length, length)[0])
    return [to_host(square) for square in squares]
