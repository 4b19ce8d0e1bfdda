"""Readers, splits, windows and batches."""

import gzip

import numpy as np
import pytest
from conftest import log_of, real_log
from hypothesis import given
from hypothesis import strategies as st

from minirec import data, planted
from minirec.errors import UserError

UNORDERED = [("u1", "c", 30), ("u2", "b", 10), ("u1", "b", 20), ("u1", "a", 10), ("u2", "a", 10)]
EXPECTED = {"u1": ["a", "b", "c"], "u2": ["b", "a"]}


def histories(log):
    return {user: [log.items[i] for i in log.history(u)] for u, user in enumerate(log.users)}


WELL_FORMED = {
    "lines": "u1 a b c\nu2 b a\n",
    "lines, untidy": "\n  u1\ta  b c \r\n\r\nu2 b a",
    "pairs": "u1 a\nu2 b\nu1 b\nu1 c\nu2 a\n",
    "csv": "user,item\nu1,a\nu2,b\nu1,b\nu1,c\nu2,a\n",
    "csv, BOM": "\ufeffItem_ID;Rating;User_ID;\na;1;u1;\nb;2;u2;\nb;3;u1;\nc;4;u1;\na;5;u2;\n",
    "csv, trailing delimiters": "user,item\nu1,a,\nu2,b,\nu1,b,\nu1,c,\nu2,a,\n",
    "csv, time": "userId,movieId,timestamp\nu1,c,3\nu2,b,1\nu1,b,2\nu1,a,-1.5\nu2,a,1\n",
    "csv, quotes": 'user,item,review,time\nu1,"b","said ""no, thanks""",2\nu2,b,,1\nu1,a,,1\nu1,c,,1e3\nu2,a,,1\n',
    "csv, line breaks in quotes": 'user,review,item\nu1,"two\n\nlines",a\nu2,,b\nu1,,b\nu1,,c\nu2,,a\n',
    "csv, all quoted": '"user","item","time"\r\n' + "".join(f'"{u}","{i}","{t}"\r\n' for u, i, t in UNORDERED),
    "csv, dates": "user,item,date\nu1,c,2014-05-03\nu2,b,2013-01-01\nu1,b,2014-05-02\nu1,a,1969-12-31\n"
    "u2,a,2013-01-02\n",
    "csv, moments": "user|item|time\nu1|c|2014-05-03T12:00:00.5Z\nu2|b|2014-05-03 00:00\n"
    "u1|b|2014-05-03 14:00:00.25+02:00\nu1|a|2014-05-03 12:00:00\nu2|a|2014-05-03 00:00:01\n",
    "csv, old Mac": "user,item\ru1,a\ru2,b\ru1,b\ru1,c\ru2,a",
    "csv, blank lines": "\n\nuser,item\n\nu1,a\nu2,b\nu1,b\n   \nu1,c\nu2,a\n\n\n",
    "inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    'u1\tb\t"5\t20\nu1\ta\t3\t10\nu1\tc\t3\t30\nu2\tb\t1\t5\nu2\ta\t1\t5\n',
}


@pytest.mark.parametrize("text", WELL_FORMED.values(), ids=WELL_FORMED)
@pytest.mark.parametrize("zipped", [False, True])
def test_every_format_is_recognised_and_read(tmp_path, text, zipped):
    path = tmp_path / "log"
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    assert histories(data.read_log(path)) == EXPECTED


def test_one_short_line_does_not_make_pairs(tmp_path):
    path = tmp_path / "log"
    path.write_text("u1 a b c\nu2 b\n")
    assert histories(data.read_log(path)) == {"u1": ["a", "b", "c"], "u2": ["b"]}


def test_format_and_columns_can_be_given(tmp_path):
    path = tmp_path / "log"
    path.write_text("who,what,when\nu1,b,2\nu1,a,1\nu1,c,3\nu2,b,1\nu2,a,1\n")
    assert histories(data.read_log(path, columns=("who", "what", "when"))) == EXPECTED
    path.write_text("user item\nuser a\nx a\nuser b\n")
    assert histories(data.read_log(path, format="pairs")) == {"user": ["item", "a", "b"], "x": ["a"]}


def test_known_column_names_go_by_preference_not_by_place(tmp_path):
    path = tmp_path / "log"
    path.write_text("session_id,date,user,item,timestamp\n1,9,u1,b,2\n2,9,u1,a,1\n3,9,u1,c,3\n4,0,u2,b,1\n5,0,u2,a,1\n")
    assert histories(data.read_log(path)) == EXPECTED


def test_a_first_line_longer_than_a_csv_field_may_be(tmp_path):
    path = tmp_path / "log"
    path.write_text("u1 " + "a b c " * 40_000 + "\nu2 b a\n")
    assert len(data.read_log(path).history(0)) == 120_000


def test_nanosecond_timestamps_are_not_rounded(tmp_path):
    path = tmp_path / "log"
    base = 1_700_000_000_000_000_000
    path.write_text(f"user,item,time\nu1,c,{base + 2}\nu1,b,{base + 1}\nu1,a,{base}\nu2,b,0\nu2,a,0\n")
    assert histories(data.read_log(path)) == EXPECTED


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=8)


@given(st.lists(st.lists(NAMES, min_size=3, max_size=6), min_size=2, max_size=6))
def test_any_strings_are_ids(tmp_path_factory, sequences):
    path = tmp_path_factory.mktemp("ids") / "log.csv"
    rows = [(f"u{u}", item, t) for u, s in enumerate(sequences) for t, item in enumerate(s)]
    np.random.default_rng(0).shuffle(rows)

    def quoted(x):
        return '"' + str(x).replace('"', '""') + '"'

    text = "user,item,time\n" + "".join(",".join(map(quoted, row)) + "\n" for row in rows)
    path.write_text(text, "utf-8", newline="")
    assert histories(data.read_log(path)) == {f"u{u}": s for u, s in enumerate(sequences)} | {}


GOOD = "u1 a b c\nu2 b a\n"
MALFORMED = {
    "empty": (b"", "empty"),
    "blank": (b"\n \n\n", "empty"),
    "binary": (b"\x89PNG\r\n\x1a\n\x00\x00", "line 1: byte 1 is not UTF-8"),
    "NUL": (b"u1 a b c\nu2 a\x00b c\n", "line 2: control character U\\+0000"),
    "escape": (b"u1 a b c\nu2 a \x1b[2J c\n", "line 2: control character U\\+001B"),
    "C1 control": ("u1 a b c\nu2 a\x9bb c\n".encode(), "line 2: control character U\\+009B"),
    "latin-1": ("u1 a b c\nu2 caf\xe9 b\n".encode("latin-1"), "line 2: byte 7 is not UTF-8"),
    "UTF-16": (GOOD.encode("utf-16"), "UTF-16 text.*iconv -f UTF-16LE"),
    "long id": (b"u1 a b c\nu2 " + b"x" * 257 + b" b\n", "line 2: item id of 257 bytes"),
    "one line": (b"u1 a b c\n", "1 user"),
    "prose": (b"hello\n", "line 1: expected"),
    "short": (b"u1 a b\nu2 b a\n", "no user has 3"),
    "lone user": (b"u1 a b c\nu2\n", "line 2: expected"),
    "headerless ratings": (b"u1 a 5\nu2 b 3\nu1 b 4\n", "line 3: user 'u1' has a line already"),
    "pairs, then a line": (b"u1 a\nu1 b\nu2 a b c\n", "line 2: user 'u1' has a line already"),
    "unknown columns": (b"foo,bar\n1,2\n", "line 1: expected"),
    "header only": (b"user,item,time\n", "no interactions"),
    "spaced header": (b"user_id item_id\nu1 a\nu1 b\n", "line 1: a header .* separated by spaces"),
    "broken id": (b'user,item\nu1,"a\nb"\n', "line 3: a line break in the item id"),
    "ragged": (b"user,item\nu1,a\nu1,b,c\n", "line 3: 3 fields where the header has 2"),
    "ragged, short": (b"user,item\nu1,a\nu1\n", "line 3: 1 fields"),
    "empty item": (b"user,item\nu1,a\nu1,\n", "line 3: empty item"),
    "NaN time": (b"user,item,time\nu1,a,1\nu1,b,nan\n", "line 3: timestamp 'nan'"),
    "text time": (b"user,item,time\nu1,a,yesterday\n", "line 2: timestamp 'yesterday'"),
    "empty time": (b"user,item,time\nu1,a,\n", "line 2: timestamp ''"),
    "bad quotes": (b'user,item\nu1,"a"b\n', "line 2: not valid CSV"),
    "open quotes": (b'user,item\nu1,"a\nu1,b\n', "line 3: not valid CSV"),
    "damaged gzip": (gzip.compress(GOOD.encode())[:-9], "damaged gzip"),
}


@pytest.mark.parametrize("content, message", MALFORMED.values(), ids=MALFORMED)
def test_malformed_logs_are_refused_naming_file_and_line(tmp_path, content, message):
    path = tmp_path / "bad.log"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"bad.log.*{message}") as caught:
        data.read_log(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "format, columns, message",
    [
        ("pairs", None, "line 1: expected `user item`, found 4"),
        ("csv", None, "line 1: no user and item columns"),
        ("inter", None, "line 1: no user and item columns"),
        (None, ("who", "what"), "no columns who, what"),
    ],
)
def test_what_was_asked_for_but_is_not_there_is_refused(tmp_path, format, columns, message):
    path = tmp_path / "log"
    path.write_text(GOOD)
    with pytest.raises(UserError, match=message):
        data.read_log(path, format, columns)


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir()], ids=["missing", "folder"])
def test_what_is_no_file_is_refused(tmp_path, make):
    make(tmp_path / "log")
    with pytest.raises(UserError, match="log: cannot be read"):
        data.read_log(tmp_path / "log")


def test_leave_one_out_holds_out_the_last_two():
    log = log_of([[0, 1, 2, 3], [4, 5], [6, 7, 8], [9]])
    split = data.leave_one_out(log)
    assert list(split.train_lengths) == [2, 2, 1, 1]
    for part, targets, before in (("valid", [2, 7], [[0, 1], [6]]), ("test", [3, 8], [[0, 1, 2], [6, 7]])):
        wanted = getattr(split, part)
        assert list(wanted.users) == [0, 2]
        assert list(log.sequence[wanted.stops]) == targets
        assert [list(log.sequence[a:b]) for a, b in zip(wanted.starts, wanted.stops)] == before


@given(st.integers(0, 10**6))
def test_the_temporal_split_predicts_only_what_came_after_all_it_was_trained_on(seed):
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(np.arange(1, 300), 29, replace=False))
    log = log_of(np.split(np.arange(300), cuts))  # every item is unique
    times = rng.integers(50, size=300)  # many are equal
    log.times = np.concatenate([np.sort(times[a:b]) for a, b in zip(log.offsets, log.offsets[1:])])
    split = data.temporal(log)
    trained = np.concatenate([log.times[a : a + n] for a, n in zip(log.offsets, split.train_lengths)])
    test_begins = np.quantile(log.times, 0.9)
    valid_begins = np.quantile(log.times[log.times <= test_begins], 0.9)
    assert sorted(trained) == sorted(log.times[log.times <= valid_begins])
    for part, begins, ends in ((split.valid, valid_begins, test_begins), (split.test, test_begins, np.inf)):
        expected = {}  # user -> place of the last item in the part, where something came before it
        for user in range(len(log.users)):
            inside = [i for i in range(*log.offsets[user : user + 2]) if begins < log.times[i] <= ends]
            if inside and inside[-1] > log.offsets[user]:
                expected[user] = inside[-1]
        assert dict(zip(part.users, part.stops)) == expected
        np.testing.assert_array_equal(part.starts, log.offsets[part.users])


def test_the_temporal_split_says_what_it_lacks():
    log = log_of([[0, 1, 2, 3], [4, 5, 6]])
    with pytest.raises(UserError, match="no timestamps.*--split leave-one-out"):
        data.temporal(log)
    log.times = np.zeros(7)
    with pytest.raises(UserError, match="no user has a target for validation"):
        data.temporal(log)


def test_times_follow_their_interactions(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("user,item,time\na,x,3\nb,y,5\na,y,1\na,z,2\nb,x,4\n")
    log = data.read_log(path)
    assert list(log.times) == [1, 2, 3, 4, 5]
    assert [log.items[i] for i in log.sequence] == ["y", "z", "x", "x", "y"]


@given(st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=8), min_size=2, max_size=12), st.integers(2, 3))
def test_the_k_core_is_the_largest_log_in_which_nobody_is_rare(sequences, k):
    log = log_of(sequences)
    pairs = [(u, i) for u, sequence in enumerate(sequences) for i in sequence]
    while True:  # one after the other, whoever is rare
        users, items = zip(*pairs) if pairs else ((), ())
        rare = [p for p in pairs if users.count(p[0]) < k or items.count(p[1]) < k]
        if not rare:
            break
        pairs = (
            [p for p in pairs if p[0] != rare[0][0]]
            if users.count(rare[0][0]) < k
            else [p for p in pairs if p[1] != rare[0][1]]
        )
    if not pairs:
        with pytest.raises(UserError, match="leaves no interaction"):
            data.k_core(log, k)
        return
    core = data.k_core(log, k)
    assert [(core.users[u], core.items[i]) for u in range(len(core.users)) for i in core.history(u)] == [
        (str(u), str(i)) for u, i in pairs
    ]


def test_only_repeats_that_follow_each_other_are_dropped():
    log = data.drop_repeats(log_of([[1, 1, 0, 1, 1, 1], [1, 0, 0]]))
    assert [list(log.history(u)) for u in range(2)] == [[1, 0, 1], [1, 0]]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(1, 6))
def test_training_never_sees_a_held_out_item(lengths, max_length):
    log = log_of(np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1]))  # every item is unique
    split = data.leave_one_out(log)
    held_out = {int(log.sequence[s]) for part in (split.valid, split.test) for s in part.stops}
    starts, windows = data.training_windows(log, split, max_length)
    for start, length in zip(starts, windows):
        assert 1 <= length <= max_length
        assert not held_out & set(log.sequence[start : start + length + 1].tolist())  # inputs and targets
    expected = [min(n - 1, max_length) for n in split.train_lengths if n >= 2]
    assert list(windows) == expected


def test_unseen_negatives_are_uniform_over_what_the_user_was_not_trained_on():
    log = log_of([[0, 1, 2, 3, 4], [5, 6, 7], [8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])
    split = data.leave_one_out(log)
    pairs = data.training_pairs(log, split)
    rng = np.random.default_rng(0)
    drawn = data.unseen_negatives(rng, np.repeat([0, 1, 2], 7000), 10, pairs).reshape(3, -1)
    assert set(drawn[0]) == set(range(10)) - {0, 1, 2}
    assert set(drawn[1]) == set(range(10)) - {5}
    assert set(drawn[2]) <= set(range(10))  # this user has had everything, and still the draw ends
    counts = np.bincount(drawn[0], minlength=10)[3:]
    assert abs(counts - 1000).max() < 150


def test_windows_end_to_end_hold_inputs_and_targets():
    flat, begins = data.windows_end_to_end(np.arange(10, 30), np.array([4, 0, 15]), np.array([2, 1, 3]))
    assert list(flat) == [14, 15, 16, 10, 11, 25, 26, 27, 28]
    assert list(begins) == [0, 3, 5]


@given(st.integers(1, 500), st.integers(1, 200), st.integers(0, 5))
def test_batches_cover_everything_once_in_an_order_set_by_the_epoch(n, size, epoch):
    found = data.batches(n, size, 0, epoch)
    assert sorted(np.concatenate(found)) == list(range(n))
    assert all(len(batch) == size for batch in found[:-1])
    np.testing.assert_array_equal(np.concatenate(found), np.concatenate(data.batches(n, size, 0, epoch)))


@pytest.mark.parametrize("name, back", [("chain", 1), ("household", 2)])
def test_planted_chains_follow_from_so_many_items_back(name, back):
    log = planted.DATASETS[name]()
    assert log.sha256() == planted.DATASETS[name]().sha256() != planted.DATASETS[name](seed=1).sha256()
    successors = {}
    for user in range(len(log.users)):
        history = log.history(user).tolist()
        for before, after in zip(history, history[back:]):
            successors.setdefault(before, set()).add(after)
    assert max(map(len, successors.values())) == planted.N_SUCCESSORS
    assert (len(log.users), len(log.items)) == (planted.N_USERS, planted.N_ITEMS)


def test_taste_has_no_order_and_few_genres_a_user():
    log = planted.taste()
    genres = [np.bincount(log.history(u) % planted.N_GENRES) / len(log.history(u)) for u in range(len(log.users))]
    assert 0.35 < np.mean([shares.max() for shares in genres]) < 0.6  # far above 1 / N_GENRES, and not one alone
    halves = [np.array_split(log.history(u) % planted.N_GENRES, 2) for u in range(len(log.users))]
    first, second = (np.mean([np.isin(a[i], a[1 - i]).mean() for a in halves]) for i in (0, 1))
    assert abs(first - second) < 0.02  # what comes early tells of what comes late as the other way round


@pytest.mark.parametrize(
    "name, counts",
    [
        ("beauty.txt", (22363, 12101, 198502)),
        ("video-games.txt", (31013, 23715, 287107)),
        ("ml-100k.inter", (943, 1682, 100000)),
    ],
)
def test_real_logs_have_their_published_counts(name, counts):
    log = data.read_log(real_log(name))
    assert (len(log.users), len(log.items), len(log.sequence)) == counts
