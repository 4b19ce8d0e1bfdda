"""Times as people write them, read as int64 nanoseconds since 1970, in UTC where they name no zone.

A column is read in every way that its texts allow, all at once. A way is dropped at the first text that it cannot
read, so the whole column decides whether 03/04/2019 is in March or in April; where two ways are left, it is refused.
"""

import contextlib
import re
from datetime import UTC, datetime, timedelta

import numpy as np

from minirec.errors import UserError

SECOND = 10**9  # nanoseconds
UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}  # in a second
EARLIEST, LATEST = 1e8, 1e11  # seconds since 1970, March 1973 and the year 5138: what a number may mean
RECENT, SOON = 7.5e8, 2.1e9  # 1993 and 2036: what a column of numbers holds that is a time without being called one
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()
WEEKDAY, YEAR, YY = r"([A-Za-z]{3,9},? )?", r"(?P<y>\d{4})", r"(?P<y>\d{4}|\d\d)"
MONTH, DAY = r"(?P<m>\d{1,2}|[A-Za-z]{3,9})\.?", r"(?P<d>\d{1,2})"
CLOCK = r"(?P<H>[01]?\d|2[0-3]):(?P<M>[0-5]\d)(:(?P<S>[0-5]\d)([.,](?P<f>\d+))?)?( ?(?P<p>[AaPp])\.?[Mm]\.?)?"
ZONE = r" ?((?P<z>Z|UTC|GMT|[+-]\d\d(:?\d\d)?)(\[[\w/+-]+\])?)?"
REST = rf"((T|,? +|:){CLOCK}{ZONE})?"
PATTERNS = {  # besides numbers; a name tells the order in which the numbers of a text come, as strptime has it
    "YmdHMS": r"(?P<y>(19|20)\d\d)(?P<m>\d\d)(?P<d>\d\d)((?P<H>\d\d)(?P<M>\d\d)(?P<S>\d\d)?)?",
    "Ymd": rf"{YEAR}(?P<s>[-/.]){MONTH}(?P=s){DAY}{REST}",
    "ymd": rf"(?P<y>\d\d)(?P<s>[-/])(?P<m>\d\d)(?P=s){DAY}{REST}",
    "dmY": rf"{WEEKDAY}{DAY}(?P<s>[-/. ]){MONTH},?(?P=s){YY}{REST}",
    "mdY": rf"{WEEKDAY}{MONTH}(?P<s>[-/ ]){DAY},?(?P=s){YY}{REST}",
    "dbY": rf"{DAY}(?P<m>[A-Za-z]{{3}}){YY}{REST}",  # as SAS and Stata write it
    "mdHMSY": rf"{WEEKDAY}{MONTH} +{DAY} {CLOCK}{ZONE} {YEAR}",
    "dm": rf"{DAY}\.(?P<m>\d\d?)",
    "md": rf"(?P<m>\d\d?)\.{DAY}",
}
LOST = ("dm", "md")  # their year is, by a spreadsheet: refused
DEFAULTS = {"y": "2000", "H": "0", "M": "00", "S": "00", "f": "0", "z": ""}  # of what a pattern finds
ROUNDED = re.compile(r"[1-9](\.\d{0,7})?[eE]\+?(09|9|1\d)")  # to too few digits for a moment, or an id
MORE_DIGITS = re.compile(r"[.,]\d{7}")  # than Python reads
CLOCK_ALONE = re.compile(CLOCK)


class Times:
    """The times of a column, added a chunk of texts at a time."""

    def __init__(self, pattern=None):
        """pattern: that of datetime.strptime, None = recognise it."""
        self.parts = {way: [] for way in ([pattern] if pattern else ["number", *PATTERNS])}  # of each way, arrays
        self.first = None

    def add(self, texts):
        """Add texts; return None, or where one cannot be read its place among them and what is wrong."""
        self.first, read = self.first or texts[0], {}
        for way in self.parts:
            with contextlib.suppress(ValueError, OverflowError):
                read[way] = _read(texts, way)
        if read:
            self.parts = {way: [*self.parts[way], times] for way, times in read.items()}
            return None
        if len(texts) > 1:
            return next((place, wrong[1]) for place, text in enumerate(texts) if (wrong := self.add([text])))
        like = "a number or a date" if texts[0] == self.first else f"written as {self.first[:60]!r} before it"
        if ROUNDED.fullmatch(texts[0]):
            return 0, f"timestamp {texts[0]!r} is rounded, as spreadsheets do; export it in full"
        return 0, f"timestamp {texts[0][:60]!r} is not {like}; --time-format tells how times are written"

    def result(self):
        """Return the times [n] and whether they are int64 nanoseconds since 1970, not numbers that only order.

        Raises UserError where the column may be read in two ways, or holds times in two units.
        """
        times = {way: np.concatenate(parts) for way, parts in self.parts.items()}
        name, chosen = times.popitem()
        if self.first and name in LOST:
            raise UserError(f"timestamps such as {self.first!r} look like a day and a month without a year")
        if name == "number":
            if ((10**6 <= chosen) & (chosen < 32 * 10**6) & (abs(chosen % 10**4 - 2000) < 100)).all():
                raise UserError(f"timestamps such as {self.first!r} look like day, month, year: write YYYYMMDD")
            return _dated(chosen)
        for other, values in times.items():
            if other != "number" and (values != chosen).any():
                raise UserError(
                    f"timestamps such as {self.first[:60]!r} may be read in two ways, and no row tells which: "
                    f"--time-format '{_pattern(other, self.first)}' or '{_pattern(name, self.first)}'"
                )
        return chosen, True


def kind_of_times(texts):
    """Return what texts are as times: "moment", "day", "clock" (a time of day), "number", or None."""
    column = Times()
    if texts and all(map(CLOCK_ALONE.fullmatch, texts)):
        return "clock"
    if not texts or column.add(texts):
        return None
    name, parts = column.parts.popitem()
    if name not in ("number", *LOST):
        return "moment" if (parts[0] % (86400 * SECOND)).any() else "day"
    recent = [((RECENT * n <= parts[0]) & (parts[0] < SOON * n)).all() for n in UNITS.values()]
    return "moment" if name == "number" and any(recent) else "number"


def day_joined_with(clocks):
    """Return what makes one text of a day and a time of day, and whether times of day are milliseconds.

    clocks: a sample of the times of day: 9:42, 0942 or 94200, else milliseconds since the day began, or later.
    """

    def with_colons(clock):
        return re.sub(r"(\d\d)(?=\d)", r"\1:", clock.zfill(4 if len(clock) < 5 else 6)) if clock.isdigit() else clock

    if not all(map(str.isdigit, clocks)) or all(CLOCK_ALONE.fullmatch(with_colons(clock)) for clock in clocks):
        return lambda day, clock: f"{day} {with_colons(clock)}", False

    def join(day, clock):
        try:
            return str(datetime.fromisoformat(day) + timedelta(milliseconds=int(clock)))
        except (ValueError, OverflowError):
            return f"{day} {clock}"  # which is no time

    return join, True


def as_text(time, dated):
    """Return a time of a Log as text: nanoseconds since 1970, where it is dated, as a date to the second."""
    return str(np.datetime64(int(time) // SECOND, "s")).replace("T", " ") if dated else str(time)


def _numbers(texts):
    if "_" in "".join(texts):  # which Python allows within a number
        raise ValueError
    with contextlib.suppress(ValueError, OverflowError):
        return np.array([int(text.removesuffix(".0")) for text in texts], np.int64)
    numbers = np.array(list(map(float, texts)))
    if not np.isfinite(numbers).all() or any(map(ROUNDED.fullmatch, texts)):
        raise ValueError
    return numbers


def _read(texts, way):
    """Return texts read as numbers, by one of PATTERNS, or by that of a person, [n]. Raises ValueError."""
    if way == "number":
        return _numbers(texts)
    moments = {text: _moment(text, way) for text in set(texts)}  # equal ones once: many rows share a day
    return np.array([moments[text] for text in texts], np.int64)


def _moment(text, way):
    """Return the nanoseconds since 1970 of a text. Raises ValueError where it is not written so."""
    if way not in PATTERNS:
        return _since_1970(datetime.strptime(text, way))
    if way == "Ymd" and not text.isdigit() and not MORE_DIGITS.search(text):
        with contextlib.suppress(ValueError):
            return _since_1970(datetime.fromisoformat(text))
    if not (match := re.fullmatch(PATTERNS[way], text)):
        raise ValueError
    part = DEFAULTS | {key: value for key, value in match.groupdict().items() if value}
    year, month, hour = int(part["y"]), part["m"], int(part["H"])
    year += (2000 if year < 69 else 1900) if len(part["y"]) == 2 else 0
    month = int(month) if month.isdigit() else MONTHS.index(month[:3].lower()) + 1
    hour = hour % 12 + 12 * (part["p"] in "pP") if "p" in part else hour
    zone = part["z"].replace("UTC", "Z").replace("GMT", "Z")
    iso = f"{year}-{month:02}-{int(part['d']):02}T{hour:02}:{part['M']}:{part['S']}{zone}"
    return _since_1970(datetime.fromisoformat(iso)) + int(part["f"][:9].ljust(9, "0"))


def _since_1970(when):
    since = (when if when.tzinfo else when.replace(tzinfo=UTC)) - EPOCH
    return (since.days * 86400 + since.seconds) * SECOND + since.microseconds * 1000


def _dated(numbers):
    """Return numbers as nanoseconds since 1970 and True where they are dates of our days, else themselves and False."""
    size = np.abs(numbers)
    inside = {unit: (EARLIEST * n <= size) & (size < LATEST * n) for unit, n in UNITS.items()}
    present = [unit for unit, which in inside.items() if which.any()]
    if len(present) > 1:
        shown = " and ".join(f"{unit}, such as {numbers[inside[unit].argmax()]}" for unit in present)
        raise UserError(f"the column of times mixes {shown}; give all in one unit")
    if not present or inside[present[0]].mean() < 0.5:
        return numbers, False
    scale = SECOND // UNITS[present[0]]
    if size.max() * float(scale) >= 9.2e18:  # the year 2261, where int64 ends
        return numbers, False
    whole, part = np.divmod(numbers, 1)
    return whole.astype(np.int64) * scale + np.rint(part * scale).astype(np.int64), True


def _pattern(name, text):
    """Return the strptime pattern that reads a text in one of PATTERNS."""
    codes, hour = iter(name + "HMSf"), "%I" if re.search("[AaPp][Mm]", text) else "%H"

    def code(part):
        letter = "p" if part[0].isalpha() else next(codes)
        return hour if letter == "H" else "%y" if letter == "Y" and len(part[0]) == 2 else "%" + letter

    return re.sub(r"\d+|[AaPp][Mm]", code, text)
