"""Four small logs whose answer is known because we planted it.

    chain      The next item is one of three successors of the last one. Only the last item matters:
               nothing need be mixed.
    taste      Every item is drawn from the user's own mixture of genres. The whole history matters
               equally and its order not at all: a plain average is all that mixing needs.
    drift      Interest moves on: the next item is a successor, in a chain, of any of the last three.
               The recent past matters and the rest does not: weights that fall off with age, the same for
               everybody, are all that mixing needs.
    household  Three people share an account and take turns, each following a chain: the next item
               follows from the item THREE back, and the last two tell nothing. Attention must pick one
               position, which neither an average nor a decay can.

Each has 200 items and 1,500 or 3,000 users, so that a model trains in seconds. Nobody has an item twice.

Symbols: U users, V items.
"""

import numpy as np

from minirec.data.log import Log

N_USERS, N_ITEMS = 1500, 200
SHORTEST, LONGEST = 12, 24
N_TASTES, N_GENRES, CONCENTRATION = 3000, 8, 0.2  # of taste: users; eight in ten of a user's items are of two genres


def chain(seed=0):
    """Return a Log in which x[t] follows x[t - 1]: one of three successors, which come 4 : 2 : 1 times."""
    return _follow_chain(seed, [1], often=(4, 2, 1))


def household(seed=0):
    """Return a Log in which x[t] is one of three successors of x[t - 3]."""
    return _follow_chain(seed, [3], often=(1, 1, 1))


def drift(seed=0):
    """Return a Log in which x[t] is one of three successors of any of the three items before."""
    return _follow_chain(seed, [1, 2, 3], often=(1, 1, 1))


def _follow_chain(seed, back, often):
    """Return a Log in which each item follows from one of those so many places `back`; the first ones are any."""
    rng = np.random.default_rng(seed)
    # How often the column's item follows the row's. Permutations make all items equally popular.
    follows = sum(rate * np.eye(N_ITEMS)[rng.permutation(N_ITEMS)] for rate in often)

    def chances(x):
        t = x.shape[1]
        return sum(follows[x[:, t - k]] for k in back) if t >= max(back) else np.ones((N_USERS, N_ITEMS))

    return _draw(rng, N_USERS, chances)


def taste(seed=0):
    """Return a Log in which user u's items are drawn from u's own mixture of genres.

    Within a genre, item number k is drawn 1/k times as often as the first one.
    """
    rng = np.random.default_rng(seed)
    genre, popularity = np.arange(N_ITEMS) % N_GENRES, 1 / (1 + np.arange(N_ITEMS) // N_GENRES)
    liking = rng.dirichlet(np.full(N_GENRES, CONCENTRATION), N_TASTES)[:, genre] * popularity
    return _draw(rng, N_TASTES, lambda x: liking)


def _draw(rng, n_users, chances):
    """Return a Log whose items are drawn one after the other, each from those that its user has not had.

    chances(x): how likely each item is to come next, up to a factor, [U, V], after the items x [U, t] so far. Where all
    likely ones are had, any other comes. Of exponential waiting times with rates w, item i's is the shortest with
    probability w_i / sum w.
    """
    lengths = rng.integers(SHORTEST, LONGEST + 1, n_users)
    x, unseen = np.empty((n_users, LONGEST), np.int32), np.ones((n_users, N_ITEMS))
    for t in range(LONGEST):
        rates = (chances(x[:, :t]) + 1e-9) * unseen
        x[:, t] = (rates / rng.exponential(size=rates.shape)).argmax(axis=1)
        unseen[np.arange(n_users), x[:, t]] = 0
    return Log(
        users=[f"account {u}" for u in range(n_users)],
        items=[f"item {i}" for i in range(N_ITEMS)],
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        sequence=x[np.arange(LONGEST) < lengths[:, None]],
    )


DATASETS = {"chain": chain, "taste": taste, "drift": drift, "household": household}
