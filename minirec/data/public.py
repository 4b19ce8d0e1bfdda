"""The catalogue of public logs, and a downloader that lets nothing in.

    FILE         what the publisher serves, an archive or a table; it may also be put there by hand
    FILE.part    as much of it as a transfer brought before it broke; the next one goes on from there
    NAME.csv     what is made of it: user,item,timestamp, which train --data reads

Trusted is the catalogue alone: its addresses, its bounds on every size, and its SHA-256, which a
download must have before a byte of it is unpacked. A server or an archive names no path: one member,
asked for by its exact name, is read as a stream of lines, and only users, items and times come out of
it. Nothing is evaluated or run.
"""

import calendar
import csv
import http.client
import io
import json
import re
import shutil
import socket
import ssl
import stat
import threading
import time
import urllib.request
import zipfile
import zlib
from base64 import b64encode
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from gzip import GzipFile
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urljoin, urlsplit

from minirec import files
from minirec.data.log import MAX_ID_BYTES
from minirec.errors import UserError

CATALOGUE = Path(__file__).with_name("catalogue.json")
SCHEMES = ("https",)
REDIRECTS = 5  # in a row, all of them within one host
TIMEOUT = 30  # seconds for an answer, and again for each part of it
LEAST_SPEED = 10_000  # bytes a second, over TIMEOUT
ATTEMPTS = 5
PAUSE = 1  # seconds before the second attempt, twice as long before each further one
CHUNK = 1 << 18
LONGEST_LINE = 1 << 20
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
FILE_NAME = re.compile(r"\w[\w.-]*")


# The catalogue


@dataclass(frozen=True)
class Entry:
    """One public log: where it comes from, what it must be, and how it is read."""

    name: str
    title: str
    page: str  # the publisher's, for people
    licence: str
    file: str  # the publisher's name for it
    at_most_bytes: int
    unpacked_at_most_bytes: int
    csv_at_most_bytes: int
    record: str  # how a line is read: a separator, "json", or "literal" (a Python dictionary, printed)
    columns: list  # where user, item and time stand in a record: numbers, or keys
    url: str | None = None  # None: it is to be fetched by hand
    by_hand: str | None = None  # why, and how
    bytes: int | None = None  # where the exact size is known
    sha256: str | None = None
    sha256_from: str | None = None  # who published it
    member: str | None = None  # of a zip archive
    header: bool = False  # whether the first line names columns
    time: str | None = None  # None: a number, "iso", or a pattern of strptime
    once: bool = False  # a user's further entries with the same item are left out
    counts: dict | None = None  # published users, items, interactions, and from where
    k_core: dict | None = None  # the same of its k-core, and k

    def __post_init__(self):
        if not (FILE_NAME.fullmatch(self.name) and FILE_NAME.fullmatch(self.file)):
            raise ValueError(f"{self.name!r}, {self.file!r}: names of files are letters, digits and .-_")
        if self.url and not (urlsplit(self.url).scheme in SCHEMES and self.sha256):
            raise ValueError(f"{self.name}: an address starts with https://, and goes with a SHA-256")


def read_catalogue(path):
    """Return the catalogue in a JSON file as {name: Entry}, in its order. Raises UserError where it is none."""
    try:
        entries = [Entry(**value) for value in files.read_json(path)["datasets"]]
    except UserError:
        raise
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: not a catalogue ({error})") from None
    return {entry.name: entry for entry in entries}


def fetch(entry, folder, progress, say):
    """Bring an entry's log into a folder, unless it is there.

    progress(label, n): a context that yields update(n), as cli.progress; say(text): for remarks.
    Returns the path of the log, and whether it was there before. Raises UserError where it cannot be
    had; a broken transfer is left as FILE.part.
    """
    log, source, part = folder / f"{entry.name}.csv", folder / entry.file, folder / f"{entry.file}.part"
    if entry.url is None and not (log.exists() or source.exists()):
        raise UserError(f"{entry.name}: {entry.by_hand} into {folder}, then give this command again")
    files.make_folder(folder)
    with files.locked(folder):
        if log.exists():
            return log, True
        if source.exists():
            _check_by_hand(entry, source)
            convert(entry, source, log, progress)
        else:
            download(entry, part, progress, say)
            convert(entry, part, log, progress)
            part.unlink()
    return log, False


def _check_by_hand(entry, source):
    """Refuse a file that was put into the folder and is not the one that the catalogue describes."""
    if not source.is_file() or source.stat().st_size > entry.at_most_bytes:
        raise UserError(f"{source}: not a file, or larger than {entry.at_most_bytes:,} bytes; see {entry.page}")
    if entry.sha256 and files.fingerprint(source) != entry.sha256:
        raise UserError(f"{source}: its SHA-256 is not the catalogue's, {entry.sha256}; remove it, or fetch it again")


# The transfer


class Broken(Exception):
    """A transfer went wrong in a way that the next attempt may be spared."""


RETRIED = (Broken, ConnectionError, TimeoutError, http.client.HTTPException, ssl.SSLEOFError, ssl.SSLZeroReturnError)


def download(entry, part, progress, say):
    """Fetch an entry's file to the path `part`, or what is missing of it, until its SHA-256 is the catalogue's.

    A part is not asked whose it is: if what it was completed to is wrong, it goes, and the transfer
    starts anew. Raises UserError; after broken transfers the part is left.
    """
    if part.is_symlink() or (part.exists() and not part.is_file()):
        raise UserError(f"{part}: not a regular file; remove it")
    if part.exists() and files.fingerprint(part) == entry.sha256:
        return
    for attempt in range(ATTEMPTS):
        try:
            resumed = _transfer(entry, part, progress)
        except RETRIED as error:
            kind = f"{type(error).__name__}: " if isinstance(error, http.client.HTTPException) else ""
            reason = kind + (getattr(error, "strerror", None) or str(error))[:200]
        except OSError as error:
            unreachable = isinstance(error, (socket.gaierror, ssl.SSLError))
            remedy = _else(entry, part) if unreachable else "the same command goes on"
            raise UserError(f"{entry.url} to {part}: {error.strerror or error}; {remedy}") from None
        else:
            found = files.fingerprint(part)
            if found == entry.sha256:
                return
            part.unlink()
            if not resumed:
                raise UserError(
                    f"{entry.url}: nothing kept: its SHA-256 is {found}, not the catalogue's {entry.sha256}; "
                    f"it was altered on the way, or published anew: see {entry.page}"
                )
            reason = "what an earlier transfer left was of another file"
        if attempt + 1 < ATTEMPTS:
            pause = PAUSE * 2**attempt
            say(f"{reason}; trying again in {pause} s")
            time.sleep(pause)
    raise UserError(
        f"{entry.url}: {reason}; given up after {ATTEMPTS} attempts; the same command goes on; {_else(entry, part)}"
    )


def _else(entry, part):
    return f"or else put {entry.file} from {entry.page} into {part.parent} by hand"


def _transfer(entry, part, progress):
    """Append what is missing of a file to `part`, in one answer; return whether there was something before."""
    have = part.stat().st_size if part.exists() else 0
    with _request(entry.url, have) as response:
        answer = f"the server answers {response.status} {response.reason[:100]}"
        begins = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if response.status == 416 or (response.status == 206 and not begins):
            part.unlink(missing_ok=True)
            raise Broken("the server cannot go on from what an earlier transfer left")
        if response.status >= 500 or response.status == 429:
            raise Broken(answer)
        if response.status not in (200, 206):
            raise UserError(f"{entry.url}: {answer}; see {entry.page}")
        have = have if response.status == 206 else 0
        _check_size(entry, have, response.length, part.parent)
        total = have + response.length  # from here on, http.client reads no byte beyond it
        resumed, mark, since = have > 0, have, time.monotonic()
        with open(part, "ab" if have else "wb") as file, progress(f"fetching {entry.file}", total) as update:
            update(have)
            while chunk := response.read1(CHUNK):
                file.write(chunk)
                update(len(chunk))
                have += len(chunk)
                if (elapsed := time.monotonic() - since) > TIMEOUT:
                    if have - mark < LEAST_SPEED * elapsed:
                        raise Broken(f"the server sends less than {LEAST_SPEED:,} bytes a second")
                    mark, since = have, time.monotonic()
    if have < total:
        raise Broken(f"the connection broke after {have:,} of {total:,} bytes")
    return resumed


def _check_size(entry, have, rest, folder):
    """Refuse an answer whose announced size is not the catalogue's, or that the disk has no room for."""
    if rest is None:
        raise Broken("the server does not say how long the file is")
    total = have + rest
    if total > entry.at_most_bytes or (entry.bytes and total != entry.bytes):
        expected = f"{entry.bytes:,}" if entry.bytes else f"at most {entry.at_most_bytes:,}"
        raise UserError(
            f"{entry.url}: the server announces {total:,} bytes, the catalogue {expected}: not the file; "
            f"see {entry.page}"
        )
    _check_room(rest + entry.csv_at_most_bytes, folder)


def _check_room(needed, folder):
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{folder}: {free:,} bytes free, up to {needed:,} needed; free some, or name another --out")


def _request(url, have):
    """Return the answer for a file's bytes from number `have` on, redirected within its host only."""
    asked = url
    for _ in range(REDIRECTS + 1):
        response = _answer(asked, {"Range": f"bytes={have}-"} if have else {})
        if response.status not in (301, 302, 303, 307, 308):
            return response
        response.close()
        asked = _followed(asked, response.headers.get("Location", ""))
    raise UserError(f"{url}: redirected more than {REDIRECTS} times; nothing fetched")


def _followed(url, location):
    """Return the address that a redirect leads to. Raises UserError where that is another host, or not https."""
    try:
        to, before = urlsplit(urljoin(url, location)), urlsplit(url)
        allowed = to.scheme in SCHEMES and to.netloc == before.netloc and re.fullmatch("[!-~]+", to.geturl())
    except ValueError:
        allowed = False
    if not allowed:
        raise UserError(f"{url}: redirected to {location[:100]!r}, not an https address of this host; nothing fetched")
    return to.geturl()


def _answer(url, headers):
    """Send one GET request and return the answer, its headers read.

    A socket's time-out starts anew with each byte: where the headers take longer than twice that, the
    connection is cut.
    """
    parts, answered, began = urlsplit(url), threading.Event(), time.monotonic()
    if parts.scheme not in SCHEMES:
        raise UserError(f"{url}: not an https address")
    connection = _connection(parts)

    def cut_when_late():
        while not answered.wait(2 * TIMEOUT):
            if (sock := connection.sock) is not None:  # else it is not connected yet, or gone
                with suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    threading.Thread(target=cut_when_late, daemon=True).start()
    try:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"User-Agent": "minirec", "Connection": "close"} | headers)
        response = connection.getresponse()
        if time.monotonic() - began > 2 * TIMEOUT:  # cut: what came of the headers reads like all of them
            raise Broken(f"no answer within {2 * TIMEOUT} s")
        if connection.sock:
            connection.sock.close()  # the answer holds on to it
        return response
    except BaseException:
        connection.close()
        raise
    finally:
        answered.set()


def _connection(parts):
    """Return a connection to the host of a split address, through a proxy where the environment names one."""
    if parts.scheme == "https":
        kind = partial(http.client.HTTPSConnection, context=ssl.create_default_context())
    else:
        kind = http.client.HTTPConnection
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or urllib.request.proxy_bypass(parts.hostname):
        return kind(parts.netloc, timeout=TIMEOUT)
    proxy = urlsplit(proxy if "://" in proxy else f"//{proxy}")
    user, _, place = proxy.netloc.rpartition("@")
    basic = {"Proxy-Authorization": "Basic " + b64encode(unquote(user).encode()).decode()} if user else {}
    connection = kind(place, timeout=TIMEOUT)
    connection.set_tunnel(parts.netloc, headers=basic)
    return connection


# The conversion


def convert(entry, source, log, progress):
    """Write the users, items and times of an entry's file as a CSV, whose path is `log`: all of it, or none."""
    _check_room(entry.csv_at_most_bytes, log.parent)
    with progress(f"converting {entry.file}", source.stat().st_size) as update:
        files.replace(log, lambda file: _write_rows(entry, source, file, update))


def _write_rows(entry, source, file, update):
    room, rows, seen = entry.csv_at_most_bytes, 0, set()

    def write(text):
        nonlocal room
        row = text.encode()
        room -= len(row)
        if room < 0:
            raise UserError(f"{source}: makes a CSV of more than {entry.csv_at_most_bytes:,} bytes; refused")
        file.write(row)

    writer = csv.writer(SimpleNamespace(write=write), lineterminator="\n")
    writer.writerow(("user", "item", "timestamp"))
    for number, line in _lines(entry, source, update):
        try:
            user, item, moment = _record(entry, line)
        except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{source}, line {number}: not as {entry.title} should be: {line[:60]!r}") from None
        if entry.once:
            if (user, item) in seen:
                continue
            seen.add((user, item))
        writer.writerow((user, item, moment))
        rows += 1
    if not rows:
        raise UserError(f"{source}: holds no interaction")


def _record(entry, line):
    """Return user, item and time of one line; whatever is wrong with it is raised."""
    if entry.record == "json":
        record = json.loads(line)
    elif entry.record == "literal":
        record = read_literal(line)
    else:
        record = line.split(entry.record)
    user, item, moment = (record[column] for column in entry.columns)
    for name in (user, item):
        if not name.strip() or CONTROL.search(name) or len(name.encode()) > MAX_ID_BYTES:
            raise ValueError(f"no id: {name[:60]!r}")
    return user, item, _seconds(entry.time, moment)


def _seconds(kind, text):
    """Return a time as an integer: as it is, or as seconds since 1970; without a zone, it is UTC."""
    if kind is None:
        return int(text)
    moment = datetime.fromisoformat(text.replace("Z", "+00:00")) if kind == "iso" else datetime.strptime(text, kind)
    return calendar.timegm(moment.utctimetuple())


STRING = r"""u?'([^'\\]*(?:\\.[^'\\]*)*)'|u?"([^"\\]*(?:\\.[^"\\]*)*)\""""
PAIR = re.compile(rf"u?'(\w+)': (?:{STRING}|[\w.+-]+)(, |\}}$)")


def read_literal(line):
    """Return the texts in a Python dictionary that was printed on one line, {key: text}, by looking at it only.

    Its values are texts, numbers or names. Raises ValueError for anything else.
    """
    record, at, last = {}, 1, ""
    while last != "}":
        pair = PAIR.match(line, at) if line.startswith("{") else None
        if pair is None:
            raise ValueError(f"no dictionary at character {at}")
        key, single, double, last = pair.groups()
        record[key], at = _unescaped(single if double is None else double), pair.end()
    return record


def _unescaped(text):
    r"""Return the text that a literal such as `\u4e2d` stands for; one that cannot be printed stays as it is."""
    if not text or "\\" not in text:
        return text
    plain = text.encode("latin-1", "backslashreplace").decode("unicode_escape")
    return plain if plain.isprintable() else text


def _lines(entry, source, update):
    """Yield number and text of the lines in a file, unpacked; what is damaged or too large ends in a UserError."""
    room, at, number = entry.unpacked_at_most_bytes, 0, 0
    try:
        with open(source, "rb") as packed, _unpacked(entry, packed, source) as stream:
            while line := stream.readline(LONGEST_LINE + 1):
                number += 1
                room -= len(line)
                if room < 0 or len(line) > LONGEST_LINE:
                    limit = f"{entry.unpacked_at_most_bytes:,} bytes in all, {LONGEST_LINE:,} a line"
                    raise UserError(f"{source}, line {number}: unpacks to more than {limit}; refused")
                if number % (1 << 16) == 0:
                    update(packed.tell() - at)
                    at = packed.tell()
                if number > 1 or not entry.header:
                    yield number, line.decode("utf-8", "surrogateescape").rstrip("\r\n")
    except UserError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, OverflowError, OSError) as error:
        raise UserError(f"{source}: not readable after line {number} ({error}); remove it and fetch it again") from None


@contextmanager
def _unpacked(entry, packed, source):
    """Yield a binary stream of what a file holds: a zip's one member, a gzip's content, or itself."""
    if entry.member is None:
        yield io.BufferedReader(GzipFile(fileobj=packed), CHUNK) if entry.file.endswith(".gz") else packed
        return
    with zipfile.ZipFile(packed) as archive:
        try:
            info = archive.getinfo(entry.member)
        except KeyError:
            raise UserError(f"{source}: holds no {entry.member}; refused") from None
        kinds = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if info.flag_bits & 1 or info.compress_type not in kinds or stat.S_ISLNK(info.external_attr >> 16):
            raise UserError(f"{source}: its {entry.member} is encrypted, a link, or oddly packed; refused")
        if info.file_size > entry.unpacked_at_most_bytes:
            raise UserError(f"{source}: its {entry.member} is of {info.file_size:,} bytes, too large; refused")
        with archive.open(info) as stream:
            yield io.BufferedReader(stream, CHUNK)
