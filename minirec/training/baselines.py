"""Two rankings that learn nothing, to compare a model with: they count in the training part.

    popularity    how often an item was interacted with
    transitions   how often it followed the user's last item; equal counts: the more popular one first

Scores of all items are never computed. Few items ever followed a certain one; the others rank by popularity alone. So
the items that stand before a target are counted by popularity first. Then the count is corrected for the items that did
follow, and for those that the user has seen. All of it is done in integers: equal scores are equal.

Symbols: n interactions, V items, P distinct transitions, M targets, c of them in a chunk.
"""

import numpy as np

from minirec.data.split import distinct
from minirec.packing import spans
from minirec.training.ranking import MISS

ENTRIES_AT_A_TIME = 1 << 17  # of histories and of transitions in a chunk of targets: they bound the memory


def rank_baselines(log, split, targets, filter_seen=True):
    """Rank each target among all items by popularity, and by transitions.

    log: data.Log; split: its Split, whose training part is counted; targets: Targets; filter_seen: whether the items of
    the user's history are no candidates. Returns {baseline: [M] ranks}, as from ranking.rank_targets.
    """
    sequence, starts, lengths, n_items = log.sequence, log.offsets[:-1], split.train_lengths, len(log.items)
    popularity = np.bincount(sequence[spans(starts, lengths)], minlength=n_items)
    followed = spans(starts, np.maximum(lengths - 1, 0))  # where each item that another follows lies
    pairs = sequence[followed].astype(np.int64) * n_items + sequence[followed + 1]
    pairs, counts = np.unique(pairs, return_counts=True)
    return {
        "popularity": rank_by_counts(popularity, pairs[:0], counts[:0], sequence, targets, filter_seen),
        "transitions": rank_by_counts(popularity, pairs, counts, sequence, targets, filter_seen),
    }


def rank_by_counts(popularity, pairs, counts, sequence, targets, filter_seen):
    """Rank each target by how often it followed the last item of the history, then by popularity; [M].

    popularity [V]; pairs [P]: item * V + the item that followed it, ascending, each once; counts [P].
    """
    n_items, by_popularity = len(popularity), np.sort(popularity)
    transition = 1 + by_popularity[-1]  # what a transition scores: more than any popularity
    pairs, counts = np.append(pairs, n_items**2), np.append(counts, 0)  # a last pair, for all that are not found

    def score(last, item):
        """Return the scores of items after the last ones."""
        wanted = last * n_items + item
        index = np.searchsorted(pairs, wanted)
        return np.where(pairs[index] == wanted, counts[index], 0) * transition + popularity[item]

    lasts = sequence[targets.stops - 1].astype(np.int64)  # [M]
    firsts = np.searchsorted(pairs, lasts * n_items)  # of the pairs that begin with the last item
    n_followers = np.searchsorted(pairs, (lasts + 1) * n_items) - firsts
    ranks = np.empty(len(lasts), np.int64)
    sizes = np.cumsum(n_followers + targets.stops - targets.starts)
    for chunk in np.split(np.arange(len(lasts)), np.flatnonzero(np.diff(sizes // ENTRIES_AT_A_TIME)) + 1):
        starts, stops, last = targets.starts[chunk], targets.stops[chunk], lasts[chunk]
        target = sequence[stops]
        least = score(last, target)  # [c]: whoever scores as much stands before the target, so ties count against it
        ahead = n_items - np.searchsorted(by_popularity, least) - 1  # the target itself apart
        row = np.repeat(np.arange(len(chunk)), n_followers[chunk])
        index = spans(firsts[chunk], n_followers[chunk])
        followed = popularity[pairs[index] - last[row] * n_items]  # how popular what followed is
        ahead += count_ahead(row, counts[index] * transition + followed, least) - count_ahead(row, followed, least)
        if filter_seen:
            row = np.repeat(np.arange(len(chunk)), stops - starts)
            seen = row * n_items + sequence[spans(starts, stops - starts)]
            row, seen = np.divmod(distinct(seen), n_items)
            ahead -= count_ahead(row, score(last[row], seen), least)
            ahead[row[seen == target[row]]] = MISS
        ranks[chunk] = ahead
    return ranks


def count_ahead(row, scores, least):
    """Count, for each of c targets, the scores that reach least [c]; row: whose score each one is. Returns [c]."""
    return np.bincount(row[scores >= least[row]], minlength=len(least))
