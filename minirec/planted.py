"""Small datasets whose answer is known because we planted it.

`household`: two people share an account and take turns. Each follows a chain of their own, so the
next item follows from the item TWO back, and the last item tells nothing: learned attention,
which can look at one chosen position, is needed, and a plain average of the past is not enough.
"""

import numpy as np

from minirec.data import Log

N_USERS, N_ITEMS, N_SUCCESSORS = 1500, 200, 3
SHORTEST, LONGEST = 8, 24


def household(seed=0):
    """Return a Log of 1,500 accounts and 200 items: x[t] is one of three successors of x[t - 2]."""
    rng = np.random.default_rng(seed)
    successors = np.stack([rng.choice(N_ITEMS, N_SUCCESSORS, replace=False) for _ in range(N_ITEMS)])
    sequences = []
    for length in rng.integers(SHORTEST, LONGEST + 1, N_USERS):
        x = list(rng.integers(N_ITEMS, size=2))
        while len(x) < length:
            x.append(rng.choice(successors[x[-2]]))
        sequences.append(x)
    return Log(
        users=[f"account {u}" for u in range(N_USERS)],
        items=[f"item {i}" for i in range(N_ITEMS)],
        offsets=np.cumsum([0] + [len(x) for x in sequences]),
        sequence=np.concatenate(sequences).astype(np.int32),
    )


DATASETS = {"household": household}
