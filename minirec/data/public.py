"""The catalogue of public logs, and a downloader that lets nothing in.

    FILE         what the publisher serves, an archive or a table; it may also be put there by hand
    FILE.part    as much of it as a transfer brought before it broke; the next one goes on from there
    NAME.csv     what read_log makes of it: user,item,timestamp, which train --data reads

Trusted is the catalogue alone: its addresses, its bounds on sizes, and its SHA-256, which a download must
have before a byte of it is unpacked. No name from a server or an archive becomes a path.
"""

import csv
import io
import re
import shutil
import ssl
import time
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit

import numpy as np

from minirec import files
from minirec.data.log import keep_interactions, users_of
from minirec.data.read import read_log
from minirec.data.times import SECOND
from minirec.errors import UserError

CATALOGUE = Path(__file__).with_name("catalogue.json")
SCHEMES = ("https",)
TIMEOUT = 30  # seconds for an answer, and again for each part of it
LEAST_SPEED = 10_000  # bytes a second, over TIMEOUT
ATTEMPTS = 5
PAUSE = 1  # seconds before the second attempt, twice as long before each further one
CHUNK_BYTES, CHUNK_ROWS = 1 << 18, 1 << 16
FILE_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Entry:
    """One public log: where it comes from, what it must be, and how it is read."""

    name: str
    title: str
    page: str  # the publisher's, for people
    licence: str
    file: str  # the publisher's name for it
    at_most_bytes: int
    csv_at_most_bytes: int
    columns: str  # of user, item and time, as --columns has them
    url: str | None = None  # None: it is to be fetched by hand
    by_hand: str | None = None  # why, and how
    sha256: str | None = None
    sha256_from: str | None = None  # who published it
    member: str | None = None  # of a zip archive
    once: bool = False  # a user's further entries with the same item are left out
    counts: dict | None = None  # published users, items, interactions, and from where
    k_core: dict | None = None  # the same of its k-core, k, and whether repeats were dropped

    def __post_init__(self):
        if not (FILE_NAME.fullmatch(self.name) and FILE_NAME.fullmatch(self.file)):
            raise ValueError(f"{self.name!r}, {self.file!r}: names of files are letters, digits and .-_")
        if self.url and not (urlsplit(self.url).scheme in SCHEMES and self.sha256):
            raise ValueError(f"{self.name}: an address starts with https://, and goes with a SHA-256")


def read_catalogue(path):
    """Return the catalogue in a JSON file as {name: Entry}, in its order. Raises UserError where it is none."""
    try:
        return {value["name"]: Entry(**value) for value in files.read_json(path)["datasets"]}
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not a catalogue ({error})") from None


def fetch(entry, folder, progress, say):
    """Bring an entry's log into a folder, unless it is there.

    progress(label, n): a context that yields update(n), as cli.progress; say(text): for remarks.
    Returns the path of its CSV, and the Log that was made into it, None where it was there before. Raises UserError
    where it cannot be had; a broken transfer is left as FILE.part.
    """
    path, source, part = folder / f"{entry.name}.csv", folder / entry.file, folder / f"{entry.file}.part"
    if entry.url is None and not (path.exists() or source.exists()):
        raise UserError(f"{entry.name}: {entry.by_hand} into {folder}, then give this command again")
    files.make_folder(folder)
    with files.locked(folder):
        if path.exists():
            return path, None
        have = sum(file.stat().st_size for file in (source, part) if file.exists())
        needed = entry.csv_at_most_bytes + max(0, entry.at_most_bytes - have)
        if (free := shutil.disk_usage(folder).free) < needed:
            raise UserError(f"{folder}: {free:,} bytes free, up to {needed:,} needed; free some, or name another --out")
        if source.exists():
            _check_by_hand(entry, source)
            return path, convert(entry, source, path, progress)
        download(entry, part, progress, say)
        log = convert(entry, part, path, progress)
        part.unlink()
    return path, log


def _check_by_hand(entry, source):
    """Refuse a file that was put into the folder and is not the one that the catalogue describes."""
    if not source.is_file() or source.stat().st_size > entry.at_most_bytes:
        raise UserError(f"{source}: not a file, or larger than {entry.at_most_bytes:,} bytes; see {entry.page}")
    if entry.sha256 and files.fingerprint(source) != entry.sha256:
        raise UserError(f"{source}: its SHA-256 is not the catalogue's, {entry.sha256}; remove it, or fetch it again")


# The transfer


class WithinHost(urllib.request.HTTPRedirectHandler):
    """Follows a redirect within its host only."""

    def redirect_request(self, request, answer, code, message, headers, url):
        answer.close()  # it may be endless
        old, new = urlsplit(request.full_url), urlsplit(url)
        if new.scheme not in SCHEMES or new.netloc != old.netloc:
            raise UserError(f"{request.full_url}: redirected to {url[:100]!r}, another host; nothing fetched")
        return super().redirect_request(request, answer, code, message, headers, url)


def opener():
    """Return what opens addresses: certificates are verified, a proxy is taken from the environment."""
    return urllib.request.build_opener(WithinHost, urllib.request.HTTPSHandler(context=ssl.create_default_context()))


def download(entry, part, progress, say):
    """Fetch an entry's file to the path `part`, or what is missing of it, until its SHA-256 is the catalogue's.

    A part is not asked whose it is: if what it was completed to is wrong, it goes, and the transfer
    starts anew. Raises UserError; after broken transfers the part is left.
    """
    files.check_regular(part)
    if part.exists() and files.fingerprint(part) == entry.sha256:
        return
    reason = None
    for attempt in range(ATTEMPTS):
        if reason:
            say(f"{reason}; trying again in {PAUSE * 2 ** (attempt - 1)} s")
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            return _transfer(entry, part, progress)
        except UserError:
            raise
        except (OSError, HTTPException, ValueError) as error:  # ValueError: the address of a redirect is none
            code = error.code if isinstance(error, HTTPError) else None
            if code == 416:  # the part is longer than the file
                part.unlink(missing_ok=True)
            elif code and code < 500 and code != 429:
                raise UserError(f"{entry.url}: {str(error).splitlines()[0][:100]}; see {entry.page}") from None
            reason = str(error)[:200] or type(error).__name__
    raise UserError(
        f"{entry.url}: {reason}; given up after {ATTEMPTS} attempts; the same command goes on, "
        f"or else put {entry.file} from {entry.page} into {part.parent} by hand"
    )


def _transfer(entry, part, progress):
    """Append what is missing of a file to `part`, in one answer, and check the whole of it.

    Raises OSError or HTTPException where the next attempt may be spared it, UserError where that is in vain.
    """
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "minirec"} | ({"Range": f"bytes={have}-"} if have else {})
    with opener().open(urllib.request.Request(entry.url, headers=headers), timeout=TIMEOUT) as answer:
        if answer.status != 206:
            have = 0
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise OSError("the server cannot go on from what an earlier transfer left")
        if answer.length is None:
            raise OSError("the server does not say how long the file is")
        resumed, total = have > 0, have + answer.length  # http.client reads no byte beyond it
        if total > entry.at_most_bytes:
            raise UserError(
                f"{entry.url}: the server announces {total:,} bytes, the catalogue at most {entry.at_most_bytes:,}: "
                f"not the file; see {entry.page}"
            )
        mark, since = have, time.monotonic()
        with open(part, "ab" if have else "wb") as file, progress(f"fetching {entry.file}", total) as update:
            update(have)
            while chunk := answer.read1(CHUNK_BYTES):
                file.write(chunk)
                update(len(chunk))
                have += len(chunk)
                if (elapsed := time.monotonic() - since) > TIMEOUT:
                    if have - mark < LEAST_SPEED * elapsed:
                        raise OSError(f"the server sends less than {LEAST_SPEED:,} bytes a second")
                    mark, since = have, time.monotonic()
    if have < total:
        raise OSError(f"the connection broke after {have:,} of {total:,} bytes")
    digest = files.fingerprint(part)
    if digest != entry.sha256:
        part.unlink()
        if resumed:
            raise OSError("what an earlier transfer left was of another file")
        raise UserError(
            f"{entry.url}: nothing kept: its SHA-256 is {digest}, not the catalogue's {entry.sha256}; "
            f"it was altered on the way, or published anew: see {entry.page}"
        )


# The conversion


def convert(entry, source, path, progress):
    """Read an entry's file as read_log does, write it as a CSV, all of it or none, and return the Log."""
    with progress(f"reading {entry.file}", source.stat().st_size) as update:
        log = read_log(source, entry.columns, progress=update, member=entry.member)
    if entry.once:
        _, first = np.unique(users_of(log) * len(log.items) + log.sequence, return_index=True)
        log = keep_interactions(log, np.sort(first))
    files.replace(path, lambda file: _write_rows(log, file, entry.csv_at_most_bytes))
    return log


def _write_rows(log, file, at_most_bytes):
    whole = log.dated and not (log.times % SECOND).any()
    users, times = users_of(log), log.times // SECOND if whole else log.times
    text = io.TextIOWrapper(file, "utf-8", newline="", write_through=True)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("user", "item", "timestamp"))
    for start in range(0, len(users), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        names = [log.users[u] for u in users[part]], [log.items[i] for i in log.sequence[part]]
        writer.writerows(zip(*names, times[part].tolist(), strict=True))
        if file.tell() > at_most_bytes:
            raise UserError(f"makes a CSV of more than {at_most_bytes:,} bytes; refused")
    text.detach()
