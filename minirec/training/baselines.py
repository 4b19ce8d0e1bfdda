"""Two rankings without learning, which tell whether a model is any good: counts of the training part.

    popularity    how often an item was interacted with
    transitions   how often it followed the user's last item; equal counts: the more popular one first

Scores of all items are never made. Few items ever followed a given one; the others rank by popularity alone. So
those that stand before a target are counted by popularity first. Then the count is put right for the items that did
follow, and for those that the user has seen. All of it is done in integers: equal scores are equal.

Symbols: n interactions, V items, P distinct transitions, M cases, c cases in a chunk.
"""

import numpy as np

from minirec.data.split import distinct
from minirec.packing import spans
from minirec.training.ranking import MISS

BASELINES = ("popularity", "transitions")
PLACES_AT_A_TIME = 1 << 17  # entries of histories and of transitions in a chunk of cases: they bound the memory


def rank_baselines(log, split, cases, filter_seen=True):
    """Rank each case's target among all items by each of BASELINES.

    log: data.Log; split: its Split, whose training part is counted; cases: Targets; filter_seen: whether the items of
    the user's history are no candidates. Returns {baseline: [M] ranks}, as from ranking.rank_targets.
    """
    sequence, n_items = log.sequence, len(log.items)
    edges = np.zeros(len(sequence) + 1, np.int8)  # where a user's training part begins, and where it ends
    edges[log.offsets[:-1]] = 1
    np.subtract.at(edges, log.offsets[:-1] + split.train_lengths, 1)  # empty parts may share an end
    trained = np.cumsum(edges[:-1], dtype=np.int8).astype(bool)  # [n]
    popularity = np.bincount(sequence[trained], minlength=n_items)
    trained[log.offsets[:-1]] = False  # a user's first item follows nothing
    pairs = sequence[:-1][trained[1:]].astype(np.int64) * n_items + sequence[1:][trained[1:]]
    pairs.sort()
    first = np.flatnonzero(np.append(True, pairs[1:] != pairs[:-1])[: len(pairs)])  # of equal ones
    pairs, counts = pairs[first], np.diff(first, append=len(pairs))
    return {
        "popularity": rank_by_counts(popularity, pairs[:0], counts[:0], sequence, cases, filter_seen),
        "transitions": rank_by_counts(popularity, pairs, counts, sequence, cases, filter_seen),
    }


def rank_by_counts(popularity, pairs, counts, sequence, cases, filter_seen):
    """Rank each case's target by how often it followed the last item of the history, then by popularity; [M].

    popularity [V]; pairs [P]: item * V + the item that followed it, ascending, each once; counts [P].
    """
    n_items, by_popularity = len(popularity), np.sort(popularity)
    transition = 1 + by_popularity[-1]  # what a transition scores: more than any popularity
    pairs, counts = np.append(pairs, n_items**2), np.append(counts, 0)  # a last pair, for all that are not found

    def score(last, item):
        """Return the scores of items after the last ones."""
        wanted = last * n_items + item
        place = np.searchsorted(pairs, wanted)
        return np.where(pairs[place] == wanted, counts[place], 0) * transition + popularity[item]

    lasts = sequence[cases.stops - 1].astype(np.int64)  # [M]
    firsts = np.searchsorted(pairs, lasts * n_items)  # of the pairs that begin with the last item
    n_followers = np.searchsorted(pairs, (lasts + 1) * n_items) - firsts
    ranks = np.empty(len(lasts), np.int64)
    sizes = np.cumsum(n_followers + cases.stops - cases.starts)
    for chunk in np.split(np.arange(len(lasts)), np.flatnonzero(np.diff(sizes // PLACES_AT_A_TIME)) + 1):
        starts, stops, last = cases.starts[chunk], cases.stops[chunk], lasts[chunk]
        target = sequence[stops]
        least = score(last, target)  # [c]: whoever scores as much stands before the target, so ties count against it
        ahead = n_items - np.searchsorted(by_popularity, least) - 1  # the target itself apart
        case = np.repeat(np.arange(len(chunk)), n_followers[chunk])
        place = spans(firsts[chunk], n_followers[chunk])
        followed = popularity[pairs[place] - last[case] * n_items]  # how popular what followed is
        ahead += count_ahead(case, counts[place] * transition + followed, least) - count_ahead(case, followed, least)
        if filter_seen:
            case = np.repeat(np.arange(len(chunk)), stops - starts)
            seen = case * n_items + sequence[spans(starts, stops - starts)]
            case, seen = np.divmod(distinct(seen), n_items)
            ahead -= count_ahead(case, score(last[case], seen), least)
            ahead[case[seen == target[case]]] = MISS
        ranks[chunk] = ahead
    return ranks


def count_ahead(case, scores, least):
    """Count, for each case, its scores that reach least [c]; case: whose score each one is. Returns [c]."""
    return np.bincount(case[scores >= least[case]], minlength=len(least))
