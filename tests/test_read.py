"""Other people's files: read right or refused, never guessed. One log, written as tools and publishers write theirs."""

import csv
import io
import json
import sys
import zipfile
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minirec.data import read
from minirec.data.log import Log
from minirec.data.read import read_log
from minirec.data.times import Times, kind_of_times
from minirec.errors import UserError

# User, item, when: in the order of a file that is sorted neither by user nor by time; days and months above 12 occur.
START = datetime(2019, 9, 25, 8, 5, 9, tzinfo=UTC)
MINUTES = [
    ("7", "31", 50_000),
    ("8", "30", 0),
    ("7", "30", 90_000),
    ("8", "32", 140_000),
    ("7", "32", 10),
    ("9", "31", 5),
]
ROWS = [(user, item, START + timedelta(minutes=minutes)) for user, item, minutes in MINUTES]
RIGHT = {"7": ["32", "31", "30"], "8": ["30", "32"], "9": ["31"]}
HEADERS = {
    "\x01": "csv (Ctrl-A)",
    ",": "csv (comma)",
    "\t": "csv (tab)",
    ";": "csv (semicolon)",
    "|": "csv (|)",
    "::": "csv (::)",
}


def histories(log):
    return {user: [log.items[i] for i in log.history(u)] for u, user in enumerate(log.users)}


def seconds(when):
    return int(when.timestamp())


@pytest.fixture
def write(tmp_path):
    """A function that writes a file, text or bytes, or rows of fields, and returns its path."""

    def to_file(content, delimiter=",", end="\n"):
        if isinstance(content, list):
            content = "".join(delimiter.join(map(str, row)) + end for row in content)
        path = tmp_path / "log"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return to_file


def table(header, row):
    """The log as rows below a header; row: what makes fields of user, item, when."""
    return [header.split(), *(row(*fields) for fields in ROWS)]


# Rule 1: what was taken is said in a line


@pytest.mark.parametrize("delimiter, name", HEADERS.items())
def test_a_log_says_what_was_taken_of_its_file(write, delimiter, name):
    path = write(table("order user item price time", lambda u, i, t: (1, u, i, 2.5, seconds(t))), delimiter)
    log = read_log(path)
    assert histories(log) == RIGHT and log.dated
    assert log.read_as == (
        f"{name}: user, item, time (not used: order, price); 6 rows, 2019-09-25 08:05:09 to 2019-12-31 13:25:09 UTC"
    )
    assert log.times.tolist() == sorted(log.times[:3]) + sorted(log.times[3:5]) + [log.times[5]]


# Rules 2 and 3: a header is never data, a table without one is never guessed


def test_words_over_numbers_or_times_are_a_header_whatever_they_say(write):
    for content in ("Benutzer,Film,Wann\n1,2,3\n4,5,6\n", "wer\twas\twann\nx\ty\t2019-10-03\n", "a|b\nx|1570203301\n"):
        with pytest.raises(UserError, match="no user and item columns are known in the header .*--columns"):
            read_log(write(content))


@pytest.mark.parametrize(
    "header, command",
    [
        ("customer_no thing when", "customer_no,ITEM,when"),
        ("who sku zeit", "USER,sku,zeit"),
        ("wer was zeit", "USER,ITEM,zeit"),
    ],
)
def test_an_unknown_header_is_refused_with_the_part_of_the_command_that_is_known(write, header, command):
    rows = table(header, lambda u, i, t: (f"u{u}", f"i{i}", t.isoformat()))
    with pytest.raises(UserError, match=f"--columns {command}$"):
        read_log(write(rows))
    assert read_log(write(rows), header.split()).dated


@pytest.mark.parametrize("delimiter", HEADERS)
@pytest.mark.parametrize(
    "row, command",
    [
        (lambda u, i, t: (u, i, 5, seconds(t)), "1,2,4"),
        (lambda u, i, t: (u, t.isoformat(), i, 0), "1,3,2"),
        (lambda u, i, t: (u, i, "Bar & Café", 40.7, f"{t:%a %b %d %H:%M:%S +0000 %Y}"), "1,2,5"),
        (lambda u, i, t: (seconds(t), u, i), "2,3,1"),
    ],
)
def test_a_table_without_a_header_is_refused_with_the_command_which_then_reads_it(write, delimiter, row, command):
    path = write([row(*fields) for fields in ROWS], delimiter)
    with pytest.raises(UserError, match=f"a table with no header, whose first row is 1='.*--columns {command}$"):
        read_log(path)
    log = read_log(path, command)
    assert histories(log) == RIGHT and "column" in log.read_as
    assert histories(read_log(path, command.split(","))) == RIGHT


def test_ids_that_are_text_without_a_header_are_no_header(write):
    path = write("ann,shoe\nann,hat\nbob,shoe\nann,sock\n")
    with pytest.raises(UserError, match="no header.*1='ann' 2='shoe'.*--columns 1,2$"):
        read_log(path)
    assert histories(read_log(path, "1,2")) == {"ann": ["shoe", "hat", "sock"], "bob": ["shoe"]}


@pytest.mark.parametrize(
    "content, why",
    [
        ("u1 a\tb c\nu2 b c\n", "2 fields|no header"),
        ("u1 a 10:30\nu2 b 10:31\n", "10:30"),
        ("u1 a 2019-10-03\nu2 b 2019-10-04\n", "2019-10-03"),
        ("u1 a http://x.org/b\nu2 b c\n", "http://x.org/b|:"),
        ("u1 a 3\nu2 a 4\nu1 b 5\n", "line 3: user 'u1' has a line already; a table.*--columns"),
    ],
)
def test_what_may_be_a_table_is_no_list_of_words(write, content, why):
    with pytest.raises(UserError, match=why):
        read_log(write(content))


def test_words_are_taken_as_they_are_where_the_format_is_named(write):
    log = read_log(write("u1 a,1 10:30 b\nu2 b a,1\n"), format="lines")
    assert histories(log) == {"u1": ["a,1", "10:30", "b"], "u2": ["b", "a,1"]}


def test_a_table_between_blanks_is_read_by_its_known_names_or_by_positions(write):
    path = write(table("user_id:token item_id:token timestamp:float", lambda u, i, t: (u, i, seconds(t))), " ")
    assert histories(read_log(path)) == RIGHT
    path = write([(u, i, 5, seconds(t)) for u, i, t in ROWS], "  ")
    with pytest.raises(UserError, match="--columns"):
        read_log(path)
    assert histories(read_log(path, "1,2,4")) == RIGHT


@pytest.mark.parametrize("title", ["Sales of 2019", "1:", "1488844", "@relation log"])
def test_a_title_and_the_head_of_a_block_are_named(write, title):
    path = write(title + "\n" + "\n".join(f"{u},{i},{seconds(t)}" for u, i, t in ROWS))
    with pytest.raises(UserError, match=f"line 1: '{title}' stands above rows such as '7,31,.*': delete a title"):
        read_log(path)


@pytest.mark.parametrize("delimiter", [",", "\t", " "])
def test_row_names_without_a_name_and_lines_that_are_no_rows_are_refused(write, delimiter):
    rows = table("user_id item_id time", lambda u, i, t: (u, i, seconds(t)))
    path = write([rows[0], *((f'"{n}"', *row) for n, row in enumerate(rows[1:], 1))], delimiter)
    with pytest.raises(UserError, match="line 2: 4 fields where the first line has 3: .* row.names=FALSE"):
        read_log(path)
    path = write([*rows, ["6rows"]], delimiter)
    with pytest.raises(UserError, match="line 8: 1 fields where the first line has 3: delete it where it is no row"):
        read_log(path)


def test_a_table_that_is_drawn_with_blanks_is_read(write):
    rows = [("user_id", "item_id", "ts"), ("-------", "-------", "---"), *((u, i, seconds(t)) for u, i, t in ROWS)]
    log = read_log(write("".join(f"{u:<10} {i:>10}  {t:<12}\n" for u, i, t in rows)))
    assert histories(log) == RIGHT and log.read_as.startswith("csv (blank): user_id, item_id, ts;")


# Rule 4: columns by name


COLUMNS = [  # header, what stands in it for user, item and time
    ("userId movieId rating timestamp", "{u} {i} 4.5 {t}"),
    ("order_id customer customer_id product product_id quantity created_at", "1 Ann {u} Soap {i} 2 {t}"),
    ("reviewerID asin reviewerName overall unixReviewTime", "{u} {i} Ann 5 {t}"),
    ("rating title text asin parent_asin user_id timestamp", "5 x y z {i} {u} {t}"),
    ("event_time event_type product_id category_id user_id user_session", "{t} view {i} 5 {u} s"),
    ("timestamp visitorid event itemid transactionid", "{t} {u} view {i} 9"),
    ("t_dat customer_id article_id price", "{t} {u} {i} 0.5"),
    ("session_id item_id timeframe eventdate", "{u} {i} {t} 2019-09-25"),
    ("InvoiceNo StockCode InvoiceDate CustomerID", "5 {i} {t} {u}"),
    ("msno song_id source ts", "{u} {i} x {t}"),
    ("UserID GameID PlayerCount played_at", "{u} {i} 5 {t}"),
    ("userid artistid artname traid traname timestamp", "{u} {i} Nina 5 Song {t}"),
    ("household_key product_id basket_id event_timestamp", "{u} {i} 5 {t}"),
    ("uid iid ts", "{u} {i} {t}"),
    ("User-ID ISBN Book-Rating Date", "{u} {i} 5 {t}"),
    ("userID artistID tagID timestamp", "{u} {i} 5 {t}"),
    ("review_id user_id business_id stars date", "5 {u} {i} 4 {t}"),
    ("venueId userId utcTimestamp", "{i} {u} {t}"),
    ("Customer_Number SKU purchase_date", "{u} {i} {t}"),
    ("account_no track_id listenedAt", "{u} {i} {t}"),
    ("user_id video_id date hourmin time_ms", "{u} {i} 20190925 0815 {t}000"),
    ("Lineitem-sku Customer-ID Paid-at", "{i} {u} {t}"),
    ("event_date event_timestamp user_pseudo_id item_id", "20190925 {t}000000 {u} {i}"),
    ("user_id session_id session_start click_article_id click_timestamp", "{u} s 1506825423 {i} {t}000"),
    ("TRANSACTION_DT CUSTOMER_ID PRODUCT_SUBCLASS PRODUCT_ID", "{iso} {u} 5 {i}"),
    ("USER_ID ITEM_ID EVENT_TS", "{u} {i} {iso}"),
    ("user_id item_id dt", "{u} {i} {iso}"),
]


@pytest.mark.parametrize("header, row", COLUMNS, ids=[header for header, _ in COLUMNS])
def test_the_names_that_public_logs_use_are_known_and_the_right_ones_are_taken(write, header, row):
    rows = table(header, lambda u, i, t: row.format(u=u, i=i, t=seconds(t), iso=t.isoformat()).split())
    log = read_log(write(rows, "\t"))
    assert histories(log) == RIGHT and log.dated


@pytest.mark.parametrize(
    "header, row, right",
    [
        ("user item date time", lambda u, i, t: (u, i, f"{t:%Y-%m-%d}", f"{t:%H:%M}"), True),
        ("user item time date", lambda u, i, t: (u, i, f"{t:%I:%M:%S %p}", f"{t:%d.%m.%Y}"), True),
        ("user item day time", lambda u, i, t: (u, i, f"{t:%Y%m%d}", f"{t:%H%M}"), None),
        ("user item date time", lambda u, i, t: (u, i, f"{t:%Y-%m-%d}", f"{t:%H%M}"), None),
        ("user item time", lambda u, i, t: (u, i, f"{t:%H:%M}"), False),
        ("user item sold_at shipped_at", lambda u, i, t: (u, i, seconds(t), seconds(t)), False),
        ("user item zeitpunkt", lambda u, i, t: (u, i, f"{t:%Y-%m-%d %H:%M}"), False),
    ],
)
def test_a_day_and_a_time_of_day_are_joined_and_a_time_that_is_not_clear_is_refused(write, header, row, right):
    path = write(table(header, row), "\t")
    if right:
        assert histories(read_log(path)) == RIGHT
        return
    names = header.split()
    with pytest.raises(UserError, match=f"({names[-1]}|{names[-2]}).*--columns"):
        read_log(path)
    if right is None:
        assert histories(read_log(path, names)) == RIGHT


def test_a_day_and_milliseconds_since_it_began_are_joined_aloud(write):
    def row(user, item, when):
        return user, item, f"{when:%Y-%m-%d}", (when.hour * 3600 + when.minute * 60 + when.second) * 1000

    rows = table("user item day since", row)
    log = read_log(write(rows), "user,item,day,since")
    assert histories(log) == RIGHT and sorted(log.times // 10**9) == sorted(seconds(t) for _, _, t in ROWS)
    assert "since is taken as milliseconds after day" in log.remarks
    rows[2] = (*rows[2][:2], "May", 5)
    with pytest.raises(UserError, match="line 3: timestamp 'May .*' is not"):
        read_log(write(rows), "user,item,day,since")


def test_columns_of_times_that_are_not_taken_are_named(write):
    path = write(table("user item created_at updated_at", lambda u, i, t: (u, i, seconds(t), seconds(t) + 5)))
    log = read_log(path)
    assert "not taken, though it looks like times: updated_at" in log.remarks
    log = read_log(path, "user,item")
    assert "not taken, though it looks like times: created_at, updated_at" in log.remarks
    assert any("the file's order counts" in remark for remark in log.remarks)
    path = write(table("user item created updated", lambda u, i, t: (u, i, seconds(t), seconds(t) + 5)))
    with pytest.raises(UserError, match="created, updated looks like times, under no known name"):
        read_log(path)


@pytest.mark.parametrize(
    "columns, message",
    [
        ("user,itm,time", "no columns itm among 'user, item, time'; did you mean 'item'"),
        ("user,item,9", "no columns 9 among"),
        ("user,0", "no columns 0 among"),
        ("user", "2 to 4 different names"),
        ("user,user", "2 to 4 different names"),
    ],
)
def test_columns_that_are_not_there_are_refused_with_those_that_are(write, columns, message):
    path = write(table("user item time", lambda u, i, t: (u, i, seconds(t))))
    with pytest.raises(UserError, match=message):
        read_log(path, columns)
    assert histories(read_log(path, "1, item, time")) == histories(read_log(path, ["user", "item", "3"])) == RIGHT


def test_lists_of_items_are_no_log_of_interactions(write):
    for name in ("item_id_list:token_seq", "product_list", "itemList"):
        with pytest.raises(UserError, match="list.*holds lists of items"):
            read_log(write(table(f"session_id {name} item_id", lambda u, i, t: (u, "30 31", i)), "\t"))


# Rule 5: rows without a user, an item or a time


@pytest.mark.parametrize(
    "nothing", ["", " ", "-", "(not set)", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "\\N", "<NA>"]
)
@pytest.mark.parametrize("place, column", [(0, "user"), (1, "item"), (2, "time")])
def test_rows_without_a_value_are_left_out_aloud(write, nothing, place, column):
    rows = table("user item time", lambda u, i, t: (u, i, seconds(t)))
    rows.insert(3, [*rows[1][:place], nothing, *rows[1][place + 1 :]])
    log = read_log(write(rows, ";"))
    assert histories(log) == RIGHT and " 7 rows," in log.read_as
    (remark,) = log.remarks
    assert remark.startswith(f"1 of 7 rows (14.3%) have no {column}: left out; the first: line 4 (")
    rows[2:] = [[*row[:place], nothing, *row[place + 1 :]] for row in rows[2:]]
    with pytest.raises(UserError, match=f"6 of 7 rows have no {column}; name another|no interactions in 7 rows"):
        read_log(write(rows, ";"))


def test_a_second_file_that_was_joined_to_a_log_is_no_user(write):
    rows = "user,item\n" + "".join(f"{u},{i}\n" for u, i, _ in ROWS)
    for mark, why in (("", "the header again: were two files joined"), ("\ufeff", "user id '.ufeffuser' has a line")):
        with pytest.raises(UserError, match=f"line 8: {why}"):
            read_log(write(rows + mark + rows))


def test_minus_one_is_nobody_where_all_others_are_positive(write):
    rows = [("user", "item"), (-1, 5), (1, 6), (1, -1), (1, 7), (2, 6), (1, 8), (2, -1)]
    log = read_log(write(rows))
    assert histories(log) == {"1": ["6", "7", "8"], "2": ["6"]} and log.items == ["6", "7", "8"]
    assert [r for r in log.remarks if "-1" in r] == [
        "1 of 7 rows (14.3%) have no user but -1: left out",
        "2 of 7 rows (28.6%) have no item but -1: left out",
    ]
    rows[1] = (-7, 5)
    assert "-7" in read_log(write(rows)).users


def test_a_user_without_items_in_a_list_of_words_is_left_out_aloud(write):
    log = read_log(write("7 a b c\n999\n8 c d\n"))
    assert histories(log) == {"7": ["a", "b", "c"], "8": ["c", "d"]}
    assert log.remarks == ["1 of 6 rows (16.7%) have no item: left out; the first: line 2 (999, )"]


# Rule 6: times


WAYS = {
    "seconds": lambda t: seconds(t),
    "seconds with decimals": lambda t: f"{seconds(t)}.0",
    "milliseconds": lambda t: seconds(t) * 1000,
    "microseconds": lambda t: seconds(t) * 10**6,
    "nanoseconds": lambda t: seconds(t) * 10**9,
    "compact": lambda t: f"{t:%Y%m%d%H%M%S}",
    "ISO": lambda t: t.isoformat(),
    "ISO, T and Z": lambda t: f"{t:%Y-%m-%dT%H:%M:%SZ}",
    "ISO, no colon in the zone": lambda t: f"{t:%Y-%m-%d %H:%M:%S}+0000",
    "ISO, basic": lambda t: f"{t:%Y%m%dT%H%M%S}",
    "seven decimals": lambda t: f"{t:%Y-%m-%dT%H:%M:%S}.0000000Z",
    "nine decimals": lambda t: f"{t:%Y-%m-%d %H:%M:%S}.000000000",
    "UTC": lambda t: f"{t:%Y-%m-%d %H:%M:%S} UTC",
    "another zone": lambda t: t.astimezone(timezone(timedelta(hours=-5))).isoformat(),
    "slashes, year first": lambda t: f"{t:%Y/%m/%d %H:%M:%S}",
    "D.M.Y": lambda t: f"{t:%d.%m.%Y %H:%M:%S}",
    "D.M.y": lambda t: f"{t:%d.%m.%y %H:%M:%S}",
    "D/M/Y": lambda t: f"{t:%d/%m/%Y %H:%M:%S}",
    "D-M-Y": lambda t: f"{t:%d-%m-%Y %H:%M:%S}",
    "M/D/Y": lambda t: f"{t.month}/{t.day}/{t.year} {t.hour}:{t:%M:%S}",
    "M/D/Y, AM and PM": lambda t: f"{t:%m/%d/%Y %I:%M:%S %p}",
    "names of months": lambda t: f"{t:%d %b %Y, %H:%M:%S}",
    "long names of months": lambda t: f"{t:%B %d, %Y %H:%M:%S}",
    "ctime": lambda t: f"{t:%a %b %d %H:%M:%S +0000 %Y}",
    "HTTP": lambda t: f"{t:%a, %d %b %Y %H:%M:%S GMT}",
    "a web server's": lambda t: f"{t:%d/%b/%Y:%H:%M:%S} +0000",
    "SAS": lambda t: f"{t:%d%b%Y:%H:%M:%S}".upper(),
    "Stata": lambda t: f"{t:%d%b%Y %H:%M:%S}".lower(),
    "Java": lambda t: f"{t.isoformat()}[Etc/UTC]",
    "a number with an exponent": lambda t: f"{seconds(t):.9e}",
}


@pytest.mark.parametrize("way", WAYS)
def test_times_are_read_as_they_are_written_to_the_second(write, way):
    log = read_log(write(table("user item time", lambda u, i, t: (u, i, WAYS[way](t))), "\t"))
    assert histories(log) == RIGHT and log.dated and log.times.dtype == np.int64
    assert sorted(log.times // 10**9) == sorted(seconds(t) for _, _, t in ROWS)
    assert kind_of_times([str(WAYS[way](t)) for _, _, t in ROWS]) == "moment"


HEADS = ("user item time", "userId movieId timestamp", "USER_ID PRODUCT_ID EVENT_TS", "CustomerNo sku created_at")


@given(
    *(st.sampled_from(list(choices)) for choices in (HEADS, WAYS, HEADERS, permutations(range(4)))),
    *(st.sampled_from(choices) for choices in (("", "\ufeff"), ("\n", "\r\n", "\r"), ("", "# a\n", "\n", " \n"))),
)
def test_a_log_is_the_same_in_every_dialect(tmp_path_factory, head, way, delimiter, order, mark, end, before):
    text = io.StringIO(newline="")
    rows = [(*head.split(), "note"), *((u, i, str(WAYS[way](t)), "x"[: int(u) - 7]) for u, i, t in ROWS)]
    rows = [[row[place] for place in order] for row in rows]
    if delimiter == "::":
        text.writelines("::".join(row) + "\n" for row in rows)
    else:
        csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows(rows)
    path = tmp_path_factory.mktemp("dialect") / "log"
    path.write_bytes((mark + before + text.getvalue()).replace("\n", end).encode())
    log = read_log(path)
    assert histories(log) == RIGHT and log.dated
    assert sorted(log.times // 10**9) == sorted(seconds(t) for _, _, t in ROWS)


@given(st.lists(st.datetimes(datetime(1700, 1, 1), datetime(2200, 1, 1)), min_size=1, max_size=5))
def test_iso_times_are_kept_to_the_nanosecond(moments):
    column = Times()
    assert column.add([f"{moment.isoformat(timespec='microseconds')}789" for moment in moments]) is None
    times, dated = column.result()
    since = [moment - datetime(1970, 1, 1) for moment in moments]
    assert dated and times.tolist() == [
        (t.days * 86400 + t.seconds) * 10**9 + t.microseconds * 1000 + 789 for t in since
    ]


def test_times_in_zones_are_ordered_by_the_moment_that_they_mean(write):
    times = ["10:00:00+02:00", "08:30:00+01:00", "08:01:00", "08:00:00Z"]
    path = write(
        [("user", "item", "time"), *zip("uuuv", "baca", (f"2019-03-25T{time}" for time in times), strict=True)]
    )
    assert histories(read_log(path))["u"] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "days, pattern", [("{d:02}/{m:02}/2019", "%d/%m/%Y"), ("{m}-{d}-2019 {d}:30", "%m-%d-%Y %H:%M")]
)
def test_the_whole_column_tells_days_from_months_or_it_is_refused_with_a_pattern_that_settles_it(write, days, pattern):
    rows = [("user", "item", "time")] + [(f"u{n % 2}", n, days.format(d=n % 12 + 1, m=n % 11 + 1)) for n in range(400)]
    path = write(rows)
    with pytest.raises(UserError, match=f"two ways.*--time-format .*'{pattern}'"):
        read_log(path)
    asked, clear = read_log(path, time_format=pattern), read_log(write([*rows, ("u1", "z", days.format(d=22, m=3))]))
    assert asked.dated and moments(asked).items() <= moments(clear).items()  # the last of 401 rows tells


def moments(log):
    users = np.repeat(log.users, np.diff(log.offsets))
    return dict(zip(zip(users, np.array(log.items)[log.sequence], strict=True), log.times, strict=True))


@pytest.mark.parametrize(
    "times, why",
    [
        (["1569411221818", "1569417419"], "mixes seconds, such as 1569417419, and milliseconds|mixes"),
        (["1569411221", "2019-10-03"], "line 3: timestamp '2019-10-03' is not written as '1569411221' before it"),
        (["2019-10-03", "20191004"], "line 3: timestamp '20191004'"),
        (["2019-25-03", "2019-22-04"], "line 2: timestamp '2019-25-03' is not a number or a date"),
        (["25.03", "22.04"], "look like a day and a month without a year"),
        (["31122019", "1012020"], "'31122019' look like day, month, year: write YYYYMMDD"),
        (["2019-10-03", "0001-01-01"], "line 3: timestamp '0001-01-01'"),
        (
            ["1569411221", "1.57E+09"],
            "line 3: timestamp '1.57E\\+09' is rounded, as spreadsheets do; export it in full",
        ),
        (["yesterday", "today"], "line 2: timestamp 'yesterday' is not a number or a date; --time-format"),
    ],
)
def test_times_that_make_no_column_are_refused(write, times, why):
    with pytest.raises(UserError, match=why):
        read_log(write([("user", "item", "time"), *(("u", n, time) for n, time in enumerate(times))]))


def test_numbers_that_are_no_dates_stay_numbers_aloud(write):
    log = read_log(write("user,item,timestamp\nu,a,2\nu,b,1.5\nu,c,3\nv,a,1\n"))
    assert histories(log)["u"] == ["b", "a", "c"] and not log.dated and log.times.tolist() == [1.5, 2, 3, 1]
    assert log.remarks == ["timestamp, 1.0 to 3.0, holds numbers and no dates: they only order"]


# Rules 7 and 8: ids, and what is remarked on


def test_ids_are_text_as_written_without_the_blanks_around_them(write):
    log = read_log(write("user, item, time\n 007, a b , 1\n 7 ,a b, 2\n007, 1.0, 3\n007 , 1,4\n"))
    assert histories(log) == {"007": ["a b", "1.0", "1"], "7": ["a b"]}
    assert "item holds both '1' and '1.0', which count as two" in log.remarks
    log = read_log(write("user,item,time\n1.2346E+11,a,1\n1.2346E+11,b,2\n1.2346E+11,c,3\n2,a,1\n"))
    assert "user holds '1.2346E+11', rounded, as spreadsheets do: several may have become one" in log.remarks


@pytest.mark.parametrize("step, word", [(1, "ascend"), (-1, "descend")])
@pytest.mark.parametrize("prefix", ["", "i"])
def test_a_sorting_of_the_file_is_remarked_on_and_shuffled_on_request(write, step, word, prefix):
    rows = [("user", "item", "time")]
    rows += [(u, f"{prefix}{10 + n}", 1_500_000_000 + n // 10) for u in range(5) for n in range(40)[::step]]
    path = write(rows)
    ties, sorting = read_log(path).remarks
    assert ties == "ties: 180 of 195 neighbouring interactions (92.3%) share a time; they keep the file's order"
    assert sorting.startswith(f"at equal times the items {word} in 180 of 180 cases") and "--ties shuffle" in sorting
    shuffled, again = read_log(path, ties="shuffle"), read_log(path, ties="shuffle")
    assert shuffled.remarks == [ties.replace("they keep the file's order", "shuffled")]
    assert shuffled.sequence.tolist() == again.sequence.tolist() != read_log(path).sequence.tolist()
    assert shuffled.times.tolist() == read_log(path).times.tolist()
    assert {u: sorted(items) for u, items in histories(shuffled).items()} == {
        u: sorted(items) for u, items in histories(read_log(path)).items()
    }


def test_rows_that_stand_twice_are_counted(write):
    rows = table("user item time", lambda u, i, t: (u, i, seconds(t)))
    log = read_log(write([*rows, rows[1], rows[4], rows[1]]))
    assert "3 of 9 rows stand there again: the same user, item and time" in log.remarks
    with pytest.raises(UserError, match="no times, so no ties to shuffle"):
        read_log(write(table("user item", lambda u, i, t: (u, i))), ties="shuffle")


# Rule 9: dialect


@pytest.mark.parametrize(
    "content",
    [
        "sep=;\nuser;item;time\n7;a;2\n7;b;1\n8;a;1\n7;c;3\n",
        '"sep=;"\r\nuser;item;time\r\n7;a;2\r\n7;b;1\r\n8;a;1\r\n7;c;3\r\n',
        "# exported 2019-12-31\n% by hand\n\nuser,item,time\n7,a,2\n7,b,1\n8,a,1\n7,c,3\n",
        "user, item, time\n7, a, 2\n7, b, 1\n8, a, 1\n7, c, 3\n",
        '"user","item","time"\n"7","a","2"\n"7","b","1"\n"8","a","1"\n"7","c","3"\n',
        "\ufeffuser;item;time;\n7;a;2;\n7;b;1;\n8;a;1;\n7;c;3;\n",
        'user\tnote\titem\ttime\n7\t5" disk\ta\t2\n7\t"so ""said"" "\tb\t1\n8\t"\ta\t1\n7\tit"s\tc\t3\n',
        'user,note,item,time\n7,"a, b",a,2\n7,"two\nlines",b,1\n8,"say ""hi""",a,1\n7,,c,3\n',
        "user,item,time\n7,a,2\n,,\n7,b,1\n8,a,1\n7,c,3\n,,\n",
        " user | item | time \n------+------+------\n 7    | a    |    2\n 7    | b    |    1\n 8    | a    |    1\n"
        " 7    | c    |    3\n\n",
        "+------+------+------+\n| user | item | time |\n+------+------+------+\n| 7    | a    |    2 |\n"
        "| 7    | b    |    1 |\n| 8    | a    |    1 |\n| 7    | c    |    3 |\n+------+------+------+\n",
        "| user | item | time |\n|:-----|-----:|-----:|\n| 7 | a | 2 |\n| 7 | b | 1 |\n| 8 | a | 1 |\n| 7 | c | 3 |\n",
    ],
)
def test_the_dialects_of_tables_are_read(write, content):
    log = read_log(write(content))
    assert histories(log) == {"7": ["b", "a", "c"], "8": ["a"]}
    assert any("2 comment lines" in remark for remark in log.remarks) == content.startswith("#")


def test_what_is_no_utf8_or_a_control_character_does_no_harm_where_no_id_is_read(write):
    path = write(table("user item note time", lambda u, i, t: (u, i, "caf\xe9 \x85", seconds(t))), "\t")
    path.write_bytes(path.read_text(encoding="utf-8").replace("\x85", "").encode("latin-1"))
    assert histories(read_log(path)) == RIGHT
    path.write_bytes(path.read_bytes().replace(b"note", b"n\xf6te"))
    assert "(not used: n\\xf6te)" in read_log(path).read_as
    long = "".join(f"u,i{n},caf\xe9 \x01,{n}\n" for n in range(read.SAMPLE, read.SAMPLE + 9)).encode("latin-1")
    rows = "".join(f"{'uv'[n % 2]},i{n},x,{n}\n" for n in range(read.SAMPLE))
    assert len(read_log(write(f"user,item,note,time\n{rows}".encode() + long)).items) == read.SAMPLE + 9
    for bad in ("caf\xe9", "a\x01b", "a\x85b"):
        with pytest.raises(UserError, match=f"line {read.SAMPLE + 2}: item id .* (UTF-8|control character) in it"):
            read_log(write(f"user,item,note,time\n{rows}u,{bad},x,5\n".encode("latin-1")))


@pytest.mark.parametrize("dump", [json.dumps, repr, lambda row: repr(row).replace("'", "u'", 1)])
def test_lines_of_json_and_of_python_literals_are_read_and_nothing_is_evaluated(write, dump):
    def record(user, item, when):
        about = {"name": 'O\'Neil "x"', "helpful": [0, 1], "nested": {"a": None}, "verified": True}
        return about | {"username": user, "product_id": int(item), "date": f"{when:%Y-%m-%d %H:%M:%S}"}

    rows = [record(*fields) for fields in ROWS]
    log = read_log(write("\n".join(map(dump, rows))))
    assert histories(log) == RIGHT and "not used: name, nested.a, verified" in log.read_as
    for bad in ("[1]", '{"username": ', "{'username': print(1)}", "{'username'}", "7"):
        with pytest.raises(UserError, match="line 3: not one JSON object"):
            read_log(write("\n".join([*map(dump, rows[:2]), bad])))


@pytest.mark.parametrize("dump", [json.dumps, partial(json.dumps, ensure_ascii=False), repr])
def test_an_id_with_a_rare_blank_or_a_joined_emoji_is_the_same_in_json_and_in_a_table(write, dump):
    ids = ["wide\u3000blank", "no\u00a0break", "\U0001f469\u200d\U0001f4bb", "back\\slash"]
    rows = [{"user_id": f"u{n % 2}", "item_id": name} for n, name in enumerate(ids * 2)]
    assert read_log(write([row.values() for row in [dict(user_id="user_id", item_id="item_id"), *rows]])).items == ids
    assert read_log(write("\n".join(map(dump, rows)))).items == ids


@pytest.mark.parametrize("dump", [json.dumps, repr])
@pytest.mark.parametrize("events, item, when", [("events", "aid", "ts"), ("items", "item_id", "at")])
def test_objects_within_objects_and_lists_of_them_are_read(write, dump, events, item, when):
    nested = [{"user": {"id": u}, "product": {"id": i, "tags": []}, "created_at": str(t)} for u, i, t in ROWS]
    log = read_log(write("\n".join(map(dump, nested))))
    assert histories(log) == RIGHT and ": user.id, product.id, created_at;" in log.read_as
    path = write("\n".join(dump({"event": row}) for row in nested))
    with pytest.raises(UserError, match="header 'event.user.id, event.product.id, event.created_at'"):
        read_log(path)
    assert histories(read_log(path, "event.user.id,event.product.id,event.created_at")) == RIGHT
    mongo = [
        {"user_id": {"$oid": u}, "item_id": i, "ts": {"$date": {"$numberLong": f"{seconds(t)}000"}}} for u, i, t in ROWS
    ]
    assert histories(read_log(write("\n".join(map(dump, mongo))))) == RIGHT
    sessions = [
        {
            "session": u,
            events: [{"kind": "x", when: 1e9 - n, item: i} for n, i in enumerate(items[::-1])],
            "tags": ["t"],
        }
        for u, items in RIGHT.items()
    ]
    path = write("\n".join(map(dump, [{"session": "0", events: []}, *sessions, {"session": "1", events: []}])))
    assert histories(read_log(path, ["session", item, when])) == histories(read_log(path)) == RIGHT


def test_a_list_of_objects_that_an_event_is_about_is_taken_by_name_alone(write):
    rows = [{"userId": u, "id": i, "time": seconds(t), "about": [{"item": "x"}, {"item": "y"}]} for u, i, t in ROWS]
    path = write("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="header 'userId, id, time, about.item'"):
        read_log(path)
    assert histories(read_log(path, "userId,id,time")) == RIGHT
    assert histories(read_log(path, "userId,about.item,time"))["9"] == ["x", "y"]


@pytest.mark.parametrize(
    "record, columns, why",
    [
        ({"user": 1, "item": [1, 2]}, None, "no user and item columns are known in the header 'user'"),
        ({"user": 1, "a": [{"item": 1}], "b": [{"item": 2}]}, None, "in the header 'user'"),
        ({"user": 1, "events": [{"item": 1}, 2]}, None, "line 1: not one JSON object"),
    ],
)
def test_lists_that_are_not_clearly_rows_are_refused(write, record, columns, why):
    with pytest.raises(UserError, match=why):
        read_log(write(json.dumps(record) + "\n"), columns)
    rows = [{"who": u, "what": i, "tags": [{"a": 1}, {"a": 2}]} for u, i, _ in ROWS]
    path = write("\n".join(map(json.dumps, rows)))
    assert len(read_log(path, "who,what").sequence) == len(ROWS)  # not a row for each tag
    path = write("\n".join(map(json.dumps, [*rows * 50, {"who": "7", "what": [30, 31]}])))
    with pytest.raises(UserError, match="line 301: a list in who, what; give a log of one interaction a row"):
        read_log(path, "who,what")


def test_a_zip_archive_of_one_file_is_read(write):
    content, archive = "user,item,time\n7,a,2\n7,b,1\n8,a,1\n7,c,3\n", io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("folder/", "")
        file.writestr("folder/log.csv", content)
        file.writestr("__MACOSX/folder/._log.csv", "x")
    assert histories(read_log(write(archive.getvalue()))) == {"7": ["b", "a", "c"], "8": ["a"]}
    with pytest.raises(UserError, match="damaged gzip or zip file"):
        read_log(write(archive.getvalue()[:-30]))


def test_parquet_is_read_where_pandas_is_installed_and_named_where_it_is_not(tmp_path, monkeypatch):
    path = tmp_path / "log.parquet"
    path.write_bytes(b"PAR1" + bytes(20))
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match=r"needs pandas and pyarrow: pip install pandas pyarrow"):
        read_log(path)
    monkeypatch.undo()
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        read_log(path)
    frame = pandas.DataFrame(ROWS, columns=["user_id", "item_id", "time"])
    frame["item_id"] = frame["item_id"].astype(float)  # as pandas keeps numbers beside missing ones
    frame.to_parquet(path)
    log = read_log(path)
    assert histories(log) == RIGHT and log.read_as.startswith("Parquet: user_id, item_id, time; 6 rows, 2019-09-25 08:")
    assert histories(read_log(path, "1,2,3")) == RIGHT


# Columns from Python


def test_columns_become_the_log_that_their_file_would_be():
    users, items, moments = zip(*ROWS, strict=True)
    stamps = [moment.replace(tzinfo=None) for moment in moments]
    for times in (moments, [m.isoformat() for m in moments], np.array(stamps, "M8[s]"), [seconds(m) for m in moments]):
        assert histories(Log.from_columns(users, np.array(items, float), times)) == RIGHT
    log = Log.from_columns([1, 1, None, 2, 1], ["a", "b", "c", "a", "c"])
    assert histories(log) == {"1": ["a", "b", "c"], "2": ["a"]} and log.times is None
    assert log.remarks == ["1 of 5 rows (20.0%) have no users: left out; the first: row 3 (, c)"]
    with pytest.raises(UserError, match="columns of 2, 1 rows: they must agree"):
        Log.from_columns([1, 2], ["a"])
    with pytest.raises(UserError, match="columns, row 2: timestamp 'noon'"):
        Log.from_columns([1, 2], ["a", "b"], ["2019-10-03", "noon"])


@pytest.mark.parametrize("number", [int, float, np.float16, np.float32, np.float64, np.uint8])
def test_an_id_that_is_a_whole_number_has_no_decimal_point_whatever_type_a_list_holds_it_in(number):
    log = Log.from_columns([number(7)] * 3 + [number(8)], list(map(number, [1, 2, 1, 3])))
    assert (log.users, log.items) == (["7", "8"], ["1", "2", "3"])


# The small things that a reader's size depends on


def test_what_comes_behind_the_sample_is_checked_too(write):
    pairs = [(f"u{n % 50}", f"i{n}") for n in range(read.SAMPLE + 20)]
    with pytest.raises(UserError, match=f"line {read.SAMPLE + 21}: 3 fields where the first line has 2"):
        read_log(write([*pairs, ("u1", "i2", "i3")], " "))
    rows = [("user", "item", "time"), *((u, i, 5) for u, i in pairs)]
    with pytest.raises(UserError, match=f"line {len(rows) + 1}: timestamp 'x' is not written as '5' before it"):
        read_log(write([*rows, ("u1", "i1", "x")]))
