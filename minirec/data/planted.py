"""Three small datasets whose answer is known because we planted it.

    chain      The next item is one of three successors of the last one. Only the last item matters:
               nothing need be mixed.
    taste      Every item is drawn from the user's own mixture of genres. The whole history matters
               equally and its order not at all: a plain average is all that mixing needs.
    household  Two people share an account and take turns, each following the chain: the next item
               follows from the item TWO back, and the last one tells nothing. Attention must pick one
               position, which an average cannot.

Each has 1,500 users and 200 items, so that a model trains in seconds.
"""

import numpy as np

from minirec.data.log import Log

N_USERS, N_ITEMS, N_SUCCESSORS = 1500, 200, 3
SHORTEST, LONGEST = 8, 24
N_GENRES, CONCENTRATION = 8, 0.5  # of taste: four in ten of a user's items are of the favourite genre
LONGER = 8  # taste's histories have so many items more: the average must have something to average


def chain(seed=0):
    """Return a Log in which x[t] is one of three successors of x[t - 1]."""
    return _follow_chain(seed, back=1)


def household(seed=0):
    """Return a Log in which x[t] is one of three successors of x[t - 2]."""
    return _follow_chain(seed, back=2)


def _follow_chain(seed, back):
    rng = np.random.default_rng(seed)
    successors = np.stack([rng.choice(N_ITEMS, N_SUCCESSORS, replace=False) for _ in range(N_ITEMS)])
    sequences = []
    for length in rng.integers(SHORTEST, LONGEST + 1, N_USERS):
        x = list(rng.integers(N_ITEMS, size=back))
        while len(x) < length:
            x.append(rng.choice(successors[x[-back]]))
        sequences.append(x)
    return _log(sequences)


def taste(seed=0):
    """Return a Log in which user u's items are drawn, each for itself, from u's own mixture of genres."""
    rng = np.random.default_rng(seed)
    genre = np.arange(N_ITEMS) % N_GENRES
    sequences = []
    for length in LONGER + rng.integers(SHORTEST, LONGEST + 1, N_USERS):
        liking = rng.dirichlet(np.full(N_GENRES, CONCENTRATION))
        sequences.append(rng.choice(N_ITEMS, length, p=liking[genre] * N_GENRES / N_ITEMS))
    return _log(sequences)


def _log(sequences):
    return Log(
        users=[f"account {u}" for u in range(N_USERS)],
        items=[f"item {i}" for i in range(N_ITEMS)],
        offsets=np.cumsum([0] + [len(x) for x in sequences]),
        sequence=np.concatenate(sequences).astype(np.int32),
    )


DATASETS = {"chain": chain, "taste": taste, "household": household}
