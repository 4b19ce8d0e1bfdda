"""Two rankings without learning, which tell whether a model is any good: counts of the training part.

    popularity    how often an item was interacted with
    transitions   how often it followed the user's last item; equal counts: the more popular one first

Symbols: U users, V items, M cases, c cases in a chunk.
"""

import numpy as np

from minirec.data import users_of
from minirec.evaluate import chunks, ranks_of, remove_seen
from minirec.packing import chunk_rows

BASELINES = ("popularity", "transitions")


def rank_baselines(log, split, cases):
    """Rank each case's target among all items by each of BASELINES, seen items being no candidates.

    log: data.Log; split: its data.Split, whose training part is counted; cases: data.Cases.
    Returns {baseline: [M] ranks, 0 = best}, as from evaluate.rank_targets. Raises ImportError without scipy.
    """
    from scipy.sparse import csr_array

    n_items = len(log.items)
    places = np.arange(len(log.sequence)) - np.repeat(log.offsets[:-1], np.diff(log.offsets))
    trained = places < split.train_lengths[users_of(log)]
    popularity = np.bincount(log.sequence[trained], minlength=n_items) / (len(log.sequence) + 1)  # all below 1
    follows = np.flatnonzero(trained & (places > 0))
    pairs = (log.sequence[follows - 1], log.sequence[follows])
    transitions = csr_array((np.ones(len(follows)), pairs), shape=(n_items, n_items))  # equal pairs are summed
    ranks = {name: [] for name in BASELINES}
    for chunk in chunks(len(cases.stops), chunk_rows(np, n_items, 8)):
        starts, stops = cases.starts[chunk], cases.stops[chunk]
        scores = {
            "popularity": np.tile(popularity, (len(stops), 1)),
            "transitions": transitions[log.sequence[stops - 1]].toarray() + popularity,
        }
        for name in BASELINES:
            remove_seen(scores[name], log.sequence, starts, stops)
            ranks[name].append(ranks_of(log.sequence[stops], scores[name], np.zeros(len(stops))))
    return {name: np.concatenate(parts) for name, parts in ranks.items()}
