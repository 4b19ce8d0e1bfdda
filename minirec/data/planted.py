"""Four small logs whose answer is known because we planted it.

    chain      The next item is one of three successors of the last one. Only the last item matters:
               nothing need be mixed.
    taste      Every item is drawn from the user's own mixture of genres. The whole history matters
               equally and its order not at all: a plain average is all that mixing needs.
    drift      Interest moves on: the next item is a successor, in the same chain, of one of the last three, by chance.
               The recent past matters and the rest does not: weights that fall off with age, the same for
               everybody, are all that mixing needs.
    household  Three people share an account and take turns, each following the chain: the next item
               follows from the item THREE back, and the last two tell nothing. Attention must pick one
               position, which neither an average nor a decay can.

Each has 200 items and some 1,000 users, so that a model trains in seconds. In taste and drift nobody has
an item twice.
"""

import numpy as np

from minirec.data.log import Log

N_USERS, N_ITEMS, N_SUCCESSORS = 1200, 200, 3
SHORTEST, LONGEST = 8, 24
N_TASTES, N_GENRES, CONCENTRATION = 3000, 8, 0.3  # of taste: users; six in ten of a user's items are of two genres
LOOKS_BACK = 3  # of drift


def chain(seed=0):
    """Return a Log in which x[t] is one of three successors of x[t - 1]."""
    return _follow_chain(seed, back=1)


def household(seed=0):
    """Return a Log in which x[t] is one of three successors of x[t - 3]."""
    return _follow_chain(seed, back=3)


def _follow_chain(seed, back):
    rng = np.random.default_rng(seed)
    successors = _successors(rng)
    sequences = []
    for length in rng.integers(SHORTEST, LONGEST + 1, N_USERS):
        x = list(rng.integers(N_ITEMS, size=back))
        while len(x) < length:
            x.append(rng.choice(successors[x[-back]]))
        sequences.append(x)
    return _log(sequences)


def _successors(rng):
    return np.stack([rng.choice(N_ITEMS, N_SUCCESSORS, replace=False) for _ in range(N_ITEMS)])


def drift(seed=0):
    """Return a Log in which x[t] is a new one of the successors of x[t - 1], x[t - 2] or x[t - 3], by chance."""
    rng = np.random.default_rng(seed)
    successors = _successors(rng)
    sequences = []
    for length in rng.integers(SHORTEST, LONGEST + 1, N_USERS):
        x = list(rng.choice(N_ITEMS, LOOKS_BACK, replace=False))
        while len(x) < length:
            new = [item for item in successors[x[-rng.integers(1, LOOKS_BACK + 1)]] if item not in x]
            x.append(rng.choice(new or np.setdiff1d(np.arange(N_ITEMS), x)))
        sequences.append(x)
    return _log(sequences)


def taste(seed=0):
    """Return a Log in which user u's items are drawn from u's own mixture of genres, each item once at most.

    Within a genre, item number k is drawn 1/k times as often as the first one.
    """
    rng = np.random.default_rng(seed)
    genre, popularity = np.arange(N_ITEMS) % N_GENRES, 1 / (1 + np.arange(N_ITEMS) // N_GENRES)
    sequences = []
    for length in rng.integers(SHORTEST, LONGEST + 1, N_TASTES):
        liking = rng.dirichlet(np.full(N_GENRES, CONCENTRATION))
        chances = np.maximum(liking[genre] * popularity, 1e-9)
        sequences.append(np.argsort(-np.log(chances) - rng.gumbel(size=N_ITEMS))[:length])  # without replacement
    return _log(sequences)


def _log(sequences):
    return Log(
        users=[f"account {u}" for u in range(len(sequences))],
        items=[f"item {i}" for i in range(N_ITEMS)],
        offsets=np.cumsum([0] + [len(x) for x in sequences]),
        sequence=np.concatenate(sequences).astype(np.int32),
    )


DATASETS = {"chain": chain, "taste": taste, "drift": drift, "household": household}
