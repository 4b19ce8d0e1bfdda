"""The catalogue and its downloader, against a server on loopback and archives that mean no good."""

import base64
import gzip
import hashlib
import io
import re
import struct
import threading
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from helpers import ROOT, real_log, run_cli

from minirec.cli import main
from minirec.data import log as data
from minirec.data import public as catalogue
from minirec.data import read as reader
from minirec.data.public import Entry, convert, fetch, read_catalogue
from minirec.data.read import read_log
from minirec.errors import UserError

ROWS = "".join(f"{user}\t{item}\t5\t{1000 + item}\n" for user in range(40) for item in range(50)).encode()
LOG = "user,item,timestamp\n" + "".join(f"{u},{i},{1000 + i}\n" for u in range(40) for i in range(50))
MEMBER = "ml/u.data"


def zipped(*members, pack=zipfile.ZIP_DEFLATED):
    """A zip archive of (name or ZipInfo, content)."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", pack) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


GOOD = zipped((MEMBER, ROWS), ("ml/README", b"hello"))


def entry_of(content, url=None, **changes):
    """An Entry for a zip archive like GOOD."""
    entry = Entry(
        name="ml",
        title="A log",
        page="https://example.org/ml",
        licence="none",
        file="ml.zip",
        at_most_bytes=len(content) + 1000,
        csv_at_most_bytes=len(ROWS),
        columns="1,2,4",
        sha256=hashlib.sha256(content).hexdigest(),
        member=MEMBER,
        by_hand="download it",
    )
    return replace(entry, url=url, **changes)


# The server


def whole(content=GOOD):
    """Send a file, from where Range asks."""

    def answer(handler):
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        if start >= len(content):
            handler.send_response(416)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        handler.send_response(206 if asked else 200)
        handler.send_header("Content-Length", str(len(content) - start))
        if asked:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        handler.end_headers()
        handler.wfile.write(content[start:])

    return answer


def says(status, headers=(), body=b"", announced=None):
    """Send what a person writes here."""

    def answer(handler):
        handler.send_response(status)
        for name, value in {"Content-Length": len(body) if announced is None else announced, **dict(headers)}.items():
            if value is not False:
                handler.send_header(name, str(value))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def cut(content=GOOD, after=1000):
    return says(200, body=content[:after], announced=len(content))


def trickles(head, every=0.03):
    """Send some bytes, then one at a time, without end."""

    def answer(handler):
        handler.wfile.write(head)
        while not handler.server.over.wait(every):
            handler.wfile.write(b"x")

    return answer


def silent(handler):
    handler.server.over.wait()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    close_connection = True

    def do_GET(self):
        self.close_connection = True
        self.server.asked.append(self.headers.get("Range"))
        if credentials := self.headers.get("Proxy-Authorization"):
            self.server.proxied.append((self.path, credentials))
        script = self.server.script
        try:
            (script.pop(0) if len(script) > 1 else script[0])(self)
        except OSError:  # the client has hung up
            pass

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch):
    """serve(answer, ...): a server that gives these answers one after the other, and the last one on and on."""
    servers = []
    for name, value in {"SCHEMES": ("http",), "PAUSE": 0, "ATTEMPTS": 3}.items():
        monkeypatch.setattr(catalogue, name, value)
    monkeypatch.setenv("no_proxy", "*")

    def start(*script):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.block_on_close = False
        server.script, server.asked, server.proxied, server.over = list(script), [], [], threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}/ml.zip"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.over.set()
        server.shutdown()
        server.server_close()


@contextmanager
def no_progress(label, length):
    yield lambda n: None


def left(tmp_path):
    """All files below the test's folder."""
    return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.is_dir())


def bring(entry, tmp_path, said=None):
    return fetch(entry, tmp_path / "in", no_progress, (said if said is not None else []).append)


def refused(entry, tmp_path, because, leaves=()):
    """Fetching ends in one line that says why, and leaves nothing but these files."""
    with pytest.raises(UserError, match=because) as caught:
        bring(entry, tmp_path)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 500
    assert left(tmp_path) == sorted(leaves)
    assert all(path.stat().st_size <= entry.at_most_bytes for path in tmp_path.rglob("*.part"))


# Transfers


def test_a_log_is_fetched_checked_and_made_a_csv(serve, tmp_path):
    server = serve(whole())
    path, log = bring(entry_of(GOOD, server.url, at_most_bytes=len(GOOD)), tmp_path)
    assert path == tmp_path / "in/ml.csv" and path.read_text() == LOG and left(tmp_path) == ["in/ml.csv"]
    assert log.read_as.startswith("csv (tab): column 1, column 2, column 4 (not used: column 3); 2,000 rows")
    assert read_log(path).sha256() == log.sha256()
    assert bring(entry_of(GOOD, server.url), tmp_path) == (path, None)
    assert server.asked == [None]


def test_a_broken_transfer_goes_on_where_it_broke(serve, tmp_path):
    server, said = serve(cut(), whole()), []
    bring(entry_of(GOOD, server.url), tmp_path, said)
    assert server.asked == [None, "bytes=1000-"] and left(tmp_path) == ["in/ml.csv"]
    assert said == [f"the connection broke after 1,000 of {len(GOOD):,} bytes; trying again in 0 s"]


def test_the_next_command_goes_on_where_the_last_one_broke(serve, tmp_path):
    server = serve(cut(), lambda handler: None)
    refused(entry_of(GOOD, server.url), tmp_path, "Remote end closed.*given up after 3 attempts", ["in/ml.zip.part"])
    assert (tmp_path / "in/ml.zip.part").read_bytes() == GOOD[:1000]
    server.script[:] = [whole()]
    bring(entry_of(GOOD, server.url), tmp_path)
    assert server.asked[-1] == "bytes=1000-" and left(tmp_path) == ["in/ml.csv"]


def test_a_finished_part_needs_no_server(serve, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/ml.zip.part").write_bytes(GOOD)
    bring(entry_of(GOOD, "http://127.0.0.1:9/ml.zip"), tmp_path)
    assert left(tmp_path) == ["in/ml.csv"]


def test_a_server_that_ignores_range_sends_the_file_anew(serve, tmp_path):
    server = serve(cut(), says(200, body=GOOD))
    bring(entry_of(GOOD, server.url), tmp_path)
    assert server.asked == [None, "bytes=1000-"] and (tmp_path / "in/ml.csv").read_text() == LOG


@pytest.mark.parametrize("before", [b"x" * 1000, b"x" * len(GOOD), b"x" * (len(GOOD) + 1)])
def test_a_part_of_another_file_is_started_afresh(serve, tmp_path, before):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/ml.zip.part").write_bytes(before)
    server = serve(whole())
    bring(entry_of(GOOD, server.url), tmp_path)
    assert server.asked == [f"bytes={len(before)}-", None] and left(tmp_path) == ["in/ml.csv"]


def test_a_file_that_changes_between_attempts_is_started_afresh(serve, tmp_path):
    server = serve(cut(b"y" * len(GOOD)), whole())
    bring(entry_of(GOOD, server.url), tmp_path)
    assert server.asked == [None, "bytes=1000-", None] and (tmp_path / "in/ml.csv").read_text() == LOG


def test_another_range_than_was_asked_for_is_not_appended(serve, tmp_path):
    wrong = says(206, {"Content-Range": f"bytes 0-9/{len(GOOD)}"}, b"0123456789")
    server = serve(cut(), wrong, whole())
    bring(entry_of(GOOD, server.url), tmp_path)
    assert server.asked == [None, "bytes=1000-", None]


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_busy_server_is_asked_again(serve, tmp_path, status):
    server = serve(says(status), whole())
    bring(entry_of(GOOD, server.url), tmp_path)
    assert left(tmp_path) == ["in/ml.csv"]


def test_a_redirect_within_the_host_is_followed(serve, tmp_path):
    bring(entry_of(GOOD, serve(says(302, {"Location": "/elsewhere"}), whole()).url), tmp_path)
    assert left(tmp_path) == ["in/ml.csv"]


PART = ["in/ml.zip.part"]
HOSTILE = {  # answer, what is said, what is left
    "404": (says(404), "HTTP Error 404: Not Found; see https://example.org/ml", []),
    "403": (says(403), "HTTP Error 403", []),
    "500 for good": (says(500), "HTTP Error 500.*given up after 2", []),
    "no content": (says(204), "broke after 0 of 0|SHA-256 is", []),
    "drops for good": (says(200, body=b"", announced=2000), "broke after 0 of", PART),
    "too long a length": (says(200, body=GOOD, announced=10**12), "announces 1,000,000,000,000 bytes", []),
    "no length": (says(200, {"Content-Length": False}, GOOD), "does not say how long", []),
    "negative length": (says(200, body=GOOD, announced=-1), "does not say how long", []),
    "chunks": (says(200, {"Content-Length": False, "Transfer-Encoding": "chunked"}, b"5\r\nhello\r\n"), "how long", []),
    "an error page": (says(200, body=b"<html>"), "nothing kept: its SHA-256 is", []),
    "another file": (says(200, body=bytes(len(GOOD))), "SHA-256 is .*, not the catalogue's", []),
    "more than announced": (says(200, body=bytes(2 * len(GOOD)), announced=len(GOOD)), "SHA-256 is", []),
    "redirect to another host": (
        says(302, {"Location": "http://localhost/ml.zip"}),
        "redirected to 'http://localhost/ml.zip', another host; nothing fetched",
        [],
    ),
    "redirect to another port": (says(301, {"Location": "http://127.0.0.1:1/"}), "another host", []),
    "redirect to a file": (says(307, {"Location": "file:///etc/passwd"}), "HTTP Error 307", []),
    "redirect to ftp": (says(308, {"Location": "ftp://127.0.0.1/x"}), "another host", []),
    "redirect to nonsense": (says(302, {"Location": "http://[::1"}), "Invalid IPv6 URL", []),
    "redirect to nowhere": (says(302), "HTTP Error 302", []),
    "redirects in a loop": (says(302, {"Location": "/ml.zip"}), "HTTP Error 302", []),
    "an endless redirect": (trickles(b"HTTP/1.1 302 F\r\nLocation: /ml.zip\r\n\r\n", 0), "HTTP Error 302", []),
    "no HTTP": (lambda handler: handler.wfile.write(b"SSH-2.0 \x1b[2J" + b"x" * 99999), "given up after 2", []),
    "endless headers": (
        lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 999),
        "100 head",
        [],
    ),
}
SLOW = {
    "never answers": (silent, "timed out; given up after 2", []),
    "trickles": (
        trickles(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(GOOD)),
        "less than 10,000 bytes a second; given up after 2",
        PART,
    ),
}


@pytest.mark.parametrize("case", [*HOSTILE, *SLOW])
def test_a_hostile_server_gets_one_line_and_nothing_in(serve, tmp_path, monkeypatch, case):
    answer, because, leaves = (HOSTILE | SLOW)[case]
    monkeypatch.setattr(catalogue, "TIMEOUT", 0.3 if case in SLOW else 30)
    monkeypatch.setattr(catalogue, "ATTEMPTS", 2)
    refused(entry_of(GOOD, serve(answer).url), tmp_path, because, leaves)


def test_nothing_but_https_is_asked_or_followed():
    with pytest.raises(ValueError, match="starts with https"):
        entry_of(GOOD, "http://example.org/ml.zip")
    with pytest.raises(ValueError, match="goes with a SHA-256"):
        entry_of(GOOD, "https://example.org/ml.zip", sha256=None)
    assert catalogue.SCHEMES == ("https",)


def test_certificates_are_verified():
    (handler,) = [h for h in catalogue.opener().handlers if isinstance(h, catalogue.urllib.request.HTTPSHandler)]
    context = handler._context
    assert context.check_hostname and context.verify_mode.name == "CERT_REQUIRED"


def test_a_proxy_is_taken_from_the_environment(serve, tmp_path, monkeypatch):
    server = serve(whole())
    monkeypatch.delenv("no_proxy")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("http_proxy", server.url.replace("//", "//me:p%40ss@").removesuffix("/ml.zip"))
    bring(entry_of(GOOD, "http://example.invalid/ml.zip"), tmp_path)
    assert server.proxied == [("http://example.invalid/ml.zip", "Basic " + base64.b64encode(b"me:p@ss").decode())]
    assert left(tmp_path) == ["in/ml.csv"]


def test_a_host_that_is_not_there_is_named_with_another_way(serve, tmp_path, monkeypatch):
    refused(
        entry_of(GOOD, "http://127.0.0.1:9/ml.zip"), tmp_path, "or else put ml.zip from https://example.org/ml into"
    )


def test_a_full_disk_is_noticed_before_the_transfer(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue.shutil, "disk_usage", lambda _: SimpleNamespace(free=9))
    refused(entry_of(GOOD, serve(whole()).url), tmp_path, "9 bytes free, up to .* needed")


def test_a_link_in_place_of_the_part_is_not_followed(serve, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "in/ml.zip.part").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="a regular file belongs here"):
        bring(entry_of(GOOD, serve(whole()).url), tmp_path)
    assert (tmp_path / "precious").read_text() == "mine"


def test_ctrl_c_leaves_the_part(serve, tmp_path, monkeypatch):
    @contextmanager
    def interrupted(label, length):
        def update(n):
            if n:
                raise KeyboardInterrupt

        yield update

    with pytest.raises(KeyboardInterrupt):
        fetch(entry_of(GOOD, serve(whole()).url), tmp_path / "in", interrupted, print)
    assert left(tmp_path) == PART and GOOD.startswith((tmp_path / PART[0]).read_bytes())


def test_what_was_put_there_by_hand_is_used_and_kept(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/ml.zip").write_bytes(GOOD)
    bring(entry_of(GOOD), tmp_path)
    assert left(tmp_path) == ["in/ml.csv", "in/ml.zip"]


def test_what_was_put_there_by_hand_is_checked(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/ml.zip").write_bytes(GOOD + b"x")
    refused(entry_of(GOOD), tmp_path, "SHA-256 is not the catalogue's", ["in/ml.zip"])
    refused(entry_of(GOOD, at_most_bytes=1000), tmp_path, "larger than 1,000 bytes", ["in/ml.zip"])


def test_what_is_not_to_be_downloaded_says_how_to_have_it(tmp_path):
    refused(entry_of(GOOD), tmp_path, "ml: download it into .*in, then give this command again")
    assert not (tmp_path / "in").exists()


# Archives


def link(name, target):
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info, target


def patched(archive, **fields):
    """An archive whose headers, local and central, say something else about the first member."""
    archive = bytearray(archive)
    central = archive.index(b"PK\x01\x02")
    for name, value in fields.items():
        kind, local_at, central_at = {"flags": ("<H", 6, 8), "size": ("<I", 22, 24), "method": ("<H", 8, 10)}[name]
        struct.pack_into(kind, archive, local_at, value)
        struct.pack_into(kind, archive, central + central_at, value)
    return bytes(archive)


BOMB = zipped((MEMBER, b"1\t1\t5\t9\n" * 10**6))
ARCHIVES = {
    "no such member": (zipped(("ml/other", ROWS)), "holds no ml/u.data"),
    "climbs out": (zipped((f"../{MEMBER}", ROWS), (f"ml/../../{MEMBER}", ROWS)), "holds no ml/u.data"),
    "absolute": (zipped((f"/{MEMBER}", ROWS)), "holds no ml/u.data"),
    "nested": (zipped((f"{MEMBER}.zip", GOOD)), "holds no ml/u.data"),
    "an archive as the member": (zipped((MEMBER, GOOD)), "no columns|fields where"),
    "a link": (zipped(link(MEMBER, "/etc/passwd")), "line 1: no columns 1, 2, 4"),
    "encrypted": (patched(zipped((MEMBER, ROWS)), flags=1), "encrypted"),
    "a bomb": (BOMB, "grows more than 100-fold when unzipped"),
    "a bomb that lies": (patched(BOMB, size=1000), "Bad CRC-32"),
    "truncated": (GOOD[:-100], "damaged gzip or zip file"),
    "damaged": (GOOD[:200] + b"\xff" * 100 + GOOD[300:], "damaged gzip or zip file after line"),
    "no zip": (b"<html>no such file</html>", "a web page"),
    "empty": (zipped((MEMBER, b"")), "empty"),
    "short rows": (zipped((MEMBER, b"1\t2\t5\t9\n1\t2\n")), "line 2: 2 fields where the first line has 4"),
    "time in words": (zipped((MEMBER, b"1\t2\t5\tnoon\n")), "line 1: timestamp 'noon' is not"),
    "a long time": (zipped((MEMBER, b"1\t2\t5\t" + b"x" * 7000 + b"\n")), "line 1: timestamp"),
    "control characters": (zipped((MEMBER, b"\x1b[2J\t2\t5\t9\n")), "line 1: user id .* control character"),
    "not UTF-8": (zipped((MEMBER, b"\xff\t2\t5\t9\n")), "line 1: user id .* not UTF-8"),
    "long id": (zipped((MEMBER, b"u" * 257 + b"\t2\t5\t9\n")), "line 1: user id of 257 bytes"),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_a_hostile_archive_gets_one_line_and_nothing_out(tmp_path, monkeypatch, case):
    monkeypatch.setattr(reader, "EXPANSION_FROM", 1 << 18)
    monkeypatch.setattr(reader, "CHUNK_BYTES", 1 << 18)
    content, because = ARCHIVES[case]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/ml.zip").write_bytes(content)
    refused(entry_of(content), tmp_path, because, ["in/ml.zip"])


def test_a_hostile_archive_with_other_members_gives_its_one_member(tmp_path):
    content = zipped(
        ("../../evil", b"x"), ("/evil", b"x"), link("ml", "/tmp"), (MEMBER, ROWS), ("x" * 999, bytes(9**7))
    )
    (tmp_path / "in").mkdir()
    (tmp_path / "in/ml.zip").write_bytes(content)
    bring(entry_of(content), tmp_path)
    assert left(tmp_path) == ["in/ml.csv", "in/ml.zip"] and (tmp_path / "in/ml.csv").read_text() == LOG


@pytest.mark.parametrize(
    "content, because",
    [
        (gzip.compress(b"1\t1\t5\t9\n" * 10**6), "grows more than 100-fold"),
        (gzip.compress(bytes(10**8)), "longer than 16,777,216 characters|control character"),
        (gzip.compress(gzip.compress(ROWS)), "compressed twice"),
        (gzip.compress(ROWS)[:-300], "damaged gzip or zip file after line"),
    ],
)
def test_a_hostile_gzip_gets_one_line_and_nothing_out(tmp_path, monkeypatch, content, because):
    monkeypatch.setattr(reader, "EXPANSION_FROM", 1 << 18)
    monkeypatch.setattr(reader, "CHUNK_BYTES", 1 << 18)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/ml.gz").write_bytes(content)
    refused(entry_of(content, file="ml.gz", member=None), tmp_path, because, ["in/ml.gz"])


def test_the_csv_has_a_bound_of_its_own(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/ml.zip").write_bytes(GOOD)
    refused(entry_of(GOOD, csv_at_most_bytes=999), tmp_path, "a CSV of more than 999 bytes", ["in/ml.zip"])


# Conversions: what a publisher's file becomes is what read_log makes of it, with the catalogue's columns


def converted(tmp_path, content, name, **changes):
    """The rows that a file with this content becomes, as the catalogue has that log."""
    (tmp_path / "source").write_bytes(content)
    entry = read_catalogue(catalogue.CATALOGUE)[name]
    entry = replace(entry, file="source", member=None, csv_at_most_bytes=10**6, **changes)
    convert(entry, tmp_path / "source", tmp_path / "log.csv", no_progress)
    return (tmp_path / "log.csv").read_text(encoding="utf-8").splitlines()[1:]


FEW_ROWS = {  # a publisher's file, as it begins, and what is made of it
    "ml-1m": (b"1::1193::5::978300760\r\n1::661::3::978302109\r\n1::3::3::978301968\r\n2::1::5::978298413\r\n",
              ["1,1193,978300760", "1,3,978301968", "1,661,978302109", "2,1,978298413"]),
    "ml-20m": (b"userId,movieId,rating,timestamp\n1,2,3.5,1112486027\n1,3,3,1112486028\n1,4,3,1112486029\n2,2,1,9e8\n",
               ["1,2,1112486027", "1,3,1112486028", "1,4,1112486029", "2,2,900000000"]),
    "amazon-beauty": (b"A3,0205616461,5.0,1369699200\nA3,B001,4,1369699200\nA3,B000,4,1355443200\nA4,B0,5,1000000000\n",
                      ["A3,B000,1355443200", "A3,0205616461,1369699200", "A3,B001,1369699200", "A4,B0,1000000000"]),
    "gowalla": (b"0\t2010-10-19T23:55:27Z\t30.2\t-97.7\t22847\n0\t2010-10-18T22:17:43Z\t30.2\t-97.7\t420315\n"
                b"0\t2010-10-17T23:42:03Z\t30.2\t-97.7\t316637\n1\t2010-10-17T19:26:05Z\t30.2\t-97.7\t16516\n",
                ["0,316637,1287358923", "0,420315,1287440263", "0,22847,1287532527", "1,16516,1287343565"]),
    "lastfm": (b"userID\tartistID\ttagID\ttimestamp\r\n2\t52\t13\t1238536800000\r\n2\t52\t15\t1238536700000\r\n"
               b"2\t63\t1\t1238536900000\r\n2\t64\t1\t-428720400000\r\n3\t52\t13\t1238536800000\r\n",
               ["2,64,-428720400", "2,52,1238536700", "2,63,1238536900", "3,52,1238536800"]),
    "steam": (rb"{u'username': u'Ch\xe4os \u2122', u'hours': 0.1, u'product_id': u'725280', u'early_access': False, "
              rb"""u'text': u"it's {u'username': u'no'}", u'date': u'2017-12-17', u'page': 1}""" + b"\n"
              b"{u'username': u'Ann', u'product_id': u'1', u'date': u'2017-12-17'}\n" * 3,
              ["Chäos ™,725280,1513468800", *["Ann,1,1513468800"] * 3]),
    "foursquare-nyc": (b"470\t49bb\t4bf5\tCaf\xe9\t40.7\t-74.0\t-240\tTue Apr 03 18:00:09 +0000 2012\n" * 3
                       + b"979\t4a43\t4bf5\tBridge\t40.6\t-74.0\t-240\tTue Apr 03 18:00:25 +0000 2012\n",
                       [*["470,49bb,1333476009"] * 3, "979,4a43,1333476025"]),
    "yelp": (b'{"review_id":"r","user_id":"u,1","business_id":"b","text":"a\\nb","date":"2018-07-07 22:09:11"}\n'
             * 3 + b'{"review_id":"r","user_id":"v","business_id":"b","text":"","date":"2018-07-07 22:09:12"}\n',
             [*['"u,1",b,1531001351'] * 3, "v,b,1531001352"]),
    "otto": (b'{"session":42,"events":[{"aid":0,"ts":1661200010000,"type":"x"},{"aid":1,"ts":1661200020000,"type":"x"},'
             b'{"aid":2,"ts":1661200015123,"type":"carts"}]}\n{"session":43,"events":[{"aid":2,"ts":1661200080000}]}\n',
             ["42,0,1661200010000000000", "42,2,1661200015123000000", "42,1,1661200020000000000",
              "43,2,1661200080000000000"]),
    "yoochoose": (b"1,2014-04-07T10:51:09.277Z,214536502,0\n1,2014-04-07T10:54:09.868Z,214536500,0\n"
                  b"1,2014-04-07T10:54:46.998Z,214536506,0\n2,2014-04-07T13:56:37.614Z,214662742,S\n",
                  ["1,214536502,1396867869277000000", "1,214536500,1396868049868000000",
                   "1,214536506,1396868086998000000", "2,214662742,1396878997614000000"]),
    "diginetica": (b"sessionId;userId;itemId;timeframe;eventdate\n1;NA;81766;526309;2016-05-09\n"
                   b"1;NA;31331;1031018;2016-05-09\n1;NA;32118;243569;2016-05-09\n2;9;81766;86400001;2016-05-10\n",
                   ["1,32118,1462752243569000000", "1,81766,1462752526309000000", "1,31331,1462753031018000000",
                    "2,81766,1462924800001000000"]),
    "beeradvocate": (b"brewery_id,brewery_name,review_time,review_overall,review_profilename,beer_name,beer_beerid\n"
                     b'10325,"Vecchio, B.",1234817823,1.5,otto,Sausa,47986\n1,x,1235915097,3,otto,Red,48213\n'
                     b"1,x,1235916604,3,,Horse,48215\n1,x,1235916605,3,otto,Horse,48215\n1,x,1,3,ann,Red,48213\n",
                     ["otto,47986,1234817823", "otto,48213,1235915097", "otto,48215,1235916605", "ann,48213,1"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FEW_ROWS)
def test_publishers_files_are_converted_by_the_reader(tmp_path, name):
    content, rows = FEW_ROWS[name]
    assert converted(tmp_path, content, name) == rows


def test_times_between_seconds_are_kept(tmp_path):
    content = b"1\t2\t5\t1333476009.5\n1\t3\t5\t1333476009.25\n1\t4\t5\t1333476010\n2\t3\t1\t1333476009\n"
    rows = converted(tmp_path, content, "ml-100k")
    assert rows[:2] == ["1,3,1333476009250000000", "1,2,1333476009500000000"]


def test_a_real_log_gives_the_published_counts(tmp_path):
    rows = real_log("ml-100k.inter").read_text().splitlines()[1:]
    content = zipped(("ml-100k/u.data", "\n".join(rows) + "\n"))
    entry = read_catalogue(catalogue.CATALOGUE)["ml-100k"]
    (tmp_path / "ml-100k.zip").write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    path, _ = fetch(replace(entry, sha256=sha256), tmp_path, no_progress, print)
    whole_log = read_log(path)
    for log, published in ((whole_log, entry.counts), (data.k_core(whole_log, 5), entry.k_core)):
        assert len(log.users) == published["users"] and len(log.items) == published["items"]
        assert len(log.sequence) == published["interactions"]


# The catalogue and the command


def test_the_catalogue_is_whole():
    entries = read_catalogue(catalogue.CATALOGUE)
    readme = (ROOT / "datasets/README.md").read_text()
    for name, entry in entries.items():
        assert f"`{name}`" in readme and entry.licence and entry.page.startswith("https://")
        assert bool(entry.url) != bool(entry.by_hand) and entry.file != f"{name}.csv"
        assert not entry.url or (len(entry.sha256) == 64 and entry.sha256_from)
        for published in filter(None, (entry.counts, entry.k_core)):
            assert {"users", "items", "interactions", "from"} <= set(published)
        assert not entry.by_hand or entry.file in entry.by_hand
    assert {  # the paper's
        "amazon-beauty", "amazon-sports", "amazon-toys", "gowalla", "ml-20m", "ml-1m", "otto", "steam", "yoochoose",
        "lastfm", "diginetica", "beeradvocate", "foursquare-nyc", "yelp",
    } <= set(entries)  # fmt: skip


@pytest.mark.parametrize(
    "text", ["", "[]", '{"datasets": [{}]}', '{"datasets": 3}', '{"datasets": [3]}', '{"datasets": ["name"]}']
)
def test_what_is_no_catalogue_is_said_in_one_line(tmp_path, text):
    (tmp_path / "catalogue.json").write_text(text)
    with pytest.raises(UserError, match="catalogue.json: not"):
        read_catalogue(tmp_path / "catalogue.json")


@pytest.mark.parametrize("name", ["../ml", "/ml", ".ml", "a/b", "a\\b", "", "a\n"])
def test_the_catalogue_names_no_path(name):
    for changes in ({"name": name}, {"file": name}):
        with pytest.raises(ValueError, match="names of files"):
            entry_of(GOOD, **changes)


def invoke(*arguments):
    return CliRunner().invoke(main, ["fetch", *map(str, arguments)])


def test_the_command_lists_suggests_and_instructs(tmp_path):
    listed = run_cli("fetch", cwd=tmp_path).stdout
    assert len(listed.splitlines()) == 1 + len(read_catalogue(catalogue.CATALOGUE)) and "1,000,209" in listed
    result = invoke("ml1m")
    assert result.exit_code == 1 and "did you mean 'ml-1m'?" in result.output
    result = invoke("yelp", "--out", tmp_path / "new")
    assert result.exit_code == 1 and "yelp_academic_dataset_review.json into" in result.output
    assert not (tmp_path / "new").exists()


def test_the_command_fetches_counts_and_names_the_next(serve, tmp_path, monkeypatch):
    entry = entry_of(GOOD, serve(cut(), whole()).url)
    counts = {"users": 40, "items": 50, "interactions": 2000, "from": "us"}
    entry = replace(entry, counts=counts | {"items": 51}, k_core=counts | {"k": 5})
    monkeypatch.setattr(catalogue, "read_catalogue", lambda path: {"ml": entry})
    result = invoke("ml", "--out", tmp_path / "in")
    assert result.exit_code == 0, result.output
    assert "40 users, 50 items, 2,000 interactions; NOT the published 40 users, 51 items" in result.output
    assert "with --k-core 5: 40 users, 50 items, 2,000 interactions: as published (us)" in result.output
    assert (
        "ml.csv: ml.zip, read as csv (tab): column 1, column 2, column 4 (not used: column 3); 2,000" in result.output
    )
    assert "broke after 1,000" in result.output and f"--data {tmp_path}/in/ml.csv --k-core 5" in result.output
    again = invoke("ml", "--out", tmp_path / "in").output
    assert "ml.csv is there already" in again and "ml.csv: read as csv (comma): user, item" in again


def test_the_command_tells_a_hostile_server_in_one_line(serve, tmp_path, monkeypatch):
    entry = entry_of(GOOD, serve(lambda handler: handler.wfile.write(b"HTTP/1.1 404 \x1b[2J\x07evil\r\n\r\n")).url)
    monkeypatch.setattr(catalogue, "read_catalogue", lambda path: {"ml": entry})
    result = invoke("ml", "--out", tmp_path / "in")
    assert result.exit_code == 1 and "\x1b" not in result.output and result.output.count("\n") == 2
    assert result.output.splitlines()[1].startswith("Error: http://127.0.0.1")
