"""The description of a log against counts by hand and by plain loops."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import log_of, real_log
from hypothesis import given, settings
from hypothesis import strategies as st

from minirec.data import describe
from minirec.data import log as data
from minirec.data.read import read_log
from minirec.data.split import SPLITS, leave_one_out
from minirec.errors import UserError
from minirec.training import runs
from minirec.training.settings import Source

SEQUENCES = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=12), min_size=2, max_size=10)


def description(log, split="leave-one-out"):
    return describe.describe(log, SPLITS[split](log))


def test_a_small_log_is_described_as_counted_by_hand():
    log = log_of([[0, 0, 1, 0], [2, 1, 3], [2]])
    log.times, log.dated = (np.array([10, 10, 20, 30, 5, 5, 5, 7]) + 1_400_000_000) * 10**9, True
    found = description(log)
    assert (found["users"], found["items"], found["interactions"]) == (3, 4, 8)
    assert found["density"] == 8 / 12
    assert found["history_lengths"] == {
        "0": 1, "10": 1, "25": 1, "50": 3, "75": 3, "90": 3, "100": 4, "mean": pytest.approx(8 / 3),
    }  # fmt: skip
    assert found["repeats"] == {"immediate": 1, "seen_before": 2}
    assert data.count_duplicates(log) == 1
    assert found["time"] == {
        "dated": True, "first": "2014-05-13 16:53:25", "last": "2014-05-13 16:53:50", "ties": 3,
    }  # fmt: skip
    assert found["split"] == {
        "train_users": 1, "valid_users": 2, "test_users": 2, "unreachable": 1, "cold": 1,
    }  # fmt: skip
    assert found["k_core"]["5"] == {"users": 0, "items": 0, "interactions": 0}


def log_of_three_parts():
    """A log of the moments 1 to 20: up to 16 is trained on, 17 and 18 are for validation, the rest is for the test.

    User 0 has a target in the test, which they had before, users 1 and 2 in the validation; user 3 has no history.
    """
    log = log_of([[0, 1, 2, 3, 4, 5, 6, 7, 0], [1, 2, 3, 4, 5], [1, 2, 3, 4, 1], [9]])
    log.times = np.array([*range(1, 9), 19, *range(9, 13), 17, *range(13, 17), 18, 20])
    return log


def test_users_are_counted_part_by_part():
    found = description(log_of_three_parts(), "temporal")["split"]
    assert found == {
        "train_users": 3,
        "valid_users": 2,
        "test_users": 1,
        "unreachable": 1,
        "cold": 0,
    }


@given(SEQUENCES, st.data())
def test_counts_equal_those_of_plain_loops(sequences, draw):
    log = log_of(sequences)
    log.times = np.concatenate(
        [np.sort(draw.draw(st.lists(st.integers(0, 3), min_size=len(s), max_size=len(s)))) for s in sequences]
    )
    times = np.split(log.times, log.offsets[1:-1])
    found = describe.repeats(log)
    immediate = seen = exact = unreachable = 0
    for sequence, moments in zip(sequences, times, strict=True):
        for t, item in enumerate(sequence):
            immediate += t > 0 and sequence[t - 1] == item
            seen += item in sequence[:t]
            exact += (item, moments[t]) in list(zip(sequence[:t], moments[:t], strict=True))
        unreachable += len(sequence) >= 3 and sequence[-1] in sequence[:-1]
    assert found == {"immediate": immediate, "seen_before": seen} and data.count_duplicates(log) == exact
    assert describe.count_unreachable(log, leave_one_out(log).test) == unreachable


@pytest.mark.parametrize(
    "first, last, begins, ends",
    [
        ("1969-12-31 23:59:59", "1970-01-02", "1969-12-31 23:59:59", "1970-01-02 00:00:00"),
        ("1678-01-01", "1951-02-03T04:05:06.5", "1678-01-01 00:00:00", "1951-02-03 04:05:06"),
    ],
)
def test_times_read_as_dates_are_dates_however_old(tmp_path, first, last, begins, ends):
    path = tmp_path / "log.csv"
    path.write_text(f"user,item,date\nu,a,{first}\nu,b,1950-01-01\nu,c,{last}\nv,a,1950-01-01\n")
    log = data.keep_interactions(read_log(path), np.arange(4))
    found = description(log)["time"]
    assert (found["first"], found["last"]) == (min(begins, "1950-01-01 00:00:00"), ends)
    assert found["dated"]
    path.write_text("user,item,date\nu,a,100\nu,b,200\nu,c,300\nv,a,100\n")
    found = description(read_log(path))["time"]
    assert (found["first"], found["last"]) == ("100", "300") and not found["dated"]


@given(SEQUENCES, st.integers(1, 3), st.booleans())
@settings(deadline=None, max_examples=50)
def test_core_sizes_are_those_of_the_log_that_the_same_options_and_k_core_give(tmp_path_factory, sequences, k, drop):
    path = tmp_path_factory.mktemp("logs") / "log.csv"
    rows = [f"u{user},i{item}" for user, items in enumerate([*sequences, [7, 8, 9]]) for item in items]
    path.write_text("\n".join(["user,item", *rows]))
    source = Source(str(path), drop_repeats=drop)
    found = describe.core_size(runs.load_log(source), k, drop)
    try:
        log = runs.load_log(replace(source, k_core=k))
    except UserError:
        assert set(found.values()) == {0}
    else:
        assert found == {"users": len(log.users), "items": len(log.items), "interactions": len(log.sequence)}


def test_repeats_that_a_core_makes_are_dropped_from_its_size():
    # Without x, which is rare, items of the first user follow themselves; then one a user is left of each.
    log = log_of([[0, 9, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]])
    found = {drop: describe.describe(log, leave_one_out(log), drop)["k_core"]["5"] for drop in (False, True)}
    assert found[False] == {"users": 5, "items": 5, "interactions": 26}
    assert found[True] == {"users": 5, "items": 5, "interactions": 25}


def test_a_core_is_as_large_as_the_filtered_log():
    log = read_log(real_log("ml-100k.inter"))
    core = data.k_core(log, 5)
    size = {"users": len(core.users), "items": len(core.items), "interactions": len(core.sequence)}
    assert description(log)["k_core"]["5"] == size == {"users": 943, "items": 1349, "interactions": 99287}
