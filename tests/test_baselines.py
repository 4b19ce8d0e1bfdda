"""The rankings by counts against counting with plain loops."""

import dataclasses

import numpy as np
import pytest
from helpers import counted_by_hand, log_of

from minirec.data import log as data
from minirec.data.split import SPLITS, distinct, leave_one_out
from minirec.training import baselines


@pytest.mark.parametrize("places_at_a_time", [1, 20, 1 << 20])  # a case a chunk; several and a remainder; one chunk
@pytest.mark.parametrize("filter_seen", [True, False])
@pytest.mark.parametrize("split, part", [("leave-one-out", "valid"), ("leave-one-out", "test"), ("temporal", "test")])
def test_baselines_equal_counting_by_hand(rng, monkeypatch, places_at_a_time, filter_seen, split, part):
    monkeypatch.setattr(baselines, "ENTRIES_AT_A_TIME", places_at_a_time)
    steps = [rng.integers(1, 4, size=rng.integers(2, 9)) for _ in range(41)]  # so that transitions come again
    log = log_of([(rng.integers(12) + np.cumsum(s)) % 12 for s in steps] + [np.arange(12)])
    joined = rng.integers(90, size=len(log.users))  # some are trained on not at all, some entirely
    log = dataclasses.replace(log, times=joined[data.users_of(log)] + np.arange(len(log.sequence)) % 7 / 10)
    for u in range(len(log.users)):
        log.times[log.offsets[u] : log.offsets[u + 1]].sort()
    split = SPLITS[split](log)
    cases = getattr(split, part)
    found = baselines.rank_baselines(log, split, cases, filter_seen)
    for name, ranks in counted_by_hand(log, split, cases, filter_seen).items():
        np.testing.assert_array_equal(found[name], ranks, name)
    assert (found["transitions"] != found["popularity"]).any()


def test_what_is_held_out_is_not_counted():
    log = log_of([[0, 1, 2, 3], [0, 1, 2, 3], [4, 0, 3, 3]])
    split = leave_one_out(log)
    found = baselines.rank_baselines(log, split, split.test, filter_seen=False)
    # No training part holds the targets, 3: every item stands before them. If they counted, 3 would follow 2 and lead.
    assert found["transitions"].tolist() == found["popularity"].tolist() == [4, 4, 4]


def test_distinct_keys_come_in_order(rng):
    for n in (0, 1, 50):
        keys = rng.integers(9, size=n)
        assert distinct(keys).tolist() == sorted(set(keys.tolist()))
