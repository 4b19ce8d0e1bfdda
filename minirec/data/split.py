"""Splits of a log into what is trained on and what is to be predicted; training windows, negatives, batches.

Symbols: U users, V items, n interactions in all, M evaluated users.
"""

from typing import NamedTuple

import numpy as np

from minirec.data.log import SHORTEST_SPLIT, users_of
from minirec.errors import UserError
from minirec.packing import spans

TENTHS = 9  # of the times of interactions lie before the moment at which the temporal split cuts


class Targets(NamedTuple):
    """What is to be predicted: in log.sequence, sequence[stops] from sequence[starts:stops]."""

    users: np.ndarray  # [M]
    starts: np.ndarray  # [M] where the user's history begins, all of it
    stops: np.ndarray  # [M] where the target lies


class Split(NamedTuple):
    """What is trained on, and what is to be predicted from all before it."""

    train_lengths: np.ndarray  # [U] so many of the user's first interactions are trained on
    valid: Targets
    test: Targets


def leave_one_out(log):
    """Return the Split in which a user's last item is the test target, the one before it the validation's.

    Users with fewer than 3 interactions are kept for training only.
    """
    counts = np.diff(log.offsets)
    evaluated = counts >= SHORTEST_SPLIT
    trained = counts - 2 * evaluated
    return Split(trained, _targets(log, evaluated, trained), _targets(log, evaluated, counts - 1))


def temporal(log):
    """Return the Split at two moments: what was known then is trained on, what came later is predicted.

    The test begins after the 0.9 quantile of all times. Validation begins after the 0.9 quantile of the times before
    that, of the users with at least two interactions there (Kozaki et al. 2026: the others have nothing to validate).
    A user who was active in a part has their last item in it as its target, and all items before that as
    history; so nothing is trained on that happened after the moment at which the model is trained.
    Raises UserError for a log without times, or one in which a part has no target.
    """
    if log.times is None:
        raise UserError("the log has no timestamps, which --split temporal needs; use --split leave-one-out")
    users, counts = users_of(log), np.diff(log.offsets)
    before = log.times <= _quantile(log.times)
    known = np.bincount(users[before], minlength=len(counts))
    usable = before & (known >= 2)[users]
    valid_begins = _quantile(log.times[usable]) if usable.any() else -np.inf
    trained = np.bincount(users[log.times <= valid_begins], minlength=len(counts))
    valid, test = ((after > before) & (after > 1) for before, after in ((trained, known), (known, counts)))
    for part, evaluated in (("validation", valid), ("test", test)):
        if not evaluated.any():
            raise UserError(f"--split temporal: no user has a target for {part}; use --split leave-one-out")
    return Split(trained, _targets(log, valid, known - 1), _targets(log, test, counts - 1))


def _quantile(times):
    """Return the quantile of times below which TENTHS tenths of them lie, interpolated between two neighbours in order.

    It is exact for integers, rounded down, after which the same integers are above it: as float64, NumPy rounds
    nanoseconds of our days to 256 of them.
    """
    place, tenths = divmod(TENTHS * (len(times) - 1), 10)
    low, high = np.partition(times, (ends := [place, place + (tenths > 0)]))[ends].tolist()
    return low + ((high - low) * tenths / 10 if isinstance(low, float) else (high - low) * tenths // 10)


def _targets(log, evaluated, places):
    """Return the Targets of users where evaluated [U] is true, their targets at places [U] of their histories."""
    users = np.flatnonzero(evaluated)
    return Targets(users, log.offsets[users], log.offsets[users] + places[users])


SPLITS = {"leave-one-out": leave_one_out, "temporal": temporal}


def training_windows(log, split, max_length):
    """Return starts, lengths of the training inputs in log.sequence, one window a user with a target.

    A window holds the last max_length positions that have a next item within the training part.
    """
    stops = log.offsets[:-1] + split.train_lengths - 1  # the last item is target only
    lengths = np.minimum(split.train_lengths - 1, max_length)
    keep = lengths >= 1
    return (stops - lengths)[keep], lengths[keep]


def distinct(keys):
    """Return integers [n] in ascending order, each once. np.unique hashes them since NumPy 2.3, which is far slower."""
    keys = np.sort(keys)
    return keys[np.append(True, keys[1:] != keys[:-1])[: len(keys)]]


def windows_end_to_end(sequence, starts, lengths):
    """Copy inputs and targets of a batch out of the log: sequence[start : start + length + 1] each.

    Returns flat [n] and the starts [B] of the windows in it.
    """
    sizes = lengths + 1
    return sequence[spans(starts, sizes)], np.cumsum(sizes) - sizes


class Seen(NamedTuple):
    """The items that each user was trained on, each once, s_0 < s_1 < ... of a user, as unseen_negatives needs them."""

    offsets: np.ndarray  # [U + 1]; user u's are gaps[offsets[u]:offsets[u + 1]]
    gaps: np.ndarray  # u * V + s_j - j, ascending: so many of the user's unseen items lie below s_j


def seen_items(log, split):
    """Return the Seen of everything that is trained on."""
    users = np.repeat(np.arange(len(log.users)), split.train_lengths)
    items = log.sequence[spans(log.offsets[:-1], split.train_lengths)]
    pairs = distinct(users * len(log.items) + items)
    counts = np.bincount(pairs // len(log.items), minlength=len(log.users))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return Seen(offsets, pairs - (np.arange(len(pairs)) - np.repeat(offsets[:-1], counts)))


def unseen_negatives(rng, users, targets, n_items, seen):
    """Draw, for each of n positions, an item uniformly from those that its user was not trained on.

    users, targets [n]: the user and the next item of each position; seen: Seen. For a user who was trained on all
    items the draw is from all items but the position's target: a model must not be taught both that an item comes
    next and that it does not. Needs n_items >= 2. Returns [n].

    The x-th unseen item of a user, from 0, is x plus the number of seen items below it. A seen item s_j has j seen
    and so s_j - j unseen items below it: it lies below the x-th unseen one where s_j - j <= x.
    """
    n_seen = np.diff(seen.offsets)[users]
    has_all = n_seen == n_items
    x = rng.integers(n_items - np.where(has_all, 1, n_seen))
    n_below = np.searchsorted(seen.gaps, users * n_items + x, side="right") - seen.offsets[users]
    return x + np.where(has_all, targets <= x, n_below)


def batches(n, batch_size, seed, epoch):
    """Return the batches of an epoch: index arrays that cover 0..n-1 in an order set by (seed, epoch)."""
    order = np.random.default_rng((seed, epoch)).permutation(n)
    return [order[i : i + batch_size] for i in range(0, n, batch_size)]
