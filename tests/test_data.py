"""Readers, splits, windows and batches."""

import bz2
import csv
import gzip
import io
import json
import lzma
import math
import os
import pickle
import re
import tarfile
import zipfile
from collections import Counter
from contextlib import contextmanager
from fractions import Fraction
from itertools import groupby, pairwise
from unittest.mock import patch

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import log_of, real_log, run_cli
from hypothesis import assume, given
from hypothesis import strategies as st

from minirec.cli import main
from minirec.data import log as log_module
from minirec.data import planted, read
from minirec.data.log import drop_repeats, k_core, users_of
from minirec.data.split import (
    Split,
    _quantile,
    batches,
    leave_one_out,
    seen_items,
    temporal,
    training_windows,
    unseen_negatives,
    windows_end_to_end,
)
from minirec.errors import UserError

UNORDERED = [("u1", "c", 30), ("u2", "b", 10), ("u1", "b", 20), ("u1", "a", 10), ("u2", "a", 10)]
EXPECTED = {"u1": ["a", "b", "c"], "u2": ["b", "a"]}


def histories(log):
    return {user: [log.items[i] for i in log.history(u)] for u, user in enumerate(log.users)}


WELL_FORMED = {
    "lines": "u1 a b c\nu2 b a\n",
    "lines, untidy": "\n  u1 a  b c \r\n\r\nu2 b a",
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
    "csv, drawn": " user | item | time\n------+------+------\n u1 | c | 3\n"
    " u1 | b | 2\n u2 | b | 0\n u1 | a | 1\n u2 | a | 1\n",
    "json": "".join(json.dumps({"user": u, "item": i, "time": t}) + "\n" for u, i, t in UNORDERED),
    "json, Python's": "".join(f"{ {'user': {'id': u}, 'item': i, 'time': t, 'x': [1]} }\n" for u, i, t in UNORDERED),
    "json, nested": '{"session": "u1", "events": [{"aid": "c", "ts": 3}, {"aid": "a", "ts": 1}, '
    '{"aid": "b", "ts": 2}]}\n'
    '{"session": "u2", "events": [{"aid": "b", "ts": 3}, {"aid": "a", "ts": 3}]}\n',
    "inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    'u1\tb\t"5\t20\nu1\ta\t3\t10\nu1\tc\t3\t30\nu2\tb\t1\t5\nu2\ta\t1\t5\n',
}


@pytest.mark.parametrize("text", WELL_FORMED.values(), ids=WELL_FORMED)
@pytest.mark.parametrize("zipped", [False, True])
def test_every_format_is_recognised_and_read(tmp_path, text, zipped):
    path = tmp_path / "log"
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    assert histories(read.read_log(path)) == EXPECTED


def test_one_short_line_does_not_make_pairs(tmp_path):
    path = tmp_path / "log"
    path.write_text("u1 a b c\nu2 b\n")
    assert histories(read.read_log(path)) == {"u1": ["a", "b", "c"], "u2": ["b"]}


def test_format_and_columns_can_be_given(tmp_path):
    path = tmp_path / "log"
    path.write_text("who,what,when\nu1,b,2\nu1,a,1\nu1,c,3\nu2,b,1\nu2,a,1\n")
    assert histories(read.read_log(path, columns=("who", "what", "when"))) == EXPECTED
    path.write_text("user item\nuser a\nx a\nuser b\n")
    assert histories(read.read_log(path, format="pairs")) == {"user": ["item", "a", "b"], "x": ["a"]}


def test_known_column_names_go_by_preference_not_by_place(tmp_path):
    path = tmp_path / "log"
    path.write_text("session_id,date,user,item,timestamp\n1,9,u1,b,2\n2,9,u1,a,1\n3,9,u1,c,3\n4,0,u2,b,1\n5,0,u2,a,1\n")
    assert histories(read.read_log(path)) == EXPECTED


def test_a_first_line_longer_than_a_csv_field_may_be(tmp_path):
    path = tmp_path / "log"
    path.write_text("u1 " + "a b c " * 40_000 + "\nu2 b a\n")
    assert len(read.read_log(path).history(0)) == 120_000


def test_nanosecond_timestamps_are_not_rounded(tmp_path):
    path = tmp_path / "log"
    base = 1_700_000_000_000_000_000
    path.write_text(f"user,item,time\nu1,c,{base + 2}\nu1,b,{base + 1}\nu1,a,{base}\nu2,b,0\nu2,a,0\n")
    assert histories(read.read_log(path)) == EXPECTED


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=8).filter(
    lambda name: name not in log_module.MISSING
)


SEQUENCES = st.lists(st.lists(NAMES, min_size=3, max_size=6), min_size=2, max_size=6)
SIZES = st.sampled_from([7, 64, 1 << 22])  # of what is read at a time: lines lie across its ends, or all in one
DELIMITERS = ("\t", "::", ";", "|", ",")


@contextmanager
def pieces_of(size):
    """Read so many bytes at a time, and the times of few rows together."""
    with patch.object(read, "CHUNK_BYTES", size), patch.object(log_module, "ROWS_AT_A_TIME", 3):
        yield


@given(SEQUENCES, st.sampled_from(read.FORMATS), st.sampled_from(DELIMITERS), SIZES, st.booleans())
def test_any_ids_in_any_format_come_back(tmp_path_factory, sequences, format, delimiter, size, zipped):
    users = [f"u{u}" for u in range(len(sequences))]
    rows = [(user, item, t) for user, items in zip(users, sequences, strict=True) for t, item in enumerate(items)]
    text = io.StringIO(newline="")
    if format == "lines":
        text.writelines(" ".join([user, *items]) + "\n" for user, items in zip(users, sequences, strict=True))
    elif format == "pairs":
        text.writelines(f"{user}\t{item}\n" for user, item, _ in rows)
    elif format == "inter":
        text.write("user_id:token\titem_id:token\ttimestamp:float\n")
        text.writelines(f"{user}\t{item}\t{t}\n" for user, item, t in sorted(rows, key=lambda row: row[2] % 3))
    elif format == "json":
        text.writelines(json.dumps({"time": t, "user": user, "item": item}) + "\n" for user, item, t in rows[::-1])
    else:
        writer = csv.writer(text, delimiter="|" if delimiter == "::" else delimiter)
        writer.writerows([("user", "item", "time"), *sorted(rows, key=lambda row: -row[2])])
    path = tmp_path_factory.mktemp("ids") / "log"
    content = text.getvalue().encode()
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pieces_of(size):
        assert histories(read.read_log(path, format=format)) == dict(zip(users, sequences, strict=True))


ROW = st.tuples(st.sampled_from("uvwx"), st.sampled_from(["a", "b", 'c"', "d,e", "\u00e9"]), st.integers(-5, 5))


@given(st.lists(ROW, min_size=1, max_size=30), SIZES, st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
def test_a_table_is_read_as_by_a_plain_loop(tmp_path_factory, rows, size, quoting):
    path = tmp_path_factory.mktemp("table") / "log.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=quoting).writerows(
            [("time", "item", "note", "user"), *((t, i, "", u) for u, i, t in rows)]
        )
    expected = {}
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            expected.setdefault(row["user"], []).append((int(row["time"]), row["item"]))
    expected = {user: [item for _, item in sorted(pairs, key=lambda p: p[0])] for user, pairs in expected.items()}
    with pieces_of(size):
        if len(expected) < 2 or max(map(len, expected.values())) < 3:
            with pytest.raises(UserError):
                read.read_log(path)
            return
        log = read.read_log(path)
    assert histories(log) == expected and log.users == list(expected)
    assert log.items == list(dict.fromkeys(item for _, item, _ in rows))


GOOD = "u1 a b c\nu2 b a\n"
TABLE = "user,item,time\nu1,a,1\nu1,b,2\nu1,c,3\nu2,a,1\n"


def zip_file(*names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, TABLE)
    return buffer.getvalue()


def tar_file():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("log.csv"))
    return buffer.getvalue()


def npy_file():
    buffer = io.BytesIO()
    np.save(buffer, np.arange(9))
    return buffer.getvalue()


def malformed_files():
    """Yield names, files, and what must be said of them."""
    # Nothing, or nothing to use
    yield "empty", b"", "empty"
    yield "blank", b"\n \n\n", "empty"
    yield "blank, CRLF", b"\r\n\r\n", "empty"
    yield "a byte order mark alone", b"\xef\xbb\xbf", "empty"
    yield "an empty gzip file", gzip.compress(b""), "empty"
    yield "one line", b"u1 a b c\n", "1 user"
    yield "one user", b"user,item\nu1,a\nu1,b\nu1,c\n", "1 user"
    yield "short", b"u1 a b\nu2 b a\n", "no user has 3"
    yield "short pairs", b"u1 a\nu2 b\n", "no user has 3"
    yield "prose", b"hello\n", "line 1: expected"
    yield (
        "prose of many words",
        b"It was the best of times,\nit was the worst of times,\nIt was\n",
        "a table with no header",
    )
    # Other files
    for name, content, message in (
        ("two files in a zip", zip_file("log.csv", "more.csv"), "a zip archive of 2 files; unzip it"),
        ("xlsx", zip_file("[Content_Types].xml"), "an Excel workbook; in Python:.*read_excel"),
        ("xlsx, other order", zip_file("xl/workbook.xml"), "an Excel workbook"),
        ("xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99), "binary"),
        ("tar", tar_file(), "a tar archive"),
        ("tar.gz", gzip.compress(tar_file()), "a tar archive"),
        ("gzip, twice", gzip.compress(gzip.compress(GOOD.encode())), "compressed twice"),
        ("bz2", bz2.compress(GOOD.encode()), "not by gzip"),
        ("xz", lzma.compress(GOOD.encode()), "not by gzip"),
        ("zstd", b"\x28\xb5\x2f\xfd\x04\x00" + bytes(20), "not by gzip"),
        (
            "zip whose directory is no text",  # the flag says that names are UTF-8
            zip_file("é.csv").replace("é".encode(), b"\xf9\xf9"),
            "damaged gzip or zip file",
        ),
        (
            "zip whose member is called otherwise than in its directory, and by no text",
            zip_file("é.csv").replace("é".encode(), b"\xf9\xf9", 1),
            "damaged gzip or zip file",
        ),
        ("parquet", b"PAR1\x15\x04\x15" + bytes(40) + b"PAR1", "a Parquet file needs pandas|cannot be read as Parquet"),
        ("npy", npy_file(), "binary"),
        ("HDF5", b"\x89HDF\r\n\x1a\n" + bytes(40), "binary"),
        ("SQLite", b"SQLite format 3\0" + bytes(40), "binary"),
        ("PDF", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "binary"),
        ("PNG", b"\x89PNG\r\n\x1a\n\x00\x00", "binary"),
        ("ELF", b"\x7fELF\x02\x01\x01" + bytes(40), "binary"),
        ("JSON", b'{"user": "u1", "item": "a"}\n{"user": "u1", "item": "b"\n', "line 2: not one JSON object"),
        ("JSON, a list", b'[{"user": "u1"}]', "one JSON list; in Python:.*read_json"),
        ("JSON, indented", b'[\n  {\n    "user": "u1"\n  }\n]', "JSON"),
        ("Python's code", b"{'reviewerID': 'u1', 'asin': open('a')}\n", "line 1: not one JSON"),
        ("HTML", b"<!DOCTYPE html>\n<html><body>404</body></html>\n", "a web page"),
        ("HTML, untidy", b"\n <HTML><body>Sign in</body></HTML>\n", "a web page"),
        ("XML", b"<?xml version='1.0'?>\n<a/>\n", "a web page"),
    ):
        yield name, content, message
    for protocol in (2, 3, 4, 5):
        yield f"pickle {protocol}", pickle.dumps([("u1", "a")], protocol), "a Python pickle"
    whole = gzip.compress(GOOD.encode())
    for size in (2, 5, 12, len(whole) - 9, len(whole) - 1):
        yield f"{size} bytes of gzip", whole[:size], "damaged gzip or zip file"
    yield "gzip, another byte", whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:], "damaged gzip or zip file"
    yield "gzip, more after it", whole + b"more", "damaged gzip or zip file"
    yield "no gzip but its name", b"\x1f\x8bu1 a b c\n", "damaged gzip or zip file"
    # Text in other encodings, and what is no text
    for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
        name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
        for mark in ("", "\ufeff"):
            yield f"{encoding} {mark!a}", (mark + TABLE).encode(encoding), f"{name[:6]} text.*iconv -f {name}"
    for encoding, text in (
        ("latin-1", "caf\xe9"), ("cp1252", "it\u2019s"), ("shift-jis", "\u6a5f"), ("euc-kr", "\uae30"),
        ("gbk", "\u4e2d"),
    ):  # fmt: skip
        yield (
            encoding,
            f"user,item\nu1,a\nu1,{text}\n".encode(encoding),
            "line 3: item id .* not UTF-8.* iconv",
        )
    for name, content in (
        ("cut", b"\xe2\x82"), ("overlong", b"\xc0\xaf"), ("surrogate", b"\xed\xa0\x80"), ("lone", b"\x80"),
    ):  # fmt: skip
        yield f"UTF-8, {name}", b"u1 a b c\nu2 x" + content + b" a\n", "line 2: item id .* not UTF-8"
    yield (
        "JSON, Latin-1",
        '{"user": "u1", "item": "caf\xe9"}\n'.encode("latin-1"),
        "line 1: not one JSON object.* in UTF-8",
    )
    for code in (0, 1, 7, 8, 11, 12, 13, 14, 26, 27, 31, 127, 128, 133, 155, 159):
        yield f"U+{code:04X}", f"u1 a b c\nu2 a{chr(code)}b c\n".encode(), "line 2: item id .* control character"
        yield (
            f"U+{code:04X} in a table",
            f"{TABLE}u2,a{chr(code)}b,4\n".encode(),
            "line 6: item id .* control character|not valid CSV",
        )
    # Ids
    yield "long item", b"u1 a b c\nu2 " + b"x" * 257 + b" b\n", "line 2: item id of 257 bytes"
    yield "long user", b"u1 a b c\n" + b"x" * 257 + b" a b\n", "line 2: user id of 257 bytes"
    yield (
        "long item of a table",
        TABLE.encode() + ("u2," + "\u00e9" * 129 + ",5\n").encode(),
        "line 6: item id of 258 bytes",
    )
    yield "long user of a table", TABLE.encode() + b"u" * 300 + b",a,5\n", "line 6: user id of 300 bytes"
    yield "long line", b"u1 a b c\nu2 " + b"x" * (17 << 20), "line 2: longer than 16,777,216 characters"
    yield "broken id", b'user,item\nu1,"a\nb"\n', "line 3: item id .* has a line break"
    yield "broken user", b'user,item\nu1,a\n"u\n2",a\n', "line 4: user id .* has a line break"
    # Lines and pairs
    yield "lone user", b"u2\nu1 a b c\n", "line 1: expected"
    yield "lone user after blank lines", b"\n\n\n\nu2\nu1 a b c\n", "line 5: expected"
    yield "headerless ratings", b"u1 a 5\nu2 b 3\nu1 b 4\n", "line 3: user 'u1' has a line already"
    yield (
        "headerless CSV",
        b"u1,a,5\nu2,b,3\n",
        "no header.*1='u1' 2='a' 3='5'.*--columns 1,2$",
    )
    yield "pairs, then a line", b"u1 a\nu1 b\nu2 a b c\n", "line 2: user 'u1' has a line already"
    yield "spaced header", b"user_id item_id\nu1 a\nu1 b\n", "1 user"
    # Headers
    yield "unknown columns", b"foo,bar\n1,2\n", "no user and item columns.*--columns USER,ITEM$"
    yield "no item column", b"user,rating\nu1,3\n", "no user and item columns.*--columns user,ITEM"
    yield "header only", b"user,item,time\n", "no interactions"
    yield "header only, no line break", b"user,item", "no interactions"
    yield "header and blank lines", b"user,item\n\n\n", "no interactions"
    yield "inter, header only", b"user_id:token\titem_id:token\n", "no interactions"
    yield "two user columns", b"user,item,user\nu1,a,u2\n", "two columns are called 'user'"
    yield "two like columns", b"Item ID,user,item_id\na,u1,b\n", "two columns are called 'Item ID'"
    yield "header twice", b"user,item\nu1,a\nu1,b\nuser,item\nu1,c\n", "line 4: the header again"
    yield "header twice, with times", f"{TABLE}{TABLE}".encode(), "line 6: the header again"
    # Rows
    for delimiter in DELIMITERS:
        rows = TABLE.replace(",", delimiter)
        for name, row, message in (
            ("short", "u3{0}a", "2 fields where the first line has 3"),
            ("long", "u3{0}a{0}1{0}x", "4 fields"),
            ("single", "u3", "1 fields"),
        ):
            text = f"{rows}{row.format(delimiter)}\n{rows.split(chr(10), 1)[1]}"
            yield f"{name} at {delimiter!r}", text.encode(), f"line 6: {message}"
    yield "rows that are ragged and even on average", b"user,item\nu1,a\nu1\nu2,b,c\n", "line 3: 1 fields"
    yield "inter, ragged", b"user_id:token\titem_id:token\nu1\ta\nu1\n", "line 3: 1 fields"
    yield "a bad row after blank and quoted lines", b'user,item\n\n"u1",a\n\n\nu1,"b"\nu1\n', "line 7: 1 fields"
    yield "a bad row after a quoted line break", b'user,x,item\nu1,"\n\n",a\nu1\n', "line 5: 1 fields"
    yield "bad quotes", b'user,item\nu1,"a"b\n', "line 2: not valid CSV"
    yield "open quotes", b'user,item\nu1,"a\nu1,b\n', "line 3: not valid CSV"
    for text in (
        "inf", "-Infinity", "1e999", "yesterday", "0x10", "1 000", "1.2.3", "--1", "12:00",
        "2014-13-01", "2014-02-30", "2014-05", "05/03/2014", "2014/05/03", "3 May 2014", "2014-05-03 25:00",
        "9" * 5000 + "x",
    ):  # fmt: skip
        yield (
            f"time {text[:20]}",
            f"{TABLE}u2,b,{text}\nu2,c,4\n".encode(),
            f"line 6: timestamp '{re.escape(text[:20])}",
        )
    yield (
        "a date after numbers",
        f"{TABLE}u2,b,2014-05-03\n".encode(),
        "line 6: timestamp .* is not written as",
    )
    dates = "".join(f"u{i % 2},a,2014-05-{10 + i}\n" for i in range(20))
    yield (
        "a number after dates",
        f"user,item,time\n{dates}u1,b,20140503\n".encode(),
        "line 22: timestamp .* is not written as",
    )


MALFORMED = {name: (content, message) for name, content, message in malformed_files()}


def test_the_corpus_is_large():
    assert len(MALFORMED) > 150


@pytest.mark.parametrize("content, message", MALFORMED.values(), ids=MALFORMED)
def test_malformed_logs_are_refused_naming_file_and_line(tmp_path, content, message):
    path = tmp_path / "bad.log"
    path.write_bytes(content)
    result = CliRunner().invoke(main, ["describe", str(path)])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1 and result.stderr.isprintable() <= 1
    assert re.match(f"Error: {re.escape(str(path))}(:|,) ?.*(?:{message})", result.stderr), result.stderr
    assert ("damaged" in result.stderr) == ("damaged" in message)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == content


@pytest.mark.parametrize("name", ["U+0000", "JSON"])
@pytest.mark.parametrize(
    "command", [["describe"], ["train", "--data"], ["study", "--data"]], ids=lambda words: words[0]
)
def test_every_command_that_reads_a_log_refuses_it_alike(tmp_path, command, name):
    (tmp_path / "bad.log").write_bytes(MALFORMED[name][0])
    process = run_cli(*command, "bad.log", cwd=tmp_path)
    assert process.returncode == 1 and re.match(f"Error: .*bad.log.*{MALFORMED[name][1]}", process.stderr)
    assert "Traceback" not in process.stderr and process.stdout == ""
    assert [file.name for file in tmp_path.iterdir()] == ["bad.log"]


def test_names_are_known_again_in_later_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "CHUNK_BYTES", 20)
    path = tmp_path / "log"
    names = [f"{'x' * (i % 13)}{i % 26}" for i in range(100)]  # the first are short
    path.write_text("user,item\n" + "".join(f"{name},{name}\n" for name in names))
    log = read.read_log(path)
    assert log.users == log.items == names[:26]
    path.write_text("u1 a b c\n" + "".join(f"u{i} a b c\n" for i in range(2, 50)) + "u1 a\n")
    with pytest.raises(UserError, match="line 50: user 'u1' has a line already"):
        read.read_log(path)


def test_what_is_wrong_is_found_wherever_it_stands(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "CHUNK_BYTES", 300)
    monkeypatch.setattr(log_module, "ROWS_AT_A_TIME", 7)
    path = tmp_path / "log"
    rows = [f"u{i % 9},i{i},{i}" for i in range(200)]
    pairs = [f"u{i % 9} i{i}" for i in range(200)]
    for place in range(0, 200, 17):
        for bad, message in (("u1,a", "2 fields"), ('"u1",a,x', "timestamp 'x'")):
            path.write_text("\n".join(["user,item,time", *rows[:place], bad, *rows[place:]]))
            with pytest.raises(UserError, match=f"line {place + 2}: {message}"):
                read.read_log(path)
        for bad, message in (
            ("u1 " + "x" * 300, "item id of 300"),
            ("u1 \x01", "item id .* control"),
        ):
            path.write_text("\n".join([*pairs[:place], bad, *pairs[place:]]))
            with pytest.raises(UserError, match=f"line {place + 1}: {message}"):
                read.read_log(path)


@pytest.mark.parametrize(
    "text",
    [b"\n \r" * 700_000, b"u1 a b\n" + b"\r" * 3_000_000 + b"u2", b"u1 \n" + b" " * 3_000_000],
    ids=["blank lines", "returns", "spaces"],  # else the test would be named by its megabytes
)
def test_endless_blanks_are_read_in_linear_time(tmp_path, text):
    (tmp_path / "log").write_bytes(text)
    with pytest.raises(UserError):
        read.read_log(tmp_path / "log")  # or does not end


def test_a_file_that_grows_out_of_proportion_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "EXPANSION_FROM", 1 << 18)
    monkeypatch.setattr(read, "CHUNK_BYTES", 1 << 18)
    path = tmp_path / "bomb.gz"
    for content in (b"u1 a\n" * 10**5, b"\n" * 10**6, b"user,item\n" + b"u1,a\n" * 10**5):
        path.write_bytes(gzip.compress(content))
        with pytest.raises(UserError, match="bomb.gz: grows more than 100-fold"):
            read.read_log(path)


@pytest.mark.parametrize(
    "format, columns, message",
    [
        ("pairs", None, "line 1: 4 fields where the first line has 2"),
        ("csv", None, "line 1: expected .* or a header"),
        ("inter", None, "line 1: expected .* or a header"),
        (None, ("who", "what"), "no columns who, what"),
    ],
)
def test_what_was_asked_for_but_is_not_there_is_refused(tmp_path, format, columns, message):
    path = tmp_path / "log"
    path.write_text(GOOD)
    with pytest.raises(UserError, match=message):
        read.read_log(path, columns, format)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: None, "cannot be read .No such file"),
        (lambda path: path.mkdir(), "cannot be read .Is a directory"),
        (lambda path: os.mkfifo(path), "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda path: path.symlink_to(path), "cannot be read .Too many levels"),
    ],
    ids=["missing", "folder", "FIFO", "device", "loop"],
)
def test_what_is_no_file_is_refused(tmp_path, make, message):
    make(tmp_path / "log")
    with pytest.raises(UserError, match=f"log: {message}"):
        read.read_log(tmp_path / "log")


def test_leave_one_out_holds_out_the_last_two():
    log = log_of([[0, 1, 2, 3], [4, 5], [6, 7, 8], [9]])
    split = leave_one_out(log)
    assert list(split.train_lengths) == [2, 2, 1, 1]
    for part, targets, before in (("valid", [2, 7], [[0, 1], [6]]), ("test", [3, 8], [[0, 1, 2], [6, 7]])):
        wanted = getattr(split, part)
        assert list(wanted.users) == [0, 2]
        assert list(log.sequence[wanted.stops]) == targets
        assert [list(log.sequence[a:b]) for a, b in zip(wanted.starts, wanted.stops, strict=True)] == before


LISTS = st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=8), min_size=2, max_size=12)


@given(LISTS)
def test_leave_one_out_equals_a_plain_loop(sequences):
    log = log_of(sequences)
    split = leave_one_out(log)
    long = {user: items for user, items in enumerate(sequences) if len(items) >= 3}
    for part, back in ((split.valid, 2), (split.test, 1)):
        cases = zip(part.users, part.starts, part.stops, strict=True)
        found = {user: (log.sequence[start:stop].tolist(), log.sequence[stop]) for user, start, stop in cases}
        assert found == {user: (items[:-back], items[-back]) for user, items in long.items()}
    assert list(split.train_lengths) == [len(items) - 2 * (len(items) >= 3) for items in sequences]


@given(st.integers(0, 10**6))
def test_the_temporal_split_predicts_only_what_came_after_all_it_was_trained_on(seed):
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(np.arange(1, 300), 29, replace=False))
    log = log_of(np.split(np.arange(300), cuts))  # every item is unique
    times = rng.integers(50, size=300)  # many are equal
    log.times = np.concatenate([np.sort(times[a:b]) for a, b in pairwise(log.offsets)])
    split = temporal(log)
    trained = np.concatenate([log.times[a : a + n] for a, n in zip(log.offsets[:-1], split.train_lengths, strict=True)])
    test_begins = np.quantile(log.times, 0.9)
    known = [log.times[a:b][log.times[a:b] <= test_begins] for a, b in pairwise(log.offsets)]
    valid_begins = np.quantile(np.concatenate([times for times in known if len(times) > 1]), 0.9)
    assert sorted(trained) == sorted(log.times[log.times <= valid_begins])
    for part, begins, ends in ((split.valid, valid_begins, test_begins), (split.test, test_begins, np.inf)):
        expected = {}  # user -> place of the last item in the part, where something came before it
        for user in range(len(log.users)):
            inside = [i for i in range(*log.offsets[user : user + 2]) if begins < log.times[i] <= ends]
            if inside and inside[-1] > log.offsets[user]:
                expected[user] = inside[-1]
        assert dict(zip(part.users, part.stops, strict=True)) == expected
        np.testing.assert_array_equal(part.starts, log.offsets[part.users])


def test_validation_begins_at_the_quantile_of_users_who_have_something_to_validate():
    """Before the first quantile, 88: the eleven times of one user, and two users with one time each, left out."""
    log = log_of([list(range(11)), [0], [1], [2, 3]])
    log.times = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 80, 85, 90, 91])
    split = temporal(log)
    assert 85 < np.quantile(log.times, 0.9) < 90 and np.quantile(log.times[:11], 0.9) == 9
    assert list(split.train_lengths) == [10, 0, 0, 0]
    assert (list(split.valid.users), list(split.valid.stops)) == ([0], [10])
    assert list(split.test.users) == [3]


@pytest.mark.parametrize("beginning", [0, 1_700_000_000_000_000_001, 0.5])
def test_a_single_item_counts_in_training_up_to_the_quantile_not_only_up_to_the_last_time_before_it(beginning):
    """Validation begins at 18, between the times 0 and 20 of the only user who has something to validate."""
    log = log_of([[0, 1, 2], [1], [2], [3]])
    for time, trained in ((16, 1), (18, 1), (19, 0)):
        log.times = np.array([0, 20, 180, time, 22, 24]) + beginning
        assert list(temporal(log).train_lengths) == [1, trained, 0, 0]


@given(st.integers(0, 10**6), st.sampled_from([1_700_000_000_123_456_789, -(2**63), 2**63 - 60]))
def test_the_temporal_split_tells_times_apart_by_a_nanosecond(seed, beginning):
    rng = np.random.default_rng(seed)
    log = log_of(np.split(np.arange(100), np.sort(rng.choice(np.arange(1, 100), 9, replace=False))))
    times = rng.permutation(100) // 2  # each is there twice, so every draw leaves something to predict
    log.times = np.concatenate([np.sort(times[a:b]) for a, b in pairwise(log.offsets)])
    expected = temporal(log)
    log.times = log.times + beginning
    found = temporal(log)
    np.testing.assert_array_equal(found.train_lengths, expected.train_lengths)
    for part, expected_part in zip(found[1:], expected[1:], strict=True):
        for column, expected_column in zip(part, expected_part, strict=True):
            np.testing.assert_array_equal(column, expected_column)


@given(st.lists(st.integers(0, 2**63 - 1) | st.integers(2**60, 2**60 + 9), min_size=1, max_size=40))
def test_what_is_not_above_the_quantile_is_told_exactly(times):
    begins = _quantile(np.array(times))
    place = Fraction(9, 10) * (len(times) - 1)
    ordered = sorted(times)
    a, b = ordered[math.floor(place)], ordered[math.ceil(place)]
    quantile = a + (b - a) * (place - math.floor(place))  # as NumPy interpolates, without its rounding
    assert [time <= begins for time in times] == [time <= quantile for time in times]


def test_the_temporal_split_says_what_it_lacks():
    log = log_of([[0, 1, 2, 3], [4, 5, 6]])
    with pytest.raises(UserError, match="no timestamps.*--split leave-one-out"):
        temporal(log)
    log.times = np.zeros(7)
    with pytest.raises(UserError, match="no user has a target for validation"):
        temporal(log)


def test_times_follow_their_interactions(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("user,item,time\na,x,3\nb,y,5\na,y,1\na,z,2\nb,x,4\n")
    log = read.read_log(path)
    assert list(log.times) == [1, 2, 3, 4, 5]
    assert [log.items[i] for i in log.sequence] == ["y", "z", "x", "x", "y"]


@pytest.mark.parametrize("keep", [drop_repeats, lambda log: k_core(log, 3)], ids=["drop_repeats", "k_core"])
def test_times_stay_with_their_interactions_in_what_a_filter_keeps(rng, keep):
    log = log_of([rng.integers(9, size=n).tolist() for n in rng.integers(1, 12, 20)])
    log.times = np.arange(len(log.sequence)) * 10  # each tells which interaction it is of
    kept = keep(log)
    assert 0 < len(kept.sequence) < len(log.sequence) and len(kept.users) > 3
    of = dict(zip(log.times.tolist(), zip(users_of(log), log.sequence, strict=True), strict=True))
    for time, user, item in zip(kept.times.tolist(), users_of(kept), kept.sequence, strict=True):
        assert (kept.users[user], kept.items[item]) == (log.users[of[time][0]], log.items[of[time][1]])


@given(LISTS, st.integers(2, 3))
def test_the_k_core_is_the_largest_log_in_which_nobody_is_rare(sequences, k):
    log = log_of(sequences)
    pairs = [(u, i) for u, sequence in enumerate(sequences) for i in sequence]
    while True:  # one after the other, whoever is rare
        users, items = zip(*pairs, strict=True) if pairs else ((), ())
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
            k_core(log, k)
        return
    core = k_core(log, k)
    assert [(core.users[u], core.items[i]) for u in range(len(core.users)) for i in core.history(u)] == [
        (str(u), str(i)) for u, i in pairs
    ]
    again = k_core(core, k)
    assert (again.users, again.items) == (core.users, core.items)
    np.testing.assert_array_equal(again.sequence, core.sequence)


def test_only_repeats_that_follow_each_other_are_dropped():
    log = drop_repeats(log_of([[1, 1, 0, 1, 1, 1], [1, 0, 0]]))
    assert [list(log.history(u)) for u in range(2)] == [[1, 0, 1], [1, 0]]


@given(LISTS)
def test_dropping_repeats_equals_a_plain_loop(sequences):
    log = drop_repeats(log_of(sequences))
    expected = {str(user): [str(item) for item, _ in groupby(items)] for user, items in enumerate(sequences)}
    assert histories(log) == expected
    assert log.items == sorted({item for items in expected.values() for item in items}, key=int)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(1, 6))
def test_training_never_sees_a_held_out_item(lengths, max_length):
    log = log_of(np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1]))  # every item is unique
    split = leave_one_out(log)
    held_out = {int(log.sequence[s]) for part in (split.valid, split.test) for s in part.stops}
    starts, windows = training_windows(log, split, max_length)
    for start, length in zip(starts, windows, strict=True):
        assert 1 <= length <= max_length
        assert not held_out & set(log.sequence[start : start + length + 1].tolist())  # inputs and targets
    expected = [min(n - 1, max_length) for n in split.train_lengths if n >= 2]
    assert list(windows) == expected


class Given:
    """A generator whose draws are given; it checks that they lie below the bounds."""

    def __init__(self, draws):
        self.draws = np.array(draws)

    def integers(self, bounds):
        assert (self.draws < bounds).all()
        return self.draws


@given(LISTS, st.sampled_from([9, 12]))
def test_every_unseen_item_is_the_negative_of_one_draw(sequences, n_items):
    log = log_of(sequences)
    log.items = [str(i) for i in range(n_items)]  # LISTS holds 0 to 8
    split = Split(np.array([len(s) for s in sequences]), None, None)
    unseen = [sorted(set(range(n_items)) - set(items)) or None for items in sequences]
    expected, users, draws = [], [], []
    for user, items in enumerate(unseen):
        if items is None:  # the user was trained on everything: all but the target, which is 3 here
            items = [0, 1, 2, *range(4, n_items)]
        expected += items
        users += [user] * len(items)
        draws += range(len(items))
    targets = np.full(len(users), 3)
    found = unseen_negatives(Given(draws), np.array(users), targets, n_items, seen_items(log, split))
    assert list(found) == expected


@given(LISTS, st.integers(0, 10**6))
def test_unseen_negatives_equal_a_plain_loop(sequences, seed):
    log = log_of(sequences)
    split, n_items = leave_one_out(log), len(log.items)
    assume(n_items >= 2)
    users = np.random.default_rng(seed).integers(len(sequences), size=50)
    targets = np.array([sequences[user][-1] for user in users])
    found = unseen_negatives(np.random.default_rng(7), users, targets, n_items, seen_items(log, split))
    allowed = []
    for user, target in zip(users, targets, strict=True):
        seen = set(sequences[user][: split.train_lengths[user]])
        avoided = seen if len(seen) < n_items else {target}
        allowed.append([item for item in range(n_items) if item not in avoided])
    draws = np.random.default_rng(7).integers([len(items) for items in allowed])
    assert list(found) == [items[draw] for items, draw in zip(allowed, draws, strict=True)]


def test_a_user_who_has_had_all_items_but_one_gets_that_one_and_one_who_had_all_never_the_target():
    log = log_of([[*range(150), *range(151, 200), 150, 0], [*range(200), 0, 1]])
    seen = seen_items(log, leave_one_out(log))
    users, targets = np.repeat([0, 1], 2000), np.arange(4000) % 200
    found = unseen_negatives(np.random.default_rng(0), users, targets, 200, seen)
    assert set(found[:2000]) == {150}
    assert set(found[2000:]) == set(range(200)) and (found[2000:] != targets[2000:]).all()


def test_windows_end_to_end_hold_inputs_and_targets():
    flat, begins = windows_end_to_end(np.arange(10, 30), np.array([4, 0, 15]), np.array([2, 1, 3]))
    assert list(flat) == [14, 15, 16, 10, 11, 25, 26, 27, 28]
    assert list(begins) == [0, 3, 5]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), min_size=1, max_size=12))
def test_windows_end_to_end_equal_slices(windows):
    sequence = np.arange(100, 150)
    flat, begins = windows_end_to_end(sequence, *np.array(windows).T)
    pieces = [sequence[start : start + length + 1] for start, length in windows]
    np.testing.assert_array_equal(flat, np.concatenate(pieces))
    assert [flat[begin] for begin in begins] == [piece[0] for piece in pieces]


@given(st.integers(1, 500), st.integers(1, 200), st.integers(0, 5))
def test_batches_cover_everything_once_in_an_order_set_by_the_epoch(n, size, epoch):
    found = batches(n, size, 0, epoch)
    assert sorted(np.concatenate(found)) == list(range(n))
    assert all(len(batch) == size for batch in found[:-1])
    np.testing.assert_array_equal(np.concatenate(found), np.concatenate(batches(n, size, 0, epoch)))


def histories_of(log):
    return [log.history(user).tolist() for user in range(len(log.users))]


def among_three(histories, back):
    """How often an item is one of the three that most often come so many places after another one."""
    pairs = [pair for x in histories for pair in zip(x[:-back], x[back:], strict=True)]
    followers = {}
    for (before, _), n in Counter(pairs).items():
        followers.setdefault(before, []).append(n)
    return sum(sum(sorted(n)[-3:]) for n in followers.values()) / len(pairs)


@pytest.mark.parametrize("name", planted.DATASETS)
def test_a_planted_log_is_the_same_each_time_and_holds_nothing_twice(name):
    log = planted.DATASETS[name]()
    assert log.sha256() == planted.DATASETS[name]().sha256() != planted.DATASETS[name](seed=1).sha256()
    assert all(len(set(x)) == len(x) for x in histories_of(log)) and len(log.items) == planted.N_ITEMS
    lengths = np.diff(log.offsets)
    assert (lengths.min(), lengths.max()) == (planted.SHORTEST, planted.LONGEST)


@pytest.mark.parametrize(
    "name, back, least, others, most",
    [
        ("chain", [1], 0.98, [], 0),
        ("household", [3], 0.98, [1, 2, 4, 5], 0.15),
        ("drift", [1, 2, 3], 0.2, [5, 6], 0.17),
    ],
)
def test_planted_chains_follow_from_so_many_items_back_and_from_no_others(name, back, least, others, most):
    histories = histories_of(planted.DATASETS[name]())
    assert all(among_three(histories, k) > least for k in back)
    assert all(among_three(histories, k) < most for k in others)


def test_taste_has_no_order_and_few_genres_a_user():
    histories = [np.array(x) for x in histories_of(planted.taste())]
    genres = [np.bincount(history % planted.N_GENRES) / len(history) for history in histories]
    assert 0.35 < np.mean([shares.max() for shares in genres]) < 0.75  # far above 1 / N_GENRES, and not one alone
    halves = [np.array_split(history[: planted.SHORTEST] % planted.N_GENRES, 2) for history in histories]
    first, second = (np.mean([np.isin(a[i], a[1 - i]).mean() for a in halves]) for i in (0, 1))
    assert abs(first - second) < 0.03  # early tells of late as late of early, until favourites are used up


@pytest.mark.parametrize(
    "name, counts",
    [
        ("beauty.txt", (22363, 12101, 198502)),
        ("sports.txt", (35598, 18357, 296337)),
        ("lastfm.txt", (1090, 3646, 52551)),
        ("ml-1m-head.txt", (6040, 3416, 987019)),
        ("video-games.txt", (31013, 23715, 287107)),
        ("ml-100k.inter", (943, 1682, 100000)),
    ],
)
def test_real_logs_have_their_published_counts(name, counts):
    log = read.read_log(real_log(name))
    assert (len(log.users), len(log.items), len(log.sequence)) == counts
