"""What is in a log, before anything is trained on it.

Symbols: U users, V items, n interactions, M test users.
"""

import numpy as np

from minirec.data.log import filter_log, ties_in, users_of
from minirec.data.times import as_text
from minirec.errors import UserError
from minirec.packing import spans

MANY_REPEATS = 0.2  # of the targets; where more are items that the user had before, people buy again
QUANTILES = (0, 10, 25, 50, 75, 90, 100)  # percent
CORES = (5, 10)


def describe(log, split, no_repeats=False):
    """Return what is in a Log, and in its Split, as a dict that JSON can hold.

    no_repeats: whether repeats were dropped from the log, and so would be dropped from its k-cores.
    """
    return log.sizes() | {
        "density": len(log.sequence) / len(log.users) / len(log.items),
        "history_lengths": _quantiles(np.diff(log.offsets)),
        "repeats": repeats(log),
        "time": None if log.times is None else _time(log),
        "split": {
            "train_users": int((split.train_lengths > 1).sum()),
            "valid_users": len(split.valid.users),
            "test_users": len(split.test.users),
            "unreachable": count_unreachable(log, split.test),
            "cold": int(cold_targets(log, split).sum()),
        },
        "k_core": {str(k): core_size(log, k, no_repeats) for k in CORES},
    }


def _quantiles(values):
    """Return {"0": least, ..., "100": greatest, "mean": mean}: quantiles that are values themselves."""
    found = np.quantile(values, np.array(QUANTILES) / 100, method="lower")
    return dict(zip(map(str, QUANTILES), found.tolist(), strict=True)) | {"mean": float(values.mean())}


def repeats(log):
    """Count the interactions that repeat an item: the user's last one, any earlier one."""
    users, n_items = users_of(log), len(log.items)
    same_user = users[1:] == users[:-1]
    immediate = same_user & (log.sequence[1:] == log.sequence[:-1])
    pairs = np.sort(users * n_items + log.sequence)
    return {
        "immediate": int(immediate.sum()),
        "seen_before": int((pairs[1:] == pairs[:-1]).sum()),
    }


def count_unreachable(log, cases):
    """Count the Targets that the user had before: with filter-seen they cannot be hit."""
    lengths = cases.stops - cases.starts
    again = log.sequence[spans(cases.starts, lengths)] == np.repeat(log.sequence[cases.stops], lengths)
    return len(np.unique(np.repeat(cases.users, lengths)[again]))


def remarks_on_targets(log, split, filter_seen):
    """Return which test targets cannot be hit, and why, as lines: training never saw them, or the user had them."""
    cold, n_targets = int(cold_targets(log, split).sum()), len(split.test.users)
    lines = [f"{cold:,} of {n_targets:,} test targets are items that training never saw (cold)"] if cold else []
    return lines + (remarks_on_repeats(count_unreachable(log, split.test), n_targets) if filter_seen else [])


def remarks_on_repeats(unreachable, n_targets):
    """Return how many targets filter-seen makes impossible, as a line, if any; with the option where there are many."""
    if not unreachable:
        return []
    line = f"{unreachable:,} of {n_targets:,} targets are items the user had before: "
    line += "with --filter-seen they cannot be hit and count as misses"
    return [line + "; where people buy again, use --no-filter-seen" * (unreachable > MANY_REPEATS * n_targets)]


def cold_targets(log, split):
    """Return whether the item of each test target of a split is nowhere in what is trained on, [M]."""
    trained = np.zeros(len(log.items), bool)
    trained[log.sequence[spans(log.offsets[:-1], split.train_lengths)]] = True
    return ~trained[log.sequence[split.test.stops]]


def _time(log):
    """Describe a log's times: when it begins and ends, and how well they order it."""
    first, last = (as_text(time, log.dated) for time in (log.times.min(), log.times.max()))
    return {"dated": log.dated, "first": first, "last": last, "ties": int(ties_in(log).sum())}


def core_size(log, k, no_repeats=False):
    """Count users, items and interactions of what filter_log leaves, all zero where that is nothing."""
    try:
        return filter_log(log, k, no_repeats).sizes()
    except UserError:
        return dict.fromkeys(log.sizes(), 0)
