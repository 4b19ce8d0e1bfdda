"""Files of interactions: what they are, and their rows.

    lines   user item item ...      one line a user, oldest item first, blanks between
    pairs   user item               one line an interaction, oldest first within a user
    inter   user_id:token  item_id:token  timestamp:float      RecBole's table, tab-separated
    csv     a table with a header, or --columns 1,2,4; between its fields , ; tab | :: or Ctrl-A, as Hive writes it
    json    one object a line, JSON or a Python literal, which is parsed and never evaluated
Plain, gzip, or a member of a zip archive; Parquet through pandas. What is not clearly one of them is refused, with the
words to type.
"""

import ast
import contextlib
import csv
import gzip
import io
import itertools
import json
import re
import zipfile
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

from minirec.data.columns import KNOWN, TIMES, choose, clean_name, is_header, known_places, plain_name, shown, values_of
from minirec.data.log import CONTROL, collect, located, texts_of
from minirec.data.times import day_joined_with
from minirec.errors import UserError
from minirec.files import opened_by_name

FORMATS = ("lines", "pairs", "inter", "csv", "json")
TIES = ("file", "shuffle")
DELIMITERS = {"\t": "tab", "::": "::", ";": "semicolon", "|": "|", ",": "comma", "\x01": "Ctrl-A", " ": "blank"}
NO_WORDS = re.compile(r"\t|,|::|:token|:float|\s\S*(:|\b\d{4}-\d\d-\d\d)\S*")  # what `lines` and `pairs` do not hold
WORD = re.compile(r"[^ \t\n]+")
SEPARATOR = re.compile(r"\s*\"?sep=(.)\"?\s*")  # the first line of what Excel writes
RULE = re.compile(r"[-+|=:;,\s]*")  # a line that is empty, or drawn, as psql and MySQL do
CHUNK_BYTES = 1 << 22  # read at a time
SAMPLE = 200  # lines that tell what a file is
MAX_LINE = 1 << 24  # characters
MAX_OBJECT = 1 << 20  # characters of a line that is parsed as JSON or as a Python literal
MAX_EXPANSION, EXPANSION_FROM = 100, 1 << 28  # of a compressed file; text that shrinks to a hundredth is no log


def read_log(path, columns=None, format=None, time_format=None, ties="file", progress=None, to_split=True, member=None):
    """Read an interaction log.

    path: a file; columns: "user,item,time" or a list: names, or positions from 1; the time, and a time of day after
    it, may be left out; None = recognise them; format: one of FORMATS, None = recognise it; time_format: how
    datetime.strptime reads the times; ties: "file" keeps the file's order among a user's equal times, "shuffle" draws
    one, with a fixed seed; progress: called with the number of bytes read since its last call; to_split: refuse a log
    of one user, or of which nothing can be held out; member: which one of a zip archive, where it has several.
    Returns a Log. Raises UserError, naming file and line, for anything that is not such a log.
    """
    columns = columns.split(",") if isinstance(columns, str) else columns or ()
    columns = [column.strip() for column in columns]
    if columns and not 2 <= len(set(columns)) == len(columns) <= 4:
        raise UserError(f"--columns {','.join(columns)}: expected 2 to 4 different names, USER,ITEM[,TIME[,CLOCK]]")
    for name, value, allowed in (("format", format, (None, *FORMATS)), ("ties", ties, TIES)):
        if value not in allowed:
            raise UserError(f"{name} is {value!r}: choose from {', '.join(filter(None, allowed))}")
    csv.field_size_limit(MAX_LINE)
    with opened_by_name(path) as file, located(path):
        if file.peek(4)[:4] == b"PAR1":
            table = _parquet(path)
        else:
            table = _text(_Lines(_decoded(file, progress, member)), columns, format)
        places, remarks = choose(table, columns)
        names = [table.names[place] for place in places]
        unused = [name for place, name in enumerate(table.names) if name and place not in places]
        unused[12:] = ["..."] * (len(unused) > 12)
        read_as = f"{table.read_as}: {', '.join(names)}" + f" (not used: {', '.join(unused)})" * bool(unused)
        rows = table.rows(places)
        if len(places) == 2:
            rows = ((*row, "") for row in rows)
        elif len(places) == 4:
            join, is_milliseconds = day_joined_with(values_of(table.sample, places[3]))
            rows = ((number, user, item, join(day.strip(), clock.strip())) for number, user, item, day, clock in rows)
            remarks += [f"{names[3]} is taken as milliseconds after {names[2]}"] if is_milliseconds else []
        log = collect(rows, names[:3], read_as, table.unit, time_format, ties, to_split)
    log.remarks[:0] = [*table.remarks, *remarks]
    return log


class _Table(NamedTuple):
    """What a file holds: columns, whichever they are."""

    names: list  # of the columns
    header: bool  # whether the file has these names
    sample: list  # the first rows, lists of texts
    rows: Any  # rows(places): an iterable of the number of a row and its fields at these places
    read_as: str
    remarks: list = ()
    unit: str = "line"  # what a row's number counts


# Bytes into lines


class _Lines:
    """The lines of a file that hold something, each ended by a line feed alone.

    Comments and a sep= line at its head are left out. number: that of the line given last, from 1; head: the first
    lines and their numbers.
    """

    def __init__(self, lines):
        self.number, self.delimiter, n_comments = 0, None, 0
        for line in lines:
            separator = SEPARATOR.fullmatch(line)
            if not (separator or line[0] in "#%" or RULE.fullmatch(line)):
                break
            self.delimiter = separator[1] if separator else self.delimiter
            self.number, n_comments = self.number + 1, n_comments + (line[0] in "#%")
        else:
            raise UserError("the file is empty" + " but for comments" * (n_comments > 0))
        self.remarks = [f"{n_comments:,} comment lines at its head, of # or %, are left out"] * (n_comments > 0)
        head = [line, *itertools.islice(lines, SAMPLE - 1)]
        self.all = itertools.chain(head, lines)
        self.head = [(n, line) for n, line in enumerate(head, self.number + 1) if not RULE.fullmatch(line)]

    def __iter__(self):
        for line in self.all:
            self.number += 1
            if line[0] not in "-+|=:;, \t\n" or not RULE.fullmatch(line):
                yield line

    def fail(self, message, number=None):
        raise UserError(f"line {number or self.number}: {message}")


def _decoded(file, progress, member):
    """Yield the lines of a file, bytes that are no UTF-8 as lone surrogates, which no id may hold."""
    number, unlooked, told = 0, 0, 0
    try:
        stream = io.BufferedReader(_unpacked(file, member), CHUNK_BYTES)
        head = stream.peek()
        for pattern, what in KNOWN["not"].items():
            if re.match(pattern, head[:4096].decode("latin-1")):
                raise UserError(what)
        end = "\r" if b"\r" in head[:-1] and b"\n" not in head else "\n"  # as text from an old Mac
        text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", end)
        while line := text.readline(MAX_LINE):
            number, unlooked = number + 1, unlooked + len(line)
            if len(line) == MAX_LINE:
                raise UserError(f"line {number}: longer than {MAX_LINE:,} characters: is it text?")
            yield line.rstrip("\r\n") + "\n"
            if unlooked > CHUNK_BYTES:
                if stream.tell() > max(EXPANSION_FROM, MAX_EXPANSION * file.tell()):
                    raise UserError(f"grows more than {MAX_EXPANSION}-fold when unzipped: is it a log?")
                if progress:
                    progress(file.tell() - told)
                unlooked, told = 0, file.tell()
    except UserError:  # which is a ValueError too
        raise
    except Exception as error:  # of many kinds, where a gzip or zip file is cut, altered, encrypted or oddly packed
        if isinstance(error, OSError) and error.errno:
            raise  # of the system, which opened_by_name names
        raise UserError(f"damaged gzip or zip file after line {number} ({error}); fetch it again") from None


def _unpacked(file, member):
    """Return the bytes of a file as a stream: of a member of a zip archive, of a gzip file, or as they are."""
    head = file.peek(4)[:4]
    if head != b"PK\x03\x04":
        return gzip.GzipFile(fileobj=file) if head[:2] == b"\x1f\x8b" else file
    archive = zipfile.ZipFile(file)
    names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX")]
    if {"xl/workbook.xml", "[Content_Types].xml"} & set(names):
        raise UserError(KNOWN["excel"])
    names = [name for name in names if member in (None, name)]
    if len(names) != 1:
        held = f"that holds no {member}" if member else f"of {len(names)} files; unzip it and choose one"
        raise UserError(f"a zip archive {held}")
    return archive.open(names[0])


# Lines into rows


def _text(lines, columns, format):
    """Return the _Table of lines of text."""
    first = lines.head[0][1]
    if format == "json" or format is None and first.lstrip().startswith("{"):
        return _objects(lines)
    delimiters = [lines.delimiter] if lines.delimiter else DELIMITERS
    tables = [_table(lines, delimiter, columns) for delimiter in delimiters if format not in ("lines", "pairs")]
    found = max(filter(None, tables), default=None, key=itemgetter(0))
    return found[1] if found else _words(lines, columns, format)


def _table(lines, delimiter, columns):
    """Return how clearly lines are a table with this delimiter, and the _Table; None where they are none."""
    sample = []
    with contextlib.suppress(csv.Error):  # of a row that goes on behind the sample
        sample.extend(_split((line for _, line in lines.head), delimiter))
    width = len(sample[0]) if sample else 0
    header = width > 1 and is_header(sample, columns)
    known, even = header and len(known_places(sample[0])) == 2, all(0 <= len(row) - width <= 1 for row in sample)
    blank = delimiter == " "  # of which words may be made too
    if width < 2 or not (known or (columns and even if blank else even or delimiter in ("\t", "::", ","))):
        return None
    names = list(map(clean_name, sample[0])) if header else [f"column {n + 1}" for n in range(width)]
    rows = partial(_rows, lines, delimiter, width, sample[0] if header else None)
    inter = delimiter == "\t" and any(":token" in field for field in sample[0])
    read_as = "inter" if inter else f"csv ({DELIMITERS.get(delimiter, delimiter)})"
    clarity = (not blank, known, even, width)
    return clarity, _Table(names, header, sample[header:], rows, read_as, lines.remarks)


def _rows(lines, delimiter, width, header, places):
    """Yield the number of each row of a table and its fields at these places."""
    rows, pick = _split(lines, delimiter), itemgetter(*places)
    try:
        for row in itertools.islice(rows, header is not None, None):
            if len(row) != width and (len(row) != width + 1 or row[-1]):  # more: behind a trailing delimiter
                how = "delete it where it is no row; row names need a name, or R's row.names=FALSE"
                lines.fail(f"{len(row)} fields where the first line has {width}: {how}")
            if row == header:
                lines.fail("the header again: were two files joined? Delete this line")
            yield lines.number, *pick(row)
    except csv.Error as error:
        lines.fail(f"not valid CSV ({error}); check its quotes")


def _split(lines, delimiter):
    """Yield lines as lists of fields. Between tabs or :: a quote is a character unless it opens and closes a field."""
    if delimiter not in ("\t", "::"):
        lines = map(str.strip, lines) if delimiter == " " else lines
        yield from csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
        return
    for line in lines:
        fields = line[:-1].split(delimiter)
        if '"' in line:
            fields = [f[1:-1].replace('""', '"') if len(f) > 1 and f[0] == f[-1] == '"' else f for f in fields]
        yield fields


def _words(lines, columns, format):
    """Return the _Table of lines or pairs. Both are `user item ...`; they differ in what may not be: in lines a user
    comes once, in pairs a line has two words."""
    (number, first), *below = [(number, line.strip()) for number, line in lines.head]
    marked = next((line for _, line in below if NO_WORDS.search(line)), None)
    if columns or len(WORD.findall(first)) < 2 and not marked or format in ("inter", "csv"):
        which = f"no columns {', '.join(columns)}" if columns else "expected `user item item ...`, or a header"
        lines.fail(f"{which}; found {shown(first)}; --columns and --format tell", number)
    if format is None and (mark := NO_WORDS.search(first)):
        how = "in a line of words: a table? Name its --columns; else --format lines"
        lines.fail(f"{shown(mark[0].strip())} {how}", number)
    if format is None and marked:
        how = "delete a title; what holds for a block of rows belongs into each of them"
        lines.fail(f"{shown(first)} stands above rows such as {shown(marked)}: {how}", number)
    pairs = format == "pairs" or format is None and all(len(WORD.findall(line)) == 2 for _, line in lines.head)

    def rows(places):
        users = set()
        for user, *items in map(WORD.findall, lines):
            if pairs and len(items) != 1:
                lines.fail(f"{1 + len(items)} fields where the first line has 2")
            if user in users and not pairs:
                lines.fail(f"user {shown(user)} has a line already; a table? Name its --columns, as in 1,2,3")
            users.add(user)
            yield from ((lines.number, user, item) for item in items or [""])  # "": a user without an item

    return _Table(["user", "item"], True, [], rows, "pairs" if pairs else "lines", lines.remarks)


def _objects(lines):
    """Return the _Table of lines that are objects, JSON or Python literals.

    What is nested stands beside the rest, {"user": {"id": 5}} as user.id. Where the items are in a list of objects, as
    in {"session": 5, "events": [{"item": 7}, ...]}, each of these is a row.
    """
    literal = re.match(r"\s*\{\s*u?'", lines.head[0][1])
    parse = ast.literal_eval if literal else partial(json.loads, parse_int=str, parse_float=str)

    def records(line, many=None, number=None):
        try:
            line.encode()  # or it is no UTF-8
            fields = _flat(parse(line[:MAX_OBJECT].strip()))
            return [fields | _flat(part, prefix) for part in fields.pop(many) or ()] if many in fields else [fields]
        except (ValueError, SyntaxError, AttributeError, TypeError, RecursionError, MemoryError):
            lines.fail("not one JSON object, or one Python literal, a line, in UTF-8", number)

    def rows(places):
        chosen = [names[place] for place in places]
        for line in lines:
            for fields in records(line, many if set(chosen) & set(parts) else None):
                values = [fields.get(name, "") for name in chosen]
                if list in map(type, values):
                    lines.fail(f"a list in {', '.join(chosen)}; give a log of one interaction a row")
                yield lines.number, *(repr(v)[1:-1] if CONTROL.search(v) else v for v in map(str, values))  # as written

    many, parts, prefix = None, {}, ""
    head = [fields for number, line in lines.head for fields in records(line, None, number)]
    lists = [(name, field) for one in head for name, field in one.items() if isinstance(field, list)]
    nested = {name: field[0] for name, field in lists if field and isinstance(field[0], dict)}
    if len(nested) == 1 and len(known_places(head[0])) < 2:
        ((many, part),) = nested.items()
        timed, timed_part = (any(plain_name(name) in TIMES for name in fields) for fields in (head[0], part))
        prefix = f"{many}." if timed and not timed_part else ""  # are these the events, or what an event is about?
        parts = _flat(part, prefix)
        head = [fields for number, line in lines.head for fields in records(line, many, number)][:SAMPLE]
    names = list(dict.fromkeys(name for one in head for name in one if name not in dict(lists)))
    sample = [[str(one.get(name, "")) for name in names] for one in head]
    return _Table(names, True, sample, rows, "Python literals" if literal else "JSON lines", lines.remarks)


def _flat(fields, prefix=""):
    """Return nested dicts as one, with dotted names; {"id": {"$oid": "7f"}}, as MongoDB has it, is {"id": "7f"}."""
    flat = {}
    for name, field in fields.items():
        name = prefix[:-1] if str(name).startswith("$") else f"{prefix}{name}"
        flat |= _flat(field, f"{name}.") if isinstance(field, dict) else {name: "" if field is None else field}
    return flat


def _parquet(path):
    """Return the _Table of a Parquet file."""
    try:
        import pandas

        frame = pandas.read_parquet(path, dtype_backend="numpy_nullable")  # large integers stay whole beside nulls
    except ImportError:
        raise UserError("a Parquet file needs pandas and pyarrow: pip install pandas pyarrow") from None
    except Exception as error:  # of many kinds, by what reads it
        raise UserError(f"cannot be read as Parquet ({str(error).split(chr(10))[0]})") from None

    def rows(places, n=None):
        return zip(itertools.count(1), *(texts_of(frame.iloc[:n, place]) for place in places), strict=False)

    sample = [row[1:] for row in rows(range(len(frame.columns)), SAMPLE)]
    return _Table(list(map(str, frame.columns)), True, sample, rows, "Parquet", unit="row")
