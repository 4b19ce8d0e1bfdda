"""Which columns are user, item and time: as a person says, by their names, or by what stands in them."""

import json
import re
from pathlib import Path

from minirec.data.log import MISSING
from minirec.data.times import kind_of_times
from minirec.errors import UserError, did_you_mean

KNOWN = json.loads(Path(__file__).with_name("known.json").read_text(encoding="utf-8"))
IDS = tuple(KNOWN["ids"].split())
USERS, ITEMS, TIMES = (
    [name.replace("#", end) for name in KNOWN[role].split() for end in (IDS if "#" in name else ("",))]
    for role in ("user", "item", "time")
)
LIKE_TIMES = re.compile(r".*[a-z]At|(?i:(.*[^a-z])?(at|ts|dt)|.*(time|(?<!up)date(?!d)).*)")


def clean_name(field):
    """Return the name of a column without the type that RecBole gives it, as in user_id:token."""
    name = field.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return re.sub(r":\w+$", "", name.strip())


def plain_name(name):
    return re.sub(r"[\W_]", "", clean_name(name).lower())


def shown(text, most=60):
    return repr(text if len(text) <= most else text[:most] + "...")


def known_places(names):
    """Return {"user": place, "item": place} of the first known columns among names, as far as there are."""
    plain, known = list(map(plain_name, names)), {"user": USERS, "item": ITEMS}
    first = {role: next((name for name in words if name in plain), None) for role, words in known.items()}
    return {role: plain.index(name) for role, name in first.items() if name}


def values_of(rows, place):
    """Return what stands in a column of sampled rows, missing values left out."""
    return [text for row in rows if len(row) > place and (text := row[place].strip()) not in MISSING]


def is_header(rows, columns):
    """Whether the first of the sampled rows names columns: those asked for, known ones, or words over numbers."""
    first, below = [field.strip() for field in rows[0]], rows[1:]
    if columns and not columns[0].isdigit() and set(map(clean_name, columns)) <= set(map(clean_name, first)):
        return True
    words = [place for place, field in enumerate(first) if field not in MISSING]
    if any(kind_of_times([first[place]]) for place in words):
        return False
    if any(plain_name(field) in {*USERS, *ITEMS, *TIMES} or re.search(":(token|float)", field) for field in first):
        return True
    return any(all(kind_of_times([text]) for text in over) for place in words if (over := values_of(below, place)))


def _refuse(reason, *columns):
    raise UserError(f"{reason}; say which are user, item and time, as in --columns {','.join(map(str, columns))}")


def choose(table, columns):
    """Return the places of user, item, time and, where it stands apart, time of day; and remarks on the others."""
    names, plain, known = table.names, list(map(plain_name, table.names)), known_places(table.names)
    kinds = [kind_of_times(values_of(table.sample, place)) for place in range(len(names))]
    times = [p for p, kind in enumerate(kinds) if kind in ("moment", "day") and not plain[p].endswith(IDS)]
    if columns:
        places = _asked(table, columns)
    elif not table.header:
        fields = " ".join(f"{n}={shown(field.strip(), 30)}" for n, field in enumerate(table.sample[0][:12], 1))
        first = [place for place in range(len(names)) if place not in times][:2] + times[:1]
        _refuse(f"a table with no header, whose first row is {fields}", *(place + 1 for place in first))
    elif len(known) < 2:
        first = [names[known[role]] if role in known else role.upper() for role in ("user", "item")]
        first += [names[place] for place in times[:1]]
        _refuse(f"no user and item columns are known in the header {shown(', '.join(names), 300)}", *first)
    elif lists := [names[p] for p, word in enumerate(plain) if word.endswith("list") and word[:-4] in ITEMS]:
        raise UserError(f"{lists[0]!r} holds lists of items; give a log of one interaction a row")
    else:
        places = [known["user"], known["item"]]
        places += _time_places(names, plain, kinds, places)
    if again := [p for p in places if plain.count(plain[p]) > 1 and not (columns and columns[0].isdigit())]:
        _refuse(f"two columns are called {names[again[0]]!r}", *(place + 1 for place in places))
    left = [names[place] for place in times if place not in places]
    if left and not columns and (len(places) < 3 or kinds[places[2]] == "number"):
        taken = [names[place] for place in places[:2]]
        _refuse(f"{', '.join(left)} looks like times, under no known name, and may be left out", *taken, left[0])
    remarks = [f"not taken, though it looks like times: {', '.join(left)}"] if left else []
    if len(places) < 3 and table.sample:
        remarks.append("no column of times, so the file's order counts; --columns USER,ITEM,TIME names one")
    return places, remarks


def _asked(table, columns):
    """Return the places of columns that a person names, or counts from 1."""
    places = {str(place + 1): place for place in range(len(table.names))}
    places, columns = places | {name: place for place, name in enumerate(table.names)}, list(map(clean_name, columns))
    if wrong := [column for column in columns if column not in places]:
        near = did_you_mean(wrong[0], table.names) if table.header else ""
        raise UserError(f"no columns {', '.join(wrong)} among {shown(', '.join(table.names), 300)}{near}")
    return [places[column] for column in columns]


def _time_places(names, plain, kinds, taken):
    """Return the place of the column of times, or of a day and of a time of day, or nothing."""
    ranks = {p: TIMES.index(plain[p]) for p in range(len(names)) if plain[p] in TIMES and p not in taken}
    for place, kind in enumerate(kinds):
        if kind in ("moment", "day", "clock") and place not in taken and LIKE_TIMES.fullmatch(names[place]):
            ranks.setdefault(place, len(TIMES))
    groups = ("moment",), ("number", "day", "clock"), (None,)
    pool = next(filter(None, ([place for place in ranks if kinds[place] in group] for group in groups)), [])
    held, best = {kinds[place] for place in pool}, [p for p in pool if ranks[p] == min(ranks[q] for q in pool)]
    if held == {"day", "clock"} and len(pool) == 2:
        return sorted(pool, key=lambda place: kinds[place] == "clock")
    shown = ", ".join(names[place] for place in pool)
    if held == {"clock"}:
        raise UserError(f"{shown} holds times of day without a day; --columns names another column")
    if len(held) > 1 or len({plain[place] for place in best}) > 1:
        taken = [names[place] for place in [*taken, pool[0]]]
        _refuse(f"{shown} may each be the time (a day and a time of day are joined)", *taken)
    return best[:1]
