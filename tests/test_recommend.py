"""Recommending for many users, and from another log than the model was trained on: everyone gets what is theirs."""

import csv
import gzip
import json
import os
import subprocess
import sys
import time
from collections import Counter
from itertools import groupby

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st

from minirec import model
from minirec.cli import main
from minirec.data import log as data
from minirec.training import fit, ranking, runs
from minirec.training.parallel import AHEAD, worker_map


def call(*arguments, status=0):
    """Call a command in this process; return what click's runner says of it."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == status, result.output
    return result


def last_json(result):
    """The one line that --json prints, read."""
    (line,) = result.stdout.splitlines()
    return json.loads(line)


def write_lines(path, histories):
    path.write_text("".join(f"{user} {' '.join(items)}\n" for user, items in histories.items()))
    return path


def write_table(path, histories, times=None):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "item", "time"])
        for user, items in histories.items():
            moments = times[user] if times else range(len(items))
            writer.writerows([user, item, moment] for item, moment in zip(items, moments, strict=True))
    return path


def some_histories(seed, users, items, least=3, most=12):
    rng = np.random.default_rng(seed)
    return {user: [str(i) for i in rng.choice(items, rng.integers(least, most))] for user in users}


@pytest.fixture(scope="module")
def histories():
    """71 users of 40 items: ten chunks of 7 and a remainder of one."""
    return some_histories(0, [f"u{u}" for u in range(71)], [f"i{i}" for i in range(40)])


@pytest.fixture(scope="module")
def today():
    """Another log: users and items in another order, some of them new, histories of one to seven items."""
    users = [*(f"u{u}" for u in range(80, 20, -1)), *(f"new {u}" for u in range(9))]
    items = [*(f"n{i}" for i in range(8)), *(f"i{i}" for i in range(39, 4, -1))]
    return {
        **some_histories(1, users, items, 1, 8),
        "all new": ["n1", "n2", "n3"],
        "new before": ["n1", "n2", "i7"],
        "new": ["n4"],
    }


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """A function that trains a small model on a log with some options, and returns the run's folder."""

    def run(log, *options):
        folder = tmp_path_factory.mktemp("small") / "run"
        call("train", "--data", log, "--epochs", 1, "--hidden", 8, "--workers", 1, "--out", folder, *options)
        return folder

    return run


@pytest.fixture(scope="module")
def run(train, histories, tmp_path_factory):
    return train(write_lines(tmp_path_factory.mktemp("log") / "log.txt", histories))


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(ranking, "chunk_rows", lambda *_: 7)
    monkeypatch.setattr(ranking, "TARGETS_AT_A_TIME", 7)


def exported(path):
    """An export as {user: [(item, score), ...]}, its ranks checked."""
    found = {}
    with open(path, newline="") as file:
        for user, rows in groupby(csv.DictReader(file), lambda row: row["user"]):
            assert user not in found
            rows = list(rows)
            assert [row["rank"] for row in rows] == [str(rank) for rank in range(1, 1 + len(rows))]
            found[user] = [(row["item"], float(row["score"])) for row in rows]
    return found


def alone(run, *arguments):
    """What recommend says of one user or history, as [(item, score), ...]."""
    found = last_json(call("recommend", run, "--json", *arguments))["recommendations"]
    return [(row["item"], row["score"]) for row in found]


def assert_same_lists(found, expected):
    assert [item for item, _ in found] == [item for item, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-4)


# Many users


@pytest.mark.parametrize("workers", [1, 2])
def test_an_export_over_many_chunks_gives_everyone_what_recommend_user_gives(
    run, histories, small_chunks, tmp_path, workers
):
    arguments = ("recommend", run, "--all", "--top", 5, "--workers", workers, "--out", tmp_path / "all.csv")
    result = call(*arguments, "--json")
    found = exported(tmp_path / "all.csv")
    assert list(found) == list(histories)
    assert last_json(result) == {"out": str(tmp_path / "all.csv"), "users": len(found), "left_out": 0}
    assert f"{len(found)} users" in result.stderr
    for user in histories:
        assert_same_lists(found[user], alone(run, "--user", user, "--top", 5))


def test_an_export_is_the_same_bytes_for_any_number_of_workers(run, small_chunks, tmp_path):
    for workers in (1, 2, 5):
        call("recommend", run, "--all", "--out", tmp_path / f"{workers}.csv", "--workers", workers)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("n", [1, 2])
def test_histories_are_read_no_further_than_the_ranking_has_come(n, small_chunks):
    config = model.Config(n_items=40, hidden_size=8)
    parameters, drawn = model.init_parameters(config, 0), 0

    def draw():
        nonlocal drawn
        for i in range(700):
            drawn += 1
            yield np.array([i % 40])

    with worker_map(n, np) as run:
        for done, _ in enumerate(ranking.recommend(parameters, config, draw(), 3, run), 1):
            assert drawn <= 7 * (done + AHEAD * n)
    assert drawn == 700 and done == 100


def test_who_has_had_every_item_gets_no_rows_and_is_counted(train, tmp_path):
    items = list("abcde")
    log = write_lines(tmp_path / "log.txt", {"full": items, "other": items[:4], "third": items[1:]})
    run = train(log)
    result = call("recommend", run, "--all", "--out", tmp_path / "all.csv", "--json")
    assert last_json(result)["users"] == 2 and last_json(result)["left_out"] == 1
    assert "no list for 1 of 3 users, who have had every item" in result.stderr
    assert {user: [item for item, _ in ranking] for user, ranking in exported(tmp_path / "all.csv").items()} == {
        "other": ["e"],
        "third": ["a"],
    }
    result = call("recommend", run, "--user", "full", "--json")
    assert last_json(result)["recommendations"] == [] and "holds every item" in result.stderr


ODD_NAMES = ["a,b", 'say "hi"', "--top", "-1", "a b", "'", "é 語", "=1+1"]


def test_names_that_csv_must_quote_or_that_look_like_options_come_back(train, tmp_path):
    history = {user: [f"{item}{user}" for item in ODD_NAMES[i:] + ODD_NAMES[:i]] for i, user in enumerate(ODD_NAMES)}
    shared = {user: [item for other in ODD_NAMES for item in history[other][:3]] for user in ODD_NAMES}
    run = train(write_table(tmp_path / "log.csv", shared | {"last": [i for h in history.values() for i in h]}))
    call("recommend", run, "--all", "--out", tmp_path / "all.csv")
    found = exported(tmp_path / "all.csv")
    assert list(found) == ODD_NAMES
    for user in ODD_NAMES:
        assert_same_lists(found[user], alone(run, "--user", user))


def test_an_interrupted_export_leaves_nothing(run, small_chunks, tmp_path, monkeypatch):
    (tmp_path / "all.csv").write_text("before")
    real = ranking.recommend

    def interrupted(*arguments):
        for number, chunk in enumerate(real(*arguments)):
            if number == 3:
                raise KeyboardInterrupt
            yield chunk

    monkeypatch.setattr(fit, "recommend", interrupted)
    call("recommend", run, "--all", "--out", tmp_path / "all.csv", status=130)
    assert (tmp_path / "all.csv").read_text() == "before" and os.listdir(tmp_path) == ["all.csv"]


def test_what_a_killed_export_left_is_replaced_by_the_next(run, tmp_path):
    slow = (
        "import sys, time; from minirec.cli import main; from minirec.training import fit; real = fit.recommend; "
        "fit.recommend = lambda *a: (time.sleep(9), *real(*a))"
    )
    code = f"{slow}; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "recommend", run, "--all", "--out", tmp_path / "all.csv"]
    with subprocess.Popen(list(map(str, command)), cwd=ROOT) as process:
        while not os.listdir(tmp_path):
            time.sleep(0.01)
        process.kill()
    assert os.listdir(tmp_path) == [".all.csv.tmp"]
    call("recommend", run, "--all", "--out", tmp_path / "all.csv")
    assert os.listdir(tmp_path) == ["all.csv"] and len(exported(tmp_path / "all.csv")) == 71


# One history


def test_a_history_as_json_names_what_was_taken(run):
    result = call("recommend", run, "--history", "i3, nix, i5,", "--top", 2, "--json")
    found = last_json(result)
    assert found["history"] == ["i3", "i5"] and found["left_out"] == 1 and len(found["recommendations"]) == 2
    assert "left out, unknown to the model: 'nix'" in result.stderr
    assert_same_lists(alone(run, "--history", "i3\ni5", "--top", 2), alone(run, "--history", "i3,i5", "--top", 2))


def test_an_item_with_a_comma_that_is_not_quoted_is_an_error_that_shows_how(train, tmp_path):
    names = ['one, "1"', "b,c,d", "e", "c", "f"]
    run = train(write_table(tmp_path / "log.csv", {f"u{u}": names[u:] + names[:u] for u in range(5)}))
    for history, item in (('e,one, "1"', names[0]), ("b,c,d", names[1]), ("e, b,c,d ,c", names[1])):
        message = call("recommend", run, "--history", history, status=1).stderr
        assert message.startswith(f"Error: --history: {item!r} is one item") and len(message.splitlines()) == 1
        quoted = item.replace('"', '""')
        assert f"""'"{quoted}"'""" in message
        found = last_json(call("recommend", run, "--history", f'"{quoted}",e', "--json"))
        assert found["history"] == [item, "e"]
    assert last_json(call("recommend", run, "--history", "c,e,f", "--json"))["history"] == ["c", "e", "f"]
    within = call("recommend", run, "--history", "ab,c,de,f", "--json")  # "b,c,d" is in it, across three other fields
    assert last_json(within)["history"] == ["c", "f"] and "unknown to the model: 'ab', 'de'" in within.stderr


# Another log


def by_hand(run, cases):
    """The metrics of (history, target) pairs of names: what the model does not know is left out, or a miss."""
    config = runs.model_config(runs.load_settings(run))
    numbers = {name: i for i, name in enumerate(runs.load_items(run, config))}
    parameters = {name: value.astype(np.float64) for name, value in runs.load_parameters(run, config).items()}
    ranks, counted = [], Counter()
    for names, target in cases:
        history, rank = [numbers[name] for name in names if name in numbers], np.inf
        if target not in numbers:
            counted["unknown_targets"] += 1
        elif not history:
            counted["unknown_histories"] += 1
        elif numbers[target] in history:
            counted["unreachable"] += 1
        else:
            (x,) = model.encode(parameters, config, [np.array(history)])
            scores = parameters["item_embedding"] @ x[-1]
            better = [i for i in numbers.values() if i not in history and scores[i] > scores[numbers[target]]]
            rank = len(better)
        ranks.append(rank)
    values = {"users": len(ranks)} | counted
    for k in ranking.CUTOFFS:
        values[f"HR@{k}"] = np.mean([rank < k for rank in ranks])
        values[f"NDCG@{k}"] = np.mean([1 / np.log2(rank + 2) if rank < k else 0 for rank in ranks])
        values[f"MRR@{k}"] = np.mean([1 / (rank + 1) if rank < k else 0 for rank in ranks])
    return values


def assert_evaluated(run, log, cases, *arguments):
    """evaluate says of a log what is computed by hand of its cases, in numbers and, of those left out, in words."""
    result = call("evaluate", run, "--data", log, "--json", *arguments)
    found, expected = last_json(result), by_hand(run, cases)
    assert {"unknown_targets", "unknown_histories", "unreachable"} <= set(expected), "the log is a poor example"
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name
    assert 0 < found["HR@10"] < 1
    n = len(cases)
    assert f"{found['unknown_targets']} of {n} targets are unknown to the model" in result.stderr
    assert f"{found['unknown_histories']} of {n} histories before a known target are all unknown" in result.stderr


@pytest.mark.parametrize("part, back", [("test", 1), ("valid", 2)])
def test_evaluating_another_log_equals_a_ranking_by_hand(run, today, small_chunks, tmp_path, part, back):
    today = today | {"new then known": ["n3", "i8", "i9"]}
    log = write_lines(tmp_path / "today.txt", {user.replace(" ", "_"): items for user, items in today.items()})
    cases = [(items[:-back], items[-back]) for items in today.values() if len(items) >= 3]
    assert_evaluated(run, log, cases, "--split", part)


def filtered(histories, k):
    """Histories without repeats and rare users and items, done again until nothing changes."""
    while True:
        left = {user: [item for item, _ in groupby(items)] for user, items in histories.items()}
        counts = Counter(item for items in left.values() for item in items)
        left = {user: [i for i in items if counts[i] >= k] for user, items in left.items() if len(items) >= k}
        if left == histories:
            return left
        histories = left


def test_another_log_is_filtered_as_the_run_says_before_it_is_split(train, histories, tmp_path):
    run = train(write_table(tmp_path / "log.csv", histories), "--k-core", 4, "--drop-repeats")
    users, items = [f"u{u}" for u in range(60)], [*(f"n{i}" for i in range(4)), *(f"i{i}" for i in range(9))]
    today = some_histories(7, users, [*items, "rare"], 2, 9) | {"new before": ["n1", "n2", "n1", "n3", "i7"]}
    today = {user: [i for item in items for i in [item] * (1 + (item[-1] == "3"))] for user, items in today.items()}
    left = filtered(today, 4)
    assert 30 < len(left) < len(today) and left["new before"] == ["n1", "n2", "n1", "n3", "i7"]
    log = write_table(tmp_path / "today.csv", today)
    assert_evaluated(run, log, [(items[:-1], items[-1]) for items in left.values()])


def test_another_log_is_split_at_its_own_moment(train, histories, today, tmp_path):
    rng = np.random.default_rng(5)
    then, now = (
        {user: np.sort(first + rng.integers(10**6, size=len(items))) for user, items in log.items()}
        for first, log in ((0, histories), (10**7, today))
    )
    now["new before"][-1] = 3 * 10**7  # a history of new items alone, and a target that is known
    run = train(write_table(tmp_path / "log.csv", histories, then), "--split", "temporal")
    begins = np.quantile(np.concatenate(list(now.values())), 0.9)
    late = [items for user, items in today.items() if now[user][-1] > begins and len(items) > 1]
    assert 0 < len(late) < len(today)
    log = write_table(tmp_path / "today.csv", today, now)
    assert_evaluated(run, log, [(items[:-1], items[-1]) for items in late])


def test_recommending_from_another_log_is_recommending_from_what_is_known_of_it(run, today, small_chunks, tmp_path):
    log = write_table(tmp_path / "today.csv", today)
    arguments = ("recommend", run, "--data", log)
    result = call(*arguments, "--all", "--out", tmp_path / "all.csv", "--json")
    found = exported(tmp_path / "all.csv")
    known = {user: [i for i in items if i.startswith("i")] for user, items in today.items()}
    nothing = [user for user in known if not known[user]]
    assert list(found) == [user for user in known if known[user]] and len(nothing) > 3
    assert last_json(result) == {"out": str(tmp_path / "all.csv"), "users": len(found), "left_out": len(nothing)}
    first = ", ".join(map(repr, nothing[:3]))
    assert f"whose items the model knows none: {first} and {len(nothing) - 3} more\n" in result.stderr
    n, n_unknown = (sum(map(len, histories.values())) for histories in (today, known))
    assert f"8 of its {len({i for h in today.values() for i in h})} items are unknown" in result.stderr
    assert f"left out, with {n - n_unknown} of {n} interactions" in result.stderr
    for user, listed in found.items():
        assert_same_lists(listed, alone(run, "--history", ",".join(known[user])))
        assert_same_lists(listed, alone(run, "--data", log, "--user", user))
    for user in nothing[:2]:
        message = call(*arguments, "--user", user, status=1).stderr.splitlines()[-1]
        assert f"nothing to recommend to user {user!r}" in message


def test_a_log_too_short_to_split_can_be_recommended_from_but_not_evaluated(run, tmp_path):
    log = tmp_path / "today.txt"
    log.write_text("u1 i3\n")
    call("recommend", run, "--data", log, "--all", "--out", tmp_path / "all.csv")
    assert list(exported(tmp_path / "all.csv")) == ["u1"]
    log.write_text("u1 i3\nu2 i4 i5\n")
    message = call("evaluate", run, "--data", log, status=1).stderr.splitlines()[-1]
    assert "no user has 3 interactions" in message and f"--data {log} is read and split as the log of {run}" in message


def test_a_k_core_of_the_run_takes_no_user_of_today_their_recommendations(train, histories, tmp_path):
    run = train(write_table(tmp_path / "log.csv", histories), "--k-core", 3)
    log = write_table(tmp_path / "today.csv", {"u1": ["i3"], "u2": ["i4", "i5"]})
    result = call("recommend", run, "--data", log, "--all", "--out", tmp_path / "all.csv")
    assert list(exported(tmp_path / "all.csv")) == ["u1", "u2"] and "--k-core 3 is not applied" in result.stderr


def test_a_k_core_of_the_run_takes_no_user_of_its_own_log_their_recommendations(train, histories, tmp_path):
    path = write_table(tmp_path / "log.csv", histories | {"brief": ["i3", "rare"]})
    run = train(path, "--k-core", 3)
    result = call("recommend", run, "--all", "--out", tmp_path / "all.csv")
    assert "--k-core 3 is not applied" in result.stderr and "another log" not in result.stderr
    lists = exported(tmp_path / "all.csv")
    assert list(lists) == [*histories, "brief"]
    assert [item for item, _ in lists["brief"]] == [item for item, _ in alone(run, "--user", "brief")]
    assert [item for item, _ in lists["brief"]] == [item for item, _ in alone(run, "--history", "i3")]


def test_the_log_trained_on_gives_the_same_bits_wherever_it_lies(run, histories, small_chunks, tmp_path):
    before = last_json(call("evaluate", run, "--json"))
    call("recommend", run, "--all", "--out", tmp_path / "before.csv")
    moved = write_lines(tmp_path / "moved.txt", histories)
    result = call("evaluate", run, "--data", moved, "--json")
    assert last_json(result) == before and "another log" not in result.stderr
    (tmp_path / "log.gz").write_bytes(gzip.compress(moved.read_bytes()))  # another file, so another log
    result = call("evaluate", run, "--data", tmp_path / "log.gz", "--json")
    unlike = {"unknown_targets": 0, "unknown_histories": 0, "baselines": {}}  # whose training part is not at hand
    assert last_json(result) == before | unlike
    assert "another log" in result.stderr and "unknown" not in result.stderr
    for log in (moved, tmp_path / "log.gz"):
        call("recommend", run, "--data", log, "--all", "--out", tmp_path / "after.csv")
        assert (tmp_path / "after.csv").read_bytes() == (tmp_path / "before.csv").read_bytes()


def test_columns_that_the_run_named_are_looked_for_in_another_log(train, histories, tmp_path):
    log = write_table(tmp_path / "log.csv", histories)
    log.write_text(log.read_text().replace("user,item,time", "who,what,when"))
    run = train(log, "--columns", "who,what,when")
    (tmp_path / "today.csv").write_text("when,what,who\n1,i3,u1\n3,i5,u1\n2,i4,u1\n")
    arguments = ("recommend", run, "--data", tmp_path / "today.csv", "--user", "u1", "--json")
    assert_same_lists(alone(run, "--history", "i3,i4,i5"), alone(*arguments[1:]))
    (tmp_path / "today.csv").write_text("user,item,time\nu1,i3,1\nu1,i4,1\n")
    message = call(*arguments, status=1).stderr
    assert "no columns who, what, when" in message and "with --columns who,what,when" in message


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1), min_size=1),
    st.lists(st.integers(0, 12), min_size=1, unique=True),
)
def test_renumbering_keeps_what_the_list_names_and_says_where_it_went(sequences, names):
    log = data.Log(
        [str(u) for u in range(len(sequences))],
        [str(i) for i in range(10)],
        np.cumsum([0, *map(len, sequences)]),
        np.concatenate(sequences).astype(np.int32),
        np.arange(sum(map(len, sequences))),
    )
    new, moved = data.renumbered(log, list(map(str, names)))
    for user, sequence in enumerate(sequences):
        assert [names[i] for i in new.history(user)] == [item for item in sequence if item in names]
    assert new.users == log.users and len(new.times) == len(new.sequence)
    for k in range(len(log.sequence) + 1):
        assert moved[k] == sum(item in names for item in np.concatenate(sequences)[:k])


# Mistakes

MISTAKES = {
    "no known item": (["--data", "FOREIGN", "--all", "--out", "x.csv"], 1, "knows none of its 4 items, such as 'zz'"),
    "all users without a file": (["--all"], 2, "needs --out FILE.csv"),
    "a file without users": (["--user", "u1", "--out", "x.csv"], 2, "--out needs --all"),
    "out in no folder": (["--all", "--out", "no/x.csv"], 1, "no/x.csv: cannot be written"),
    "out is a folder": (["--all", "--out", "."], 2, "is a directory"),
    "a full disk": (["--all", "--out", "/dev/full"], 1, "/dev/full: cannot be written"),
    "out is the log": (["--data", "FOREIGN", "--all", "--out", "FOREIGN"], 1, "is read from"),
    "a log for a history": (["--data", "FOREIGN", "--history", "i1"], 2, "--history needs none"),
    "two selections": (["--user", "u1", "--all", "--out", "x.csv"], 2, "choose one"),
    "a table as JSON": (["--user", "u1", "--explain", "--json"], 2, "--explain"),
    "a user without a name": (["--user", ""], 1, "no user ''"),
    "a history beyond reading": (
        ["--history", "x" * 10**5 + "\r\n,y"],
        1,
        "none of its items: '" + "x" * 60 + "...', 'y'; items look",
    ),
    "a history of commas": (["--history", ",,"], 1, "history: it is empty"),
    "a log that is a pipe": (["--data", "/dev/stdin", "--all", "--out", "x.csv"], 1, "not a regular file"),
}


@pytest.mark.parametrize("arguments, status, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_end_in_one_line_and_write_nothing(run, tmp_path, monkeypatch, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOREIGN").write_text("a zz yy xx\nb zz yy ww\n")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    result = call("recommend", run, *arguments, status=status)
    assert message in result.stderr.splitlines()[-1] and result.stdout == ""
    assert "Traceback" not in result.stderr and result.stderr.count("Error") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
