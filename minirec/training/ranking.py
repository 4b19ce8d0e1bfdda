"""Ranking over all items, metrics, and recommending.

Symbols: M targets, each the item after a history; c of them in a chunk; V items, D hidden size.

Nothing is sampled: the target's rank is among all V items. Ties count against the target. With filter_seen, all items
of the user's whole history are removed from the candidates. A target that is one of them cannot be hit, and stays in
the mean as a miss.
"""

import itertools

import numpy as np

from minirec.backend import get_array_module, row_sum, to_device, to_host
from minirec.errors import UserError
from minirec.model import forward
from minirec.packing import chunk_rows, micro_batches, pack, plan, spans

CUTOFFS = (1, 5, 10, 20, 50, 100)
TARGETS_AT_A_TIME = 1024
MISS = 1 << 40  # the rank of a target that is no candidate


def last_representations(parameters, config, sequence, starts, stops):
    """Represent histories sequence[start:stop] by their last position, [c, D], without dropout."""
    xp = get_array_module(parameters["item_embedding"])
    out = xp.empty((len(starts), config.hidden_size), parameters["item_embedding"].dtype)
    lengths = np.minimum(stops - starts, config.max_length)
    for part in micro_batches(lengths, 1, plan(xp).micro_batch_tokens)[0]:
        batch = pack(sequence, stops[part] - lengths[part], lengths[part], xp, with_targets=False)
        x, _ = forward(parameters, config, batch)
        last = np.cumsum(batch.lengths) - 1
        out[to_device(part[batch.order], xp)] = x[to_device(last, xp)]
    return out


def largest_entry(items):
    """Return the largest |entry| of the item table [V, D] as a float; the table may be too large to copy."""
    return max(float(items.max()), -float(items.min()))


def check_scores(x, largest):
    """Raise UserError where scores of x [c, D] could overflow, as those of a model that diverged do.

    largest: the largest_entry of the item table.
    """
    bound = x.shape[1] * float(abs(x).max()) * largest  # of |x . item|
    if not bound < get_array_module(x).finfo(x.dtype).max:
        raise UserError("the model's scores are not finite: it diverged; train it again with a smaller --lr")


def remove_seen(scores, sequence, starts, stops):
    """Set scores [c, V] to -inf, in place, where row i's item is in sequence[starts[i]:stops[i]]."""
    xp = get_array_module(scores)
    rows = np.repeat(np.arange(len(starts)), stops - starts)
    seen = rows * scores.shape[1] + sequence[spans(starts, stops - starts)]
    scores.reshape(-1)[to_device(seen, xp)] = -xp.inf


def rounding_error(x, items):
    """Return by how much two scores that should be equal may differ, [c]; x, items [c, D], the target's.

    A score is a sum of D products. Rounding changes each product and each partial sum by a factor 1 + delta, with
    |delta| <= u = eps/2. A term x_d y_d meets at most D such factors. Their deltas have either sign and add up like a
    random walk, to about sqrt(D) u. So a score is off by about sqrt(D) u sum_d |x_d y_d| at most, and the difference
    of two scores by twice that:
        2 sqrt(D) u sum_d |x_d y_d| = sqrt(D) eps sum_d |x_d y_d| = 8 eps sum_d |x_d y_d|        for D = 64
    Twice that is taken, to be safe: in float32, 2e-6 of the score's size.
    """
    return 16 * get_array_module(x).finfo(x.dtype).eps * row_sum(abs(x) * abs(items))[:, 0]


def ranks_of(target, scores, rounding):
    """Return how many items stand before target [c] in scores [c, V], which are exact to `rounding` [c]; MISS at -inf.

    An item that is not clearly below the target stands before it. So a tie is never in the target's favour, not even
    where equal sums were rounded differently in different columns of a product.
    """
    xp = get_array_module(scores)
    score = scores[xp.arange(len(target)), target]  # [c]
    ahead = scores.shape[1] - (scores < (score - rounding)[:, None]).sum(axis=1) - 1  # the target itself apart
    return xp.where(xp.isfinite(score), ahead, MISS)


def chunks(n, size):
    """Return slices that cover 0..n-1, `size` at a time."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def rank_targets(parameters, config, sequence, targets, filter_seen=True, run=map):
    """Rank each target among all items, without sorting them.

    sequence: the log's flat items; targets: Targets; run: a parallel.worker_map.
    Yields the ranks chunk by chunk, as arrays on the host, in order: 0 = best, MISS = no candidate.
    """
    xp = get_array_module(parameters["item_embedding"])
    items = parameters["item_embedding"]
    rows, largest = chunk_rows(xp, config.n_items, items.dtype.itemsize), largest_entry(items)

    def rank(chunk):
        starts, stops = targets.starts[chunk], targets.stops[chunk]
        x = last_representations(parameters, config, sequence, starts, stops)
        check_scores(x, largest)
        ranks = []
        for part in chunks(len(starts), rows):
            scores = x[part] @ items.T  # [c, V]
            if filter_seen:
                remove_seen(scores, sequence, starts[part], stops[part])
            target = to_device(sequence[stops[part]], xp)
            ranks.append(ranks_of(target, scores, rounding_error(x[part], items[target])))
        return to_host(xp.concatenate(ranks))

    return run(rank, chunks(len(targets.stops), TARGETS_AT_A_TIME))


def user_values(ranks):
    """Return {"HR@1": ..., "NDCG@1": ..., "MRR@1": ..., ...} at CUTOFFS, an array [M] each; ranks [M], 0 = best.

    With one target after a history: HR@k = [rank < k], NDCG@k = [rank < k] / log2(rank + 2),
    MRR@k = [rank < k] / (rank + 1).
    """
    values = {}
    for k in CUTOFFS:
        hit = ranks < k
        values |= {f"HR@{k}": hit, f"NDCG@{k}": hit / np.log2(ranks + 2), f"MRR@{k}": hit / (ranks + 1)}
    return values


def metrics(ranks):
    """Return the means of user_values, as floats."""
    return {name: float(values.mean()) for name, values in user_values(ranks).items()}


def best_of(scores, k):
    """Return the k best columns of each row of scores [c, V], best first, and their scores; both [c, k].

    Equal scores: lower column first. Only what reaches the k-th best score is sorted.
    """
    least = np.partition(scores, -k, axis=1)[:, -k:].min(axis=1, keepdims=True)
    rows, columns = np.nonzero(scores >= least)  # at least k a row, columns ascending
    order = np.lexsort((-scores[rows, columns], rows))  # stable
    columns = columns[order][np.searchsorted(rows, np.arange(len(scores)))[:, None] + np.arange(k)]
    return columns, np.take_along_axis(scores, columns, axis=1)


def recommend(parameters, config, histories, k, run=map, filter_seen=True):
    """Return the k best items for each history, as (items [c, k], scores [c, k]) a chunk, in order.

    histories: an iterable of integer arrays, oldest item first, none empty. It is read a chunk at a time, so that there
    may be more of them than memory holds. Of equal scores the lower item number comes first. With filter_seen only
    unseen items are candidates; where there are fewer than k, the rest have score -inf.
    """
    items = parameters["item_embedding"]
    rows = chunk_rows(get_array_module(items), config.n_items, items.dtype.itemsize)
    k, largest = min(k, config.n_items), largest_entry(items)

    def best(chunk):
        lengths = np.array([len(history) for history in chunk])
        sequence, stops = np.concatenate(chunk), np.cumsum(lengths)
        x = last_representations(parameters, config, sequence, stops - lengths, stops)
        check_scores(x, largest)
        scores = x @ items.T  # [c, V]
        if filter_seen:
            remove_seen(scores, sequence, stops - lengths, stops)
        return best_of(to_host(scores), k)

    def read():
        unread = iter(histories)
        while chunk := list(itertools.islice(unread, rows)):
            yield chunk

    return run(best, read())
