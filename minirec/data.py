"""Interaction logs: read, check, filter, split, and cut into training windows.

Symbols: U users, V items, n interactions in all, M evaluated users.

Four formats, told apart by their content, gzip or plain:
    lines   user item item item ...      one line a user, oldest item first
    pairs   user item                    one line an interaction, oldest first within a user
    inter   user_id:token  item_id:token  timestamp:float      RecBole atomic file, tab-separated
    csv     a header that names user, item and (optionally) timestamp columns; , ; tab or |
Ids are any strings. Order is by timestamp where there is one, ties in file order.
"""

import csv
import gzip
import hashlib
import itertools
import math
import re
import zlib
from array import array
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minirec.errors import UserError

FORMATS = ("lines", "pairs", "inter", "csv")
COLUMN_NAMES = {  # lower case, without _ - and spaces; the first that a header has is taken
    "user": (
        "user",
        "userid",
        "uid",
        "reviewerid",
        "customer",
        "customerid",
        "visitorid",
        "account",
        "session",
        "sessionid",
    ),
    "item": ("item", "itemid", "iid", "asin", "parentasin", "product", "productid", "movieid", "artistid", "trackid"),
    "timestamp": ("timestamp", "time", "ts", "unixreviewtime", "unixtime", "datetime", "date"),
}
DELIMITERS = "\t,;|"
FIELD = re.compile(r"[^ \t]+")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
MAX_LINE_BYTES = 1 << 24
MAX_ID_BYTES = 256
LINES_A_REPORT = 1 << 16
MAX_REDRAWS = 100
SHORTEST_SPLIT = 3  # a target for test, one for validation, and something before them
QUANTILE = 0.9  # of time, where the temporal split cuts


@dataclass
class Log:
    """Histories of all users end to end: user u's are sequence[offsets[u]:offsets[u + 1]], oldest first."""

    users: list  # U names, in order of first appearance
    items: list  # V names, in order of first appearance
    offsets: np.ndarray  # [U + 1]
    sequence: np.ndarray  # [n] item indices 0..V-1, int32
    times: np.ndarray | None = None  # [n] when, ascending within a user, int64 or float64; None: not recorded

    def history(self, user):
        """Return the item indices of user number `user`, oldest first."""
        return self.sequence[self.offsets[user] : self.offsets[user + 1]]

    def sha256(self):
        """Return a fingerprint of the content, for logs that have no file."""
        digest = hashlib.sha256("\0".join([*self.users, "", *self.items]).encode())
        digest.update(self.offsets.astype("<i8").tobytes() + self.sequence.astype("<i4").tobytes())
        return digest.hexdigest()


# Reading


class _Lines:
    """The lines of a file, decoded and checked, that know their number: all errors name file and line.

    progress: called now and then with the number of the file's bytes read since the last call, or None.
    """

    def __init__(self, path, progress):
        self.path, self.number, self.progress = path, 0, progress

    def fail(self, message):
        raise UserError(f"{self.path}, line {self.number}: {message}")

    def __iter__(self):
        try:
            with open(self.path, "rb") as file:
                zipped = file.read(2) == b"\x1f\x8b"
                file.seek(0)
                at = 0
                for line in self._decode(gzip.GzipFile(fileobj=file) if zipped else file):
                    if self.progress and self.number % LINES_A_REPORT == 0:
                        self.progress(file.tell() - at)
                        at = file.tell()
                    yield line
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(
                f"{self.path}: damaged gzip file after line {self.number} ({error}); fetch it again"
            ) from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror or error})") from None

    def _decode(self, stream):
        while raw := stream.readline(MAX_LINE_BYTES + 1):
            self.number += 1
            if len(raw) > MAX_LINE_BYTES:
                self.fail(f"longer than {MAX_LINE_BYTES >> 20} MiB: is this a text file?")
            if self.number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                self.fail("this is UTF-16 text; save the file as UTF-8")
            try:
                line = raw.decode("utf-8-sig" if self.number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                self.fail(f"byte {error.start + 1} is not UTF-8 text; save the file as UTF-8")
            if found := CONTROL.search(line):
                self.fail(
                    f"control character U+{ord(found[0]):04X} at character {found.start() + 1}: is this a text file?"
                )
            yield line


class _Codes(dict):
    """Numbers names 0, 1, 2, ... in order of first appearance: codes[name]."""

    def __init__(self, lines, what):
        self.lines, self.what = lines, what

    def __missing__(self, name):
        if not name.strip():
            self.lines.fail(f"empty {self.what}")
        if "\n" in name:
            self.lines.fail(f"a line break in the {self.what} id {_shown(name)}")
        if len(name.encode()) > MAX_ID_BYTES:
            self.lines.fail(f"{self.what} id of {len(name.encode())} bytes: at most {MAX_ID_BYTES} are accepted")
        self[name] = len(self)
        return self[name]


def read_log(path, format=None, columns=None, progress=None):
    """Read an interaction log.

    path: a file; format: one of FORMATS, None = recognise it; columns: names of the user, item and
    (optionally) timestamp columns of a csv or inter file, None = recognise them; progress: called with
    the number of bytes read since its last call.
    Returns a Log. Raises UserError, naming file and line, for anything that is not such a log.
    """
    lines = _Lines(path, progress)
    stream = iter(lines)
    first = next((line for line in stream if line.strip()), None)
    if first is None:
        raise UserError(f"{path}: the file is empty")
    stream = itertools.chain([first], stream)
    if columns and not 2 <= len(set(columns)) == len(columns) <= 3:
        raise UserError(f"--columns {','.join(columns)}: expected two or three different names, USER,ITEM[,TIME]")
    header = _find_header(first, format, columns)
    if header is None and format is None and _looks_like_header(first):
        lines.fail(f"a header whose columns are separated by spaces, {_shown(first)}; use tabs or commas")
    if header is None and columns:
        raise UserError(f"{path}: no columns {', '.join(columns)} in its first line, {_shown(first)}")
    users, items = _Codes(lines, "user"), _Codes(lines, "item")
    if header is None and format not in ("inter", "csv"):
        user_of, item_of, times = _read_lines(lines, stream, users, items, format)
    else:
        user_of, item_of, times = _read_table(lines, stream, users, items, header)
    user_of, item_of = np.frombuffer(user_of, np.int32), np.frombuffer(item_of, np.int32)
    counts = np.bincount(user_of, minlength=len(users))
    if len(users) < 2:
        raise UserError(
            f"{path}: {len(users)} user found; expected `user item item ...` lines, or a table with a header"
        )
    if counts.max() < SHORTEST_SPLIT:
        raise UserError(f"{path}: no user has {SHORTEST_SPLIT} interactions, so none can be held out for a test")
    # Both sorts are stable: by user, within a user by time, ties in file order.
    order = np.argsort(user_of, kind="stable") if times is None else np.lexsort((times, user_of))
    times = None if times is None else times[order]
    return Log(list(users), list(items), np.concatenate([[0], np.cumsum(counts)]), item_of[order], times)


def _shown(text):
    return repr(text if len(text) <= 60 else text[:60] + "...")


def _read_lines(lines, stream, users, items, format):
    """Read the formats lines and pairs. Both are `user item ...`; they differ in what may not be:
    in lines a user comes once, in pairs a line has two fields. A file with neither is neither."""
    user_of, item_of = array("i"), array("i")
    many_fields = format == "lines"
    repeated = None  # the first user with a second line, and the line's number
    for line in stream:
        name, *names = FIELD.findall(line) or [None]
        if name is None:
            continue
        if not names:
            lines.fail(f"expected `user item item ...`, or a header naming user and item columns; found {_shown(line)}")
        many_fields |= len(names) > 1
        if format == "pairs" and many_fields:
            lines.fail(f"expected `user item`, found {1 + len(names)} fields")
        if name in users:
            repeated = repeated or (name, lines.number)
        if many_fields and repeated:
            name, lines.number = repeated
            lines.fail(
                f"user {_shown(name)} has a line already; a table of one interaction a line needs exactly "
                "`user item`, or a header naming its columns"
            )
        code = users[name]
        for item in names:
            user_of.append(code)
            item_of.append(items[item])
    return user_of, item_of, None


def _looks_like_header(line):
    """Whether a line of two or three words consists of column names."""
    known = {name for names in COLUMN_NAMES.values() for name in names}
    words = [re.sub("[_-]", "", word.lower()) for word in FIELD.findall(line)]
    return 2 <= len(words) <= 3 and set(words) <= known and len(set(words)) == len(words)


class _Header(NamedTuple):
    delimiter: str
    quoting: int
    places: tuple  # column numbers of user, item and, where there is one, timestamp
    width: int


def _find_header(line, format, columns):
    """Return the _Header that the first line of a file is, or None."""
    if format in ("lines", "pairs"):
        return None
    inter = format == "inter" or ":token" in line
    csv.field_size_limit(MAX_LINE_BYTES)
    for delimiter in "\t" if inter else DELIMITERS:
        try:
            names = next(csv.reader([line], delimiter=delimiter), [])
        except csv.Error:
            continue
        names = [name.split(":")[0] if inter else name.strip() for name in names]
        if columns:
            places = [names.index(column) if column in names else None for column in columns]
        else:
            plain = [re.sub("[ _-]", "", name.lower()) for name in names]
            places = [
                next((plain.index(name) for name in known if name in plain), None) for known in COLUMN_NAMES.values()
            ]
            if places[2] is None:
                places.pop()
        if None not in places:
            return _Header(delimiter, csv.QUOTE_NONE if inter else csv.QUOTE_MINIMAL, tuple(places), len(names))
    return None


def _read_table(lines, stream, users, items, header):
    """Read the rows below a header; where it is None, say what was expected of it."""
    if header is None:
        first = next(stream)
        lines.fail(f"no user and item columns in the header {_shown(first)}; name them with --columns USER,ITEM[,TIME]")
    user_of, item_of, times = array("i"), array("i"), array("q")
    stream = (line + "\n" for line in stream)  # a quoted field may hold line breaks
    reader = csv.reader(stream, delimiter=header.delimiter, quoting=header.quoting, strict=True)
    next(reader)
    try:
        for row in reader:
            if len(row) != header.width:
                if not row:
                    continue
                if len(row) != header.width + 1 or row[-1]:  # one empty field more is a trailing delimiter
                    lines.fail(f"{len(row)} fields where the header has {header.width}")
            user_of.append(users[row[header.places[0]]])
            item_of.append(items[row[header.places[1]]])
            if len(header.places) > 2:
                times = _append_time(lines, times, row[header.places[2]])
    except csv.Error as error:
        lines.fail(f"not valid CSV ({error}); check its quotes")
    if not user_of:
        raise UserError(f"{lines.path}: no interactions below the header")
    return user_of, item_of, np.frombuffer(times, times.typecode) if len(header.places) > 2 else None


def _append_time(lines, times, text):
    """Append a timestamp: 64-bit integers as long as all are (nanoseconds do not fit a float), else floats."""
    try:
        times.append(int(text))
        return times
    except (ValueError, TypeError, OverflowError):
        pass
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        lines.fail(f"timestamp {_shown(text)} is not a number; expected seconds, such as 1400000000")
    if times.typecode == "q":
        times = array("d", times)
    times.append(value)
    return times


# Filtering


def keep_interactions(log, keep):
    """Return the Log of the interactions where keep [n] is true; users and items left without any go."""
    users, counts = np.unique(users_of(log)[keep], return_counts=True)
    items, sequence = np.unique(log.sequence[keep], return_inverse=True)
    return Log(
        [log.users[u] for u in users],
        [log.items[i] for i in items],
        np.concatenate([[0], np.cumsum(counts)]),
        sequence.astype(np.int32),
        None if log.times is None else log.times[keep],
    )


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

    Dropping a rare item can make a user rare, and so on: it is repeated until nothing changes.
    Raises UserError where nothing is left.
    """
    users, keep = users_of(log), np.ones(len(log.sequence), bool)
    before = len(keep) + 1
    while keep.sum() < before:
        before = keep.sum()
        for names in (users, log.sequence):
            keep &= np.bincount(names[keep], minlength=names.max() + 1)[names] >= k
    if not keep.any():
        raise UserError(f"--k-core {k} leaves no interaction of this log; choose a smaller one")
    return keep_interactions(log, keep)


# Splitting


class Cases(NamedTuple):
    """What is to be predicted: in log.sequence, sequence[stops] from sequence[starts:stops]."""

    users: np.ndarray  # [M]
    starts: np.ndarray  # [M] where the user's history begins, all of it
    stops: np.ndarray  # [M] where the target lies


class Split(NamedTuple):
    """What is trained on, and what is to be predicted from all before it."""

    train_lengths: np.ndarray  # [U] so many of the user's first interactions are trained on
    valid: Cases
    test: Cases


def leave_one_out(log):
    """Return the Split in which a user's last item is the test target, the one before it the validation's.

    Users with fewer than 3 interactions are kept for training only.
    """
    counts = np.diff(log.offsets)
    evaluated = counts >= SHORTEST_SPLIT
    return Split(
        counts - 2 * evaluated, _cases(log, evaluated, counts - 2 * evaluated), _cases(log, evaluated, counts - 1)
    )


def temporal(log):
    """Return the Split at two moments: what was known then is trained on, what came later is predicted.

    The test begins after the QUANTILE of all times, validation after the QUANTILE of those before it.
    A user who was active in a part has their last item in it as its target, and all items before that as
    history; so nothing is trained on that happened after the moment at which the model is trained.
    Raises UserError for a log without times, or one in which a part has no target.
    """
    if log.times is None:
        raise UserError("the log has no timestamps, which --split temporal needs; use --split leave-one-out")
    users, n_users = users_of(log), len(log.users)
    test_begins = np.quantile(log.times, QUANTILE)
    valid_begins = np.quantile(log.times[log.times <= test_begins], QUANTILE)
    trained, known = (
        np.bincount(users[log.times <= moment], minlength=n_users) for moment in (valid_begins, test_begins)
    )
    counts = np.diff(log.offsets)
    valid, test = ((after > before) & (after > 1) for before, after in ((trained, known), (known, counts)))
    for part, evaluated in (("validation", valid), ("test", test)):
        if not evaluated.any():
            raise UserError(f"--split temporal: no user has a target for {part}; use --split leave-one-out")
    return Split(trained, _cases(log, valid, known - 1), _cases(log, test, counts - 1))


def _cases(log, evaluated, places):
    """Return the Cases of users where evaluated [U] is true, their targets at places [U] of their histories."""
    users = np.flatnonzero(evaluated)
    return Cases(users, log.offsets[users], log.offsets[users] + places[users])


SPLITS = {"leave-one-out": leave_one_out, "temporal": temporal}


def training_windows(log, split, max_length):
    """Return starts, lengths of the training inputs in log.sequence, one window a user with a target.

    A window holds the last max_length positions that have a next item within the training part.
    """
    stops = log.offsets[:-1] + split.train_lengths - 1  # the last item is target only
    lengths = np.minimum(split.train_lengths - 1, max_length)
    keep = lengths >= 1
    return (stops - lengths)[keep], lengths[keep]


def windows_end_to_end(sequence, starts, lengths):
    """Copy inputs and targets of a batch out of the log: sequence[start : start + length + 1] each.

    Returns flat [n] and the starts [B] of the windows in it.
    """
    sizes = lengths + 1
    begins = np.cumsum(sizes) - sizes
    return sequence[np.arange(sizes.sum()) + np.repeat(starts - begins, sizes)], begins


def training_pairs(log, split):
    """Return user * V + item of everything trained on, sorted, each once: what unseen_negatives avoids."""
    users = np.repeat(np.arange(len(log.users)), split.train_lengths)
    begins = np.cumsum(split.train_lengths) - split.train_lengths
    places = np.arange(len(users)) + np.repeat(log.offsets[:-1] - begins, split.train_lengths)
    return np.unique(users * len(log.items) + log.sequence[places])


def unseen_negatives(rng, users, n_items, pairs):
    """Draw, for each of `users` [n], an item uniformly from those that the user has not had.

    pairs: as from training_pairs. Draws that hit are drawn again, at most MAX_REDRAWS times: a user who
    has had everything keeps a seen one. Returns [n].
    """
    items = rng.integers(n_items, size=len(users))
    for _ in range(MAX_REDRAWS):
        drawn = users * n_items + items
        seen = pairs[np.minimum(np.searchsorted(pairs, drawn), len(pairs) - 1)] == drawn
        if not seen.any():
            break
        items[seen] = rng.integers(n_items, size=int(seen.sum()))
    return items


def batches(n, batch_size, seed, epoch):
    """Return the batches of an epoch: index arrays that cover 0..n-1 in an order set by (seed, epoch)."""
    order = np.random.default_rng((seed, epoch)).permutation(n)
    return [order[i : i + batch_size] for i in range(0, n, batch_size)]
