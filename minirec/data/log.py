"""Interaction logs: read, check, filter, split, and cut into training windows.

Symbols: U users, V items, n interactions in all, M evaluated users.

Four formats, told apart by their content, gzip or plain:
    lines   user item item item ...      one line a user, oldest item first
    pairs   user item                    one line an interaction, oldest first within a user
    inter   user_id:token  item_id:token  timestamp:float      RecBole atomic file, tab-separated
    csv     a header that names user, item and (optionally) timestamp columns; , ; tab or |
Ids are any strings; timestamps are numbers or ISO 8601 dates. Order is by timestamp where there is one,
ties in file order.

A log is read in pieces of whole lines, which NumPy cuts into columns and numbers; Python's csv takes over where
there are quotes, or rows that are not alike. What is wrong with many rows is found by halving them until one is
left, which names its line.
"""

import contextlib
import csv
import gzip
import hashlib
import io
import itertools
import os
import re
import zlib
from dataclasses import dataclass, replace
from datetime import datetime
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

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
    "timestamp": (
        *("timestamp", "time", "ts", "unixreviewtime", "unixtime", "datetime", "date"),
        *("createdat", "eventtime", "purchasedate", "orderdate", "when"),
    ),
}
DELIMITERS = "\t,;|"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
ASCII_CONTROLS = bytes([*range(9), *range(11, 32), 127])
BLANK_LINES = re.compile(rb"([ \t]*\n)*")
PANDAS = "make a CSV of it: pandas.read_{}.to_csv('log.csv', index=False)"
ICONV = "convert it: iconv -f {} -t UTF-8 FILE > NEW"
FOREIGN = {  # how files begin that are no logs: what they are, and what to do
    rb"PK\x03\x04(?s:.{,2000})(\[Content_Types\]|xl/)": ("an Excel workbook", "save its sheet as CSV"),
    rb"PK\x03\x04": ("a zip archive", "unzip it"),
    rb"(?s).{257}ustar": ("a tar archive", "unpack it"),
    rb"BZh\d1AY|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|\x04\x22\x4d\x18": ("compressed, not by gzip", "decompress it"),
    rb"PAR1\x15": ("a Parquet file", PANDAS.format("parquet(FILE)")),
    rb"\x80[\x02-\x05]": ("a Python pickle, which could run any code", "make a CSV of it where you trust it"),
    rb"\x93NUMPY|\x89HDF|ARROW1|SQLite format 3\0|\xd0\xcf\x11\xe0|%PDF-": ("a binary file", "make a CSV of it"),
    rb"\s*(\[\s*)?\{\s*[\"']": ("JSON", PANDAS.format("json(FILE, lines=True)")),
    rb"(?i)\s*<(!doctype|html|\?xml)": ("a web page", "fetch the log itself; this may be the page of an error"),
    # Byte order marks, or what zeros say of the first character
    rb"\xff\xfe\0\0|[\n-~]\0\0\0": ("UTF-32 text", ICONV.format("UTF-32LE")),
    rb"\0\0\xfe\xff|\0\0\0[\n-~]": ("UTF-32 text", ICONV.format("UTF-32BE")),
    rb"\xff\xfe|[\n-~]\0": ("UTF-16 text", ICONV.format("UTF-16LE")),
    rb"\xfe\xff|\0[\n-~]": ("UTF-16 text", ICONV.format("UTF-16BE")),
}
EPOCH = datetime.fromisoformat("1970-01-01 00:00:00+00:00")
PIECE_BYTES = 1 << 22  # read at a time
HEAD_BYTES = 1 << 12  # that tell what a file is
ROWS_AT_A_TIME = 1 << 14  # through Python's csv
MAX_LINE_BYTES = 1 << 24
MAX_ID_BYTES = 256
MAX_EXPANSION, EXPANSION_FROM = 100, 1 << 28  # of a gzip file; text that shrinks to a hundredth is no log
SHORTEST_SPLIT = 3  # a target for test, one for validation, and something before them


@dataclass
class Log:
    """Histories of all users end to end: user u's are sequence[offsets[u]:offsets[u + 1]], oldest first."""

    users: list  # U names, in order of first appearance
    items: list  # V names, in order of first appearance
    offsets: np.ndarray  # [U + 1]
    sequence: np.ndarray  # [n] item indices 0..V-1, int32
    times: np.ndarray | None = None  # [n] when, ascending within a user, int64 or float64; None: not recorded
    read_as: str = ""  # the format and the columns that were taken from the file
    dated: bool = False  # whether the file held dates: then times are seconds since 1970
    reordered: bool = False  # whether the file did not hold every user's interactions in order of time

    def history(self, user):
        """Return the item indices of user number `user`, oldest first."""
        return self.sequence[self.offsets[user] : self.offsets[user + 1]]

    def sha256(self):
        """Return a fingerprint of the content, for logs that have no file."""
        digest = hashlib.sha256("\0".join([*self.users, "", *self.items]).encode())
        digest.update(self.offsets.astype("<i8").tobytes() + self.sequence.astype("<i4").tobytes())
        return digest.hexdigest()


# Reading


class _Wrong(Exception):
    """What is wrong with one of several rows; whoever knows their lines makes a UserError of it."""


class _Pieces:
    """The pieces of a file, whole lines of UTF-8 text as bytes, each line ended by a line feed alone.

    number: so many lines lie before those that are looked at, which an error names with the file.
    progress: called now and then with the number of the file's bytes read since the last call, or None.
    """

    def __init__(self, path, progress):
        self.path, self.progress, self.number = path, progress, 0

    def fail(self, message, line=0):
        """Raise the error of a line, from 0, of those that are looked at."""
        raise UserError(f"{self.path}, line {self.number + line + 1}: {message}")

    def fail_at_first(self, rows, add, n_lines):
        """Raise the error of the first of the rows, which lie in the lines that are looked at, at which add(rows)
        raises _Wrong. n_lines(row): how many lines a row takes."""
        while len(rows) > 1:
            half = rows[: len(rows) // 2]
            try:
                add(half)
            except _Wrong:
                rows = half
            else:
                self.number += sum(map(n_lines, half))
                rows = rows[len(half) :]
        try:
            add(rows)
        except _Wrong as error:
            self.number += n_lines(rows[0]) - 1  # its last line
            self.fail(str(error))

    def __iter__(self):
        try:
            if os.path.exists(self.path) and not os.path.isfile(self.path) and not os.path.isdir(self.path):
                raise UserError(f"{self.path}: not a regular file; save the log to one")
            with open(self.path, "rb") as file:
                yield from self._pieces(file)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(
                f"{self.path}: damaged gzip file after line {self.number} ({error}); fetch it again"
            ) from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror or error})") from None

    def _pieces(self, file):
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stream = gzip.GzipFile(fileobj=file) if zipped else file
        at, n_bytes, rest, returns_only = 0, 0, b"", False
        while chunk := stream.read(PIECE_BYTES):
            if not n_bytes:
                self._check_kind(chunk[:HEAD_BYTES])
                chunk = chunk.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
                returns_only = b"\r" in chunk[:-1] and b"\n" not in chunk  # as text from an old Mac
            n_bytes += len(chunk)
            if returns_only:
                chunk = chunk.replace(b"\r", b"\n")
            piece, line_break, rest = (rest + chunk).rpartition(b"\n")
            if line_break:
                yield self._checked(piece + line_break)
            if len(rest) > MAX_LINE_BYTES:
                self.fail(f"longer than {MAX_LINE_BYTES >> 20} MiB: is this a text file?")
            if zipped and n_bytes > max(EXPANSION_FROM, MAX_EXPANSION * file.tell()):
                raise UserError(
                    f"{self.path}: grows more than {MAX_EXPANSION}-fold when it is unzipped: is this a log?"
                )
            if self.progress:
                self.progress(file.tell() - at)
                at = file.tell()
        if rest:
            yield self._checked(rest + b"\n")

    def _check_kind(self, head):
        """Refuse a file that begins, in the bytes `head`, like something else than UTF-8 text."""
        for pattern, (what, remedy) in FOREIGN.items():
            if re.match(pattern, head):
                raise UserError(f"{self.path}: {what}, where UTF-8 text is expected; {remedy}")

    def _checked(self, piece):
        """Return the lines with line feeds alone at their ends; refuse what is not text."""
        if b"\r" in piece:
            piece = re.sub(rb"(?<!\r)\r+\n", b"\n", piece)
        if piece.isascii() and len(piece.translate(None, ASCII_CONTROLS)) == len(piece):
            return piece
        try:
            text = piece.decode()
        except UnicodeDecodeError as error:
            line, at = _line_and_place(piece, error.start, b"\n")
            self.fail(f"byte {at} is not UTF-8 text; if it is Latin-1: iconv -f LATIN1 -t UTF-8 FILE > NEW", line)
        if found := CONTROL.search(text):
            line, at = _line_and_place(text, found.start(), "\n")
            self.fail(f"control character U+{ord(found[0]):04X} at character {at}: is this a text file?", line)
        return piece


def _line_and_place(text, at, line_break):
    """Return the line, from 0, and the place in it, from 1, of what stands in a text."""
    return text.count(line_break, 0, at), at - text.rfind(line_break, 0, at)


class _Numbering:
    """Numbers names 0, 1, 2, ... in order of first appearance.

    It looks them up in a sorted array: Python's dict would wait for the memory at every name of a large log.
    """

    def __init__(self, what):
        self.what, self.names = what, []
        self.known, self.numbers = np.empty(0, "S1"), np.empty(0, np.int32)  # sorted; and the number of each

    def __call__(self, names):
        """Return the numbers of names [m], bytes. Raises _Wrong, and changes nothing, where one is no name."""
        found, first, which = np.unique(names, return_index=True, return_inverse=True)
        places = np.searchsorted(self.known, found)
        old = places < len(self.known)
        old[old] = self.known[places[old]] == found[old]
        numbers, new = np.empty(len(found), np.int32), np.flatnonzero(~old)
        numbers[old] = self.numbers[places[old]]
        in_order = new[np.argsort(first[new])]
        numbers[in_order] = len(self.names) + np.arange(len(new))
        self.names += [self._checked(name) for name in found[in_order].tolist()]
        wider = np.promote_types(self.known.dtype, found.dtype)
        self.known = np.insert(self.known.astype(wider, copy=False), places[new], found[new])
        self.numbers = np.insert(self.numbers, places[new], numbers[new])
        return numbers[which]

    def _checked(self, name):
        text = name.decode()
        if not text.strip():
            raise _Wrong(f"empty {self.what}")
        if "\n" in text:
            raise _Wrong(f"a line break in the {self.what} id {_shown(text)}")
        return text

    def array(self, names):
        """Return a list of names as an array. Raises _Wrong where one is too long for a name."""
        longest = max(map(len, names), default=0)
        if longest > MAX_ID_BYTES:
            raise _Wrong(f"{self.what} id of {longest} bytes: at most {MAX_ID_BYTES} are accepted")
        return np.array(names, "S")


def read_log(path, format=None, columns=None, progress=None, to_split=True):
    """Read an interaction log.

    path: a file; format: one of FORMATS, None = recognise it; columns: names of the user, item and
    (optionally) timestamp columns of a csv or inter file, None = recognise them; progress: called with
    the number of bytes read since its last call; to_split: refuse a log of one user, or of which nothing can be
    held out.
    Returns a Log. Raises UserError, naming file and line, for anything that is not such a log.
    """
    source = _Pieces(path, progress)
    pieces, piece = iter(source), b""
    while not piece:
        piece = next(pieces, None)
        if piece is None:
            raise UserError(f"{path}: the file is empty")
        text_begins = BLANK_LINES.match(piece).end()
        source.number += piece.count(b"\n", 0, text_begins)
        piece = piece[text_begins:]
    first = piece[: piece.index(b"\n")].decode()
    pieces = itertools.chain([piece], pieces)
    if columns and not 2 <= len(set(columns)) == len(columns) <= 3:
        raise UserError(f"--columns {','.join(columns)}: expected two or three different names, USER,ITEM[,TIME]")
    header = _find_header(source, first, format, columns)
    if header is None and columns:
        raise UserError(f"{path}: no columns {', '.join(columns)} in its first line, {_shown(first)}")
    if header is None and format in ("inter", "csv"):
        source.fail(
            f"no user and item columns in the header {_shown(first)}; name them with --columns USER,ITEM[,TIME]"
        )
    if header is None and format is None and _looks_like_header(first):
        source.fail(f"a header whose columns are separated by spaces, {_shown(first)}; use tabs or commas")
    users, items = _Numbering("user"), _Numbering("item")
    if header is None:
        user_of, item_of, times_read, read_as = _read_lines(source, pieces, users, items, format)
    else:
        user_of, item_of, times_read, read_as = _read_table(source, pieces, users, items, header)
    counts = np.bincount(user_of, minlength=len(users.names))
    if to_split and len(counts) < 2:
        raise UserError(
            f"{path}: {len(counts)} user found; expected `user item item ...` lines, or a table with a header"
        )
    if to_split and counts.max() < SHORTEST_SPLIT:
        raise UserError(f"{path}: no user has {SHORTEST_SPLIT} interactions, so none can be held out for a test")
    # The sorts are stable: by user, within a user by time, ties in file order.
    order = np.argsort(user_of, kind="stable")
    offsets, times, dated, reordered = np.concatenate([[0], np.cumsum(counts)]), None, False, False
    if times_read:
        times, dated = times_read.all(), times_read.dated
        as_read, same_user = times[order], np.diff(user_of[order]) == 0
        reordered = bool((same_user & (as_read[1:] < as_read[:-1])).any())
        order = np.lexsort((times, user_of)) if reordered else order
        times = times[order]
    return Log(users.names, items.names, offsets, item_of[order], times, read_as, dated, reordered)


def _shown(text):
    return repr(text if len(text) <= 60 else text[:60] + "...")


def _read_lines(source, pieces, users, items, format):
    """Read the formats lines and pairs. Both are `user item ...`; they differ in what may not be:
    in lines a user comes once, in pairs a line has two fields. A file with neither is neither."""
    user_of, item_of = [], []
    many_fields = format == "lines"
    repeated = None  # the first user with a second line, and how many lines lie before it

    def numbers_of(rows):
        """Return the numbers of the users, one a row that is not blank, and of the items."""
        rows = [row for row in rows if row]
        fields = set(map(len, rows))
        if 1 in fields:
            raise _Wrong(
                "expected `user item item ...`, or a header (name its columns with --columns USER,ITEM[,TIME]); "
                f"found {_shown(rows[0][0].decode())}"
            )
        if format == "pairs" and fields - {2}:
            raise _Wrong(f"expected `user item`, found {max(fields)} fields")
        names = [row[0] for row in rows], [name for row in rows for name in row[1:]]
        return users(users.array(names[0])), items(items.array(names[1]))

    for piece in pieces:
        rows = [line.split() for line in piece.split(b"\n")[:-1]]  # at spaces and tabs: nothing else is left
        n_fields = np.array([len(row) for row in rows])
        if not n_fields.any():
            source.number += len(rows)
            continue
        n_known = len(users.names)
        try:
            user_numbers, item_numbers = numbers_of(rows)
        except _Wrong:
            source.fail_at_first(rows, numbers_of, lambda row: 1)
        many_fields |= n_fields.max() > 2
        if not repeated:
            again = np.ones(len(user_numbers), bool)
            again[np.unique(user_numbers, return_index=True)[1]] = False  # the first of a piece, and
            again |= user_numbers < n_known  # of all
            if again.any():
                place = np.flatnonzero(n_fields)[np.argmax(again)]
                repeated = rows[place][0].decode(), source.number + place
        if many_fields and repeated:
            name, source.number = repeated
            source.fail(
                f"user {_shown(name)} has a line already; a table of one interaction a line needs exactly "
                "`user item`, or a header naming its columns"
            )
        user_of.append(np.repeat(user_numbers, n_fields[n_fields > 0] - 1))
        item_of.append(item_numbers)
        source.number += len(rows)
    read_as = "lines: user item item ..." if many_fields else "pairs: user item"
    return np.concatenate(user_of), np.concatenate(item_of), None, read_as


def _looks_like_header(line):
    """Whether a line of two or three words consists of column names."""
    known = {name for names in COLUMN_NAMES.values() for name in names}
    words = [re.sub("[_-]", "", word.lower()) for word in line.split()]
    return 2 <= len(words) <= 3 and set(words) <= known and len(set(words)) == len(words)


class _Header(NamedTuple):
    delimiter: str
    quoted: bool  # whether a field may stand in quotes
    places: tuple  # column numbers of user, item and, where there is one, timestamp
    fields: list  # as they stand in the file


def _find_header(source, line, format, columns):
    """Return the _Header that the first line of a file is, or None."""
    if format in ("lines", "pairs"):
        return None
    inter = format == "inter" or ":token" in line
    csv.field_size_limit(MAX_LINE_BYTES)
    for delimiter in "\t" if inter else DELIMITERS:
        try:
            fields = next(csv.reader([line], delimiter=delimiter), [])
        except csv.Error:
            continue
        names = [name.split(":")[0] if inter else name.strip() for name in fields]
        known = [[column] for column in columns] if columns else COLUMN_NAMES.values()
        plain = names if columns else [re.sub("[ _-]", "", name.lower()) for name in names]
        found = [next((name for name in candidates if name in plain), None) for candidates in known]
        if not columns and found[-1] is None:
            found.pop()
        if None in found:
            continue
        if twice := [name for name in found if plain.count(name) > 1]:
            source.fail(
                f"two columns are called {twice[0]!r}; rename one, or name others with --columns USER,ITEM[,TIME]"
            )
        return _Header(delimiter, not inter, tuple(map(plain.index, found)), fields)
    return None


def _read_table(source, pieces, users, items, header):
    """Read the rows below a header."""
    user_of, item_of, times = [], [], _Times()
    header_names = [header.fields[place].encode() for place in header.places]

    def add(user_names, item_names, texts=None):
        """Add columns: arrays of names and, where there are times, a list of texts."""
        if ((item_names == header_names[1]) & (user_names == header_names[0])).any():
            raise _Wrong("the header again: were two files joined? Delete this line")
        parts = users(user_names), items(item_names), None if texts is None else times.read(texts)
        for column, part in zip((user_of, item_of, times.parts), parts, strict=True):
            column.append(part)

    def add_rows(rows):
        """Add rows as csv reads them; blank ones are skipped."""
        rows = [row for row in rows if len(row) > 1 or row and row[0].strip()]
        width = len(header.fields)
        for row in rows:
            if len(row) != width and (len(row) != width + 1 or row[-1]):  # more: after a trailing delimiter
                raise _Wrong(f"{len(row)} fields where the header has {width}")
        if rows:
            columns = list(zip(*rows, strict=False))  # a row may end in a delimiter, and so in one more field
            user_names, item_names, *texts = [[field.encode() for field in columns[place]] for place in header.places]
            add(users.array(user_names), items.array(item_names), *texts)

    first = next(pieces)
    source.number += 1
    pieces = itertools.chain([first[first.index(b"\n") + 1 :]], pieces)
    for piece in pieces:
        columns = _cut(piece, header)
        try:
            if columns is None:
                raise _Wrong
            user_names, item_names, *texts = columns
            add(user_names, item_names, *(column.tolist() for column in texts))
        except _Wrong:  # csv copes, or says what is wrong
            _read_rows(source, itertools.chain([piece], pieces), header, add_rows)
        source.number += piece.count(b"\n")
    if not user_of:
        raise UserError(f"{source.path}: no interactions below the header")
    taken = [header.fields[place] for place in header.places]
    others = [name for place, name in enumerate(header.fields) if name and place not in header.places]
    read_as = f"{'csv' if header.quoted else 'inter'}: {', '.join(taken)}"
    read_as += f" (not used: {', '.join(others)})" if others else ""
    return np.concatenate(user_of), np.concatenate(item_of), times if len(taken) > 2 else None, read_as


def _cut(piece, header):
    """Cut lines into columns; return those of header.places, arrays of bytes, or None where lines are not alike.

    All lines must have as many fields as the header, and no quotes.
    """
    if header.quoted and b'"' in piece:
        return None
    text = np.frombuffer(piece + bytes(MAX_ID_BYTES), np.uint8)
    ends = np.flatnonzero((text == ord(header.delimiter)) | (text == ord("\n")))
    if not len(ends) or len(ends) % len(header.fields):
        return None
    starts = np.concatenate([[0], ends[:-1] + 1]).reshape(-1, len(header.fields))
    ends = ends.reshape(starts.shape)
    if piece.count(b"\n") != len(ends) or (text[ends[:, -1]] != ord("\n")).any():
        return None
    columns = []
    for place in header.places:
        lengths = ends[:, place] - starts[:, place]
        longest = lengths.max()
        if not 1 <= longest <= MAX_ID_BYTES:
            return None
        fields = sliding_window_view(text, longest)[starts[:, place]]  # [rows, longest], a copy
        fields[np.arange(longest) >= lengths[:, None]] = 0
        columns.append(fields.view(f"S{longest}")[:, 0])
    return columns


def _read_rows(source, pieces, header, add_rows):
    """Read the rest of a table by Python's csv."""

    def lines():
        for piece in pieces:
            for number, line in enumerate(io.StringIO(piece.decode()), source.number + 1):
                source.number = number
                yield line

    quoting = csv.QUOTE_MINIMAL if header.quoted else csv.QUOTE_NONE
    reader = csv.reader(lines(), delimiter=header.delimiter, quoting=quoting, strict=True)
    try:
        n_read = source.number
        while rows := list(itertools.islice(reader, ROWS_AT_A_TIME)):
            try:
                add_rows(rows)
            except _Wrong:
                source.number = n_read
                source.fail_at_first(rows, add_rows, lambda row: 1 + sum(field.count("\n") for field in row))
            n_read = source.number
    except csv.Error as error:
        source.number -= 1
        source.fail(f"not valid CSV ({error}); check its quotes")


class _Times:
    """Timestamps as they are read: int64 as long as all are whole (nanoseconds do not fit a float), else float64.

    Dates, ISO 8601, are seconds since 1970, in UTC where they name no zone.
    """

    def __init__(self):
        self.parts, self.dated = [], None

    def read(self, texts):
        """Return an array of times. Raises _Wrong for what is neither number nor date, or unlike those before."""
        times, dated = _numbers(texts), False
        if times is None:
            times, dated = _dates(texts), True
        if self.dated not in (None, dated):
            kinds = ("a date, where those before it are numbers", "a number, where those before it are dates")
            raise _Wrong(f"timestamp {_shown(texts[0].decode())} is {kinds[self.dated]}")
        self.dated = dated
        return times

    def all(self):
        return np.concatenate(self.parts)


def _numbers(texts):
    """Return an array of the numbers that texts are, or None."""
    with contextlib.suppress(ValueError, OverflowError):
        return np.fromiter(map(int, texts), np.int64, len(texts))
    with contextlib.suppress(ValueError):
        numbers = np.fromiter(map(float, texts), np.float64, len(texts))
        return numbers if np.isfinite(numbers).all() else None
    return None


def _dates(texts):
    """Return an array of the seconds since 1970 that texts, as dates, are. Raises _Wrong where one is none."""
    try:
        seconds = np.array([_seconds(text.decode().strip()) for text in texts])
    except (ValueError, OverflowError):
        raise _Wrong(
            f"timestamp {_shown(texts[0].decode())} is neither a number, such as 1400000000, nor an ISO date, "
            "such as 2014-05-13 16:53:20"
        ) from None
    whole = seconds.astype(np.int64)
    return whole if (whole == seconds).all() else seconds


def _seconds(date):
    """Return the seconds from 1970 to a date."""
    if date[4:5] != "-":  # digits alone are a number
        raise ValueError
    when = datetime.fromisoformat(date.replace("Z", "+00:00"))  # Python 3.10 knows no Z
    return ((when if when.tzinfo else when.replace(tzinfo=EPOCH.tzinfo)) - EPOCH).total_seconds()


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
