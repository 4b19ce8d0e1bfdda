"""Interaction logs: gathered from rows, ordered, filtered.

Symbols: U users, V items, n interactions in all.
"""

import contextlib
import hashlib
import itertools
import re
from array import array
from dataclasses import dataclass, field, replace

import numpy as np

from minirec.data.times import ROUNDED, Times, as_text
from minirec.errors import UserError

CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\ud800-\udfff\ufeff]")  # and what is not UTF-8
NO_UTF8 = "bytes that are not UTF-8 in it; from Latin-1: iconv -f LATIN1 -t UTF-8 FILE > NEW"
MAX_ID_BYTES = 256
ROWS_AT_A_TIME = 1 << 16  # whose times are read together
SHORTEST_SPLIT = 3  # interactions: a target for test, one for validation, and something before them
WORDS = ("na", "n/a", "#n/a", "<na>", "nan", "nat", "null", "(null)", "none", "undefined", "(not set)")
MISSING = {form for word in WORDS for form in (word, word.upper(), word.capitalize())}  # how exports write nothing
MISSING |= {"", "-", "NaN", "NaT", "\\N", "0000-00-00", "0000-00-00 00:00:00"}
FEW = 3  # rows that a remark names
MANY_TIES, ONE_DIRECTION, ENOUGH = 0.01, 0.9, 20  # shares, and how many ties tell of a sorting


class History(np.ndarray):
    """Item numbers [n] that know the names which they number: a model, or another Log, may number them otherwise."""

    def __array_finalize__(self, source):
        self.item_names = getattr(source, "item_names", None)


@dataclass
class Log:
    """Histories of all users end to end: user u's are sequence[offsets[u]:offsets[u + 1]], oldest first."""

    users: list  # U names, in order of first appearance
    items: list  # V names, in order of first appearance
    offsets: np.ndarray  # [U + 1]
    sequence: np.ndarray  # [n] item indices 0..V-1, int32
    times: np.ndarray | None = None  # [n] when, ascending within a user, int64 or float64; None: not recorded
    dated: bool = False  # whether times are nanoseconds since 1970, else they are numbers that only order
    read_as: str = ""  # one line: the format, the columns that were taken and those that were not, the span of time
    remarks: list = field(default_factory=list)  # lines: what a person may not expect of it

    def __repr__(self):
        """Sizes, how it was read, remarks: what a notebook shows, where all names and numbers would bury them."""
        return f"<Log: {'; '.join(filter(None, [self.counts(), self.read_as, *self.remarks]))}>"

    def sizes(self):
        """Return {"users": U, "items": V, "interactions": n}."""
        return {"users": len(self.users), "items": len(self.items), "interactions": len(self.sequence)}

    def counts(self):
        """Return its size in words."""
        return counted(self.sizes())

    def history(self, user):
        """Return the item indices of user number `user`, in the order of `users`, oldest first, as a History."""
        if isinstance(user, str) or not 0 <= user < len(self.users):
            raise UserError(f"no user number {user!r}: 0 to {len(self.users) - 1}, in the order of log.users")
        history = self.sequence[self.offsets[user] : self.offsets[user + 1]].view(History)
        history.item_names = self.items
        return history

    def sha256(self):
        """Return a fingerprint of the content, for logs that have no file."""
        digest = hashlib.sha256("\0".join([*self.users, "", *self.items]).encode())
        digest.update(self.offsets.astype("<i8").tobytes() + self.sequence.astype("<i4").tobytes())
        if self.times is not None:  # a temporal split depends on them, not on their order alone
            digest.update(self.times.astype(self.times.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()

    @staticmethod
    def from_columns(users, items, times=None):
        """Return the Log of columns of equal length [n]: lists, or arrays of NumPy, pandas or polars.

        Ids become text. Times are numbers, dates or texts, as in a file; None: the order of the rows counts.
        Raises UserError, naming the row, for what is no such column.
        """
        columns = [texts_of(column) for column in (users, items, times) if column is not None]
        if len({len(column) for column in columns}) != 1:
            raise UserError(f"columns of {', '.join(str(len(column)) for column in columns)} rows: they must agree")
        names = ["users", "items", "times"][: len(columns)]
        rows = zip(itertools.count(1), *columns, *[itertools.repeat("")] * (times is None), strict=False)
        with located("columns"):
            return collect(rows, names, f"columns {', '.join(names)}", unit="row")


def check_log(log, taker):
    """Raise UserError where what was given to `taker` is no Log."""
    if not isinstance(log, Log):
        raise UserError(f"{taker} takes a Log, not {type(log).__name__}: read_log(path) or Log.from_columns makes one")


def counted(sizes):
    """Return sizes, those of a Log or published ones, in words."""
    return ", ".join(f"{sizes[what]:,} {what}" for what in ("users", "items", "interactions"))


@contextlib.contextmanager
def located(source):
    """Name what is read, a file or columns, in the errors of reading it."""
    try:
        yield
    except UserError as error:
        comma = re.match(r"(line|row) \d", str(error))
        raise UserError(f"{source}{', ' if comma else ': '}{error}") from None


def texts_of(column):
    """Return an array-like as a list of texts; numbers that are whole without a decimal point."""
    if isinstance(column, str) or len(getattr(column, "shape", (0,))) != 1 or not hasattr(column, "__iter__"):
        raise UserError(f"a column is a list, or an array of one dimension, not {type(column).__name__}")
    if hasattr(column, "to_numpy"):  # of pandas, polars
        array = column.to_numpy()
        # Integers of which some are missing become floats, which hold 53 bits only.
        rounded = array.dtype.kind == "f" and "float" not in str(column.dtype).lower()
        column = column.to_list() if rounded else array
    if isinstance(column, np.ndarray):
        if column.dtype.kind == "M":
            years = column.astype("M8[Y]").astype(int) + 1970
            beyond = np.flatnonzero(~np.isnat(column) & ((years < 1678) | (years > 2261)))
            if len(beyond):
                time = f"row {beyond[0] + 1}: {column[beyond[0]]}"
                raise UserError(f"{time} lies outside the years that nanoseconds reach, 1678 to 2261")
            column = np.datetime_as_string(column.astype("M8[ns]"))
        column = column.tolist()
    column = list(column)
    if wrong := {*map(type, column)} & {bytes, list, tuple, dict, set}:
        raise UserError(f"a column holds texts, numbers or dates, one a row, not {wrong.pop().__name__}")
    return [
        "" if x is None else str(int(x)) if isinstance(x, (float, np.floating)) and x.is_integer() else str(x)
        for x in column
    ]


class _Numbers(dict):
    """Numbers names 0, 1, 2, ... in order of first appearance; raises ValueError for what is no name."""

    def __missing__(self, name):
        if match := CONTROL.search(name):
            what = NO_UTF8 if "\ud7ff" < match[0] < "\ufeff" else "a line break or a control character in it"
            raise ValueError(f"id {name[:60]!r} has {what}")
        if len(name) * 4 > MAX_ID_BYTES and len(name.encode()) > MAX_ID_BYTES:
            raise ValueError(f"id of {len(name.encode())} bytes: at most {MAX_ID_BYTES} are accepted")
        return self.setdefault(name, len(self))


def collect(rows, columns, read_as, unit="line", time_format=None, ties="file", to_split=True):
    """Return the Log of rows (number, user, item, time), the last three texts.

    columns: what user, item and, where there are times, time are called; unit: what a row's number counts; read_as:
    what the Log says of itself, to which the span of time is added; ties: "file", or "shuffle" for a random order,
    with a fixed seed, among equal times; to_split: refuse a log of one user, or of which nothing can be held out.
    Raises UserError, naming a row, for what is no log.
    """
    users, items, user_of, item_of, timed = _Numbers(), _Numbers(), array("i"), array("i"), len(columns) > 2
    times, rows, left_out, n_rows, remarks = Times(time_format), iter(rows), {}, 0, []
    while chunk := list(itertools.islice(rows, ROWS_AT_A_TIME)):
        texts, numbers, n_rows = [], [], n_rows + len(chunk)
        for number, user, item, when in chunk:
            user, item, when = user.strip(), item.strip(), when.strip()
            if user in MISSING or item in MISSING or timed and when in MISSING:
                column = columns[[user in MISSING, item in MISSING, True].index(True)]
                count, shown = left_out.get(column, (0, []))
                left_out[column] = count + 1, [*shown, f"{unit} {number} ({user}, {item})"][:FEW]
                continue
            try:
                user_of.append(users[user])
                item_of.append(items[item])
            except ValueError as error:
                raise UserError(f"{unit} {number}: {'item' if user in users else 'user'} {error}") from None
            texts.append(when)
            numbers.append(number)
        if texts and timed and (wrong := times.add(texts)):
            raise UserError(f"{unit} {numbers[wrong[0]]}: {wrong[1]}")
    if not user_of:
        raise UserError(f"no interactions in {n_rows:,} rows")
    moments, dated = times.result() if timed else (None, False)
    log = _ordered(list(users), list(items), np.array(user_of), np.array(item_of), moments, ties)
    keep = np.ones(len(log.sequence), bool)
    for names, column in ((users, columns[0]), (items, columns[1])):
        if "-1" in names and len(names) > 1 and all(name.isdigit() for name in names if name != "-1"):
            named = (users_of(log) if names is users else log.sequence) != names["-1"]
            left_out[f"{column} but -1"], keep = (int((~named).sum()), []), keep & named
        if alike := next((name for name in names if name.endswith(".0") and name[:-2] in names), None):
            remarks.append(f"{column} holds both {alike[:-2]!r} and {alike!r}, which count as two")
        if rounded := next(filter(ROUNDED.fullmatch, names), None):
            remarks.append(f"{column} holds {rounded!r}, rounded, as spreadsheets do: several may have become one")
    for column, (count, shown) in left_out.items():
        if 2 * count > n_rows:
            raise UserError(f"{count:,} of {n_rows:,} rows have no {column}; name another column by --columns")
        where = "; the first: " + ", ".join(shown) if shown else ""
        remarks.append(f"{count:,} of {n_rows:,} rows ({count / n_rows:.1%}) have no {column}: left out{where}")
    log = log if keep.all() else keep_interactions(log, keep)
    if len(log.users) < 1 + to_split:
        raise UserError(f"{len(log.users)} user, where two or more are needed: is another column the user?")
    if to_split and np.diff(log.offsets).max() < SHORTEST_SPLIT:
        raise UserError(f"no user has {SHORTEST_SPLIT} interactions, so none can be held out for a test")
    read_as = f"{read_as}; {n_rows:,} rows"
    if moments is not None:
        span = f"{as_text(log.times.min(), dated)} to {as_text(log.times.max(), dated)}"
        read_as += f", {span} UTC" if dated else f", times {span}"
        remarks += [] if dated else [f"{columns[2]}, {span}, holds numbers and no dates: they only order"]
        remarks += _remarks_on_ties(log, ties)
    return replace(log, dated=dated, read_as=read_as, remarks=remarks)


def _ordered(users, items, user_of, item_of, times, ties):
    """Return the Log of interactions, by user, within a user by time, ties in the order of the file or shuffled."""
    keys = [user_of] if times is None else [times, user_of]
    if ties == "shuffle":
        if times is None:
            raise UserError("no times, so no ties to shuffle; leave out --ties shuffle")
        keys.insert(0, np.random.default_rng(0).random(len(times)))
    order = np.lexsort(keys)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user_of, minlength=len(users)))])
    return Log(users, items, offsets, item_of[order], None if times is None else times[order])


def _remarks_on_ties(log, ties):
    """Return what a person may not expect of the order of interactions at equal times, as lines."""
    tied = ties_in(log)
    n, n_tied, remarks = len(log.sequence) - len(log.users), int(tied.sum()), []
    if n_tied > MANY_TIES * n:
        how = "shuffled" if ties == "shuffle" else "they keep the file's order"
        remarks.append(f"ties: {n_tied:,} of {n:,} neighbouring interactions ({n_tied / n:.1%}) share a time; {how}")
        kind = int if all(map(str.isdecimal, log.items)) else str
        rank = np.empty(len(log.items), np.int32)
        rank[sorted(range(len(rank)), key=lambda i: kind(log.items[i]))] = np.arange(len(rank))
        steps = (rank[log.sequence[1:]] - rank[log.sequence[:-1]])[tied]
        up, down = int((steps > 0).sum()), int((steps < 0).sum())
        if ties == "file" and up + down >= ENOUGH and max(up, down) > ONE_DIRECTION * (up + down):
            way, most = ("ascend", up) if up > down else ("descend", down)
            remarks.append(
                f"at equal times the items {way} in {most:,} of {up + down:,} cases: that is the file's sorting, "
                "and a model learns it; --ties shuffle breaks it"
            )
    if twice := count_duplicates(log):
        remarks.append(f"{twice:,} of {len(log.sequence):,} rows stand there again: the same user, item and time")
    return remarks


def ties_in(log):
    """Return whether an interaction and the next one are of the same user and time, [n - 1]."""
    tied = log.times[1:] == log.times[:-1]
    tied[log.offsets[1:-1] - 1] = False  # of two users
    return tied


def count_duplicates(log):
    """Count the interactions that are there already: the same user, item and time."""
    moments = np.cumsum(np.append(True, ~ties_in(log)))  # numbers for user and time
    keys = np.sort(moments * len(log.items) + log.sequence)
    return int((keys[1:] == keys[:-1]).sum())


# Filtering


def filter_log(log, k=1, no_repeats=False):
    """Return the Log that a k-core leaves; no_repeats: of one in which no item follows itself (see drop_repeats).

    What the k-core takes away can make two equal items neighbours, and without one of them an item can be rare:
    both are done until nothing changes. Raises UserError where nothing is left.
    """
    before = None
    while before != len(log.sequence):
        before = len(log.sequence)
        log = drop_repeats(log) if no_repeats else log
        log = k_core(log, k) if k > 1 else log
    return log


def keep_interactions(log, keep):
    """Return the Log of the interactions that keep, a mask [n] or ascending places, selects; users and items left
    without any go."""
    counts, sequence = np.bincount(users_of(log)[keep], minlength=len(log.users)), log.sequence[keep]
    left = np.bincount(sequence, minlength=len(log.items)) > 0  # [V]
    return replace(
        log,
        users=[log.users[u] for u in np.flatnonzero(counts)],
        items=[log.items[i] for i in np.flatnonzero(left)],
        offsets=np.concatenate([[0], np.cumsum(counts[counts > 0])]),
        sequence=(np.cumsum(left, dtype=np.int32) - 1)[sequence],
        times=None if log.times is None else log.times[keep],
    )


def renumbered(log, items):
    """Return a Log with the item numbers of `items`, a list of names, such as a model's; and where its places went.

    Items that are not in the list are left out. All users stay, those of whom nothing is left too. In the second
    result, moved [n + 1], moved[k] tells how many of the first k interactions are left: what was sequence[a:b]
    is sequence[moved[a]:moved[b]] of the new Log.
    """
    numbers = {name: i for i, name in enumerate(items)}
    sequence = np.array([numbers.get(name, -1) for name in log.items], np.int32)[log.sequence]
    known = sequence >= 0
    moved = np.concatenate([[0], np.cumsum(known)])
    times = None if log.times is None else log.times[known]
    return replace(log, items=items, offsets=moved[log.offsets], sequence=sequence[known], times=times), moved


def users_of(log):
    """Return the user's number of each interaction, [n]."""
    return np.repeat(np.arange(len(log.users)), np.diff(log.offsets))


def drop_repeats(log):
    """Return the Log in which a run of the same item, one after the other by one user, counts once."""
    users = users_of(log)
    again = (log.sequence[1:] == log.sequence[:-1]) & (users[1:] == users[:-1])
    return keep_interactions(log, np.concatenate([[True], ~again]))


def k_core(log, k):
    """Return the largest Log in which every user and every item has at least k interactions.

    Dropping a rare item can make a user rare, and so on: it is repeated until nothing changes. Raises UserError
    where nothing is left.
    """
    places, users, items = np.arange(len(log.sequence)), users_of(log), log.sequence
    while (rare := (np.bincount(users)[users] < k) | (np.bincount(items)[items] < k)).any():
        places, users, items = (x[~rare] for x in (places, users, items))
    if not len(places):
        raise UserError(f"--k-core {k} leaves no interaction of this log; choose a smaller one")
    return keep_interactions(log, places)
