"""Files: written so that no crash can damage them, read so that no content can do harm.

A file is written under another name, synced and renamed: there is the old one or the new one, never half of one. What
is read is data, perhaps a stranger's: nothing is unpickled, a link or a pipe instead of a file is refused, and sizes
are checked before memory of that size is taken.
"""

import base64
import contextlib
import hashlib
import json
import math
import os
import shutil
import stat
import zipfile
from pathlib import Path

import numpy as np

from minirec.errors import UserError, did_you_mean

LARGEST_JSON = 1 << 26  # bytes
LONGEST_NAME = 60  # characters that a message shows of a name, or a folder's name holds of a log's
FEW = 3  # names that a message shows of many


# In messages


@contextlib.contextmanager
def naming(path, failure, hint=""):
    """Raise a UserError that names the path where the system refuses something: "PATH: cannot be read (why)"."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {failure} ({error.strerror or error}){hint}") from None


def few(names):
    """Return a list of names as text: the first ones, long ones cut, then how many more there are."""
    shown = ", ".join(repr(name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME] + "...") for name in names[:FEW])
    return shown + (f" and {len(names) - FEW:,} more" if len(names) > FEW else "")


# Writing


def write(path, fill):
    """Write the file that a person named, by fill(file), and return what that returns.

    Where the path is a link, its target is replaced; a device or a pipe is written into.
    """
    if not is_device(path):
        return replace(Path(os.path.realpath(path)), fill)
    with naming(path, "cannot be written"), open(path, "wb") as file:
        return fill(file)


def replace(path, fill, previous=None):
    """Write a file by fill(file), and return what that returns. Whatever happens, the file is whole: old or new.

    previous: the path to which the old file is copied first. Raises UserError where it cannot be written, where the
    path is a link (it could lead anywhere) or anything else but a file, or where another process is writing it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with naming(path, "cannot be written"):
        check_regular(path)
        if temporary.is_file() and not temporary.is_symlink():  # of a process that was killed, or is at work
            with locked(temporary):
                temporary.unlink()
        temporary.unlink(missing_ok=True)
        file = open(temporary, "xb")  # x: never into what a stranger's link points to
        try:
            with file, locked(temporary):
                result = fill(file)
                file.flush()
                os.fsync(file.fileno())
            if previous and path.exists():
                with open(path, "rb") as old:
                    replace(previous, lambda copy: shutil.copyfileobj(old, copy))
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return result


def write_json(path, value):
    """Write a JSON file; NaN and infinity are refused."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    replace(path, lambda file: file.write(text.encode()))


def write_json_lines(path, values):
    """Write a file of one JSON object a line."""
    text = "".join(json.dumps(value, allow_nan=False) + "\n" for value in values)
    replace(path, lambda file: file.write(text.encode()))


def self_contained(template, data):
    """Return a page of one file that loads nothing, as UTF-8.

    In the template, DATA-HERE becomes the data as JSON, with <, > and & escaped, so that no name in it is markup.
    SCRIPT-HASH becomes the hash of the one script that the page's policy lets run.
    """
    script = template.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    before, after = template.replace("SCRIPT-HASH", f"sha256-{digest}").split("DATA-HERE")
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))  # pure ASCII
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return (before + text + after).encode()


def write_arrays(path, arrays, previous=None):
    """Write {name: array} as an npz file; previous: see replace."""
    replace(path, lambda file: np.savez(file, **arrays), previous)


# Reading


def check_regular(path):
    """Raise UserError where something else than a regular file is in a file's place."""
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise UserError(f"{path}: a regular file belongs here, not a link, a folder or a device")


def is_device(path):
    """Whether a path leads to something that holds no fixed bytes: a device, a pipe or a socket."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


@contextlib.contextmanager
def opened(path, largest=None):
    """Open a regular file to read its bytes; largest: how many it may have. Raises UserError."""
    guards = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # neither led away nor kept waiting
    with naming(path, "cannot be read"):
        check_regular(path)
        with open(path, "rb", opener=lambda path, flags: os.open(path, flags | guards)) as file:
            size = os.fstat(file.fileno()).st_size
            if largest is not None and size > largest:
                raise UserError(f"{path}: {size:,} bytes long, where at most {largest:,} make sense")
            yield file


@contextlib.contextmanager
def opened_by_name(path, hint=""):
    """Open a file that a person named, to read its bytes; a link to one will do. Raises UserError.

    hint: what is added where it cannot be read; else a file of nearly that name is.
    """
    if not hint and not os.path.lexists(path):
        folder, name = os.path.split(path)
        with contextlib.suppress(OSError):  # there may be no such folder
            hint = did_you_mean(name, os.listdir(folder or "."))
    with naming(path, "cannot be read", hint):
        if is_device(path):
            raise UserError(f"{path}: not a regular file; save it as one")
        with open(path, "rb") as file:
            yield file


def read_json(path, largest=LARGEST_JSON, parse=json.loads):
    """Read a JSON file; largest: see opened; parse: what makes the value of its text."""
    with opened(path, largest) as file:
        try:
            return parse(file.read().decode())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not valid JSON ({error})") from None


def read_json_lines(path):
    """Read a file of one JSON object a line; a missing file is an empty one."""
    if not os.path.lexists(path):
        return []
    return read_json(path, parse=lambda text: [json.loads(line) for line in text.splitlines()])


def read_arrays(path, expected=None):
    """Read an npz file as {name: array}; expected: {name: kind(...)} of all that it must hold (None: anything).

    At first only the headers of the arrays are read. What they announce must be what is expected, and must lie in the
    file, byte for byte, so that no array takes more memory than the file is long. Raises UserError.
    """
    with opened(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
                if sum(member.file_size for member in archive.infolist()) > os.fstat(file.fileno()).st_size:
                    raise ValueError("it announces more than it holds")
                headers = {name: _read_header(archive, member) for name, member in members.items()}
                expected = expected or headers
                for name in sorted(headers | expected):
                    found, wanted = headers.get(name, "missing"), expected.get(name, "no array")
                    if found != wanted:
                        raise UserError(f"{path}: damaged, or of another version: {name} is {found}, expected {wanted}")
                arrays = {}
                for name, member in members.items():
                    with archive.open(member) as array:
                        arrays[name] = np.lib.format.read_array(array, allow_pickle=False)
                return arrays
        except (UserError, MemoryError):
            raise
        except Exception as error:  # a damaged zip raises errors of many kinds
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"{path}: not a readable npz file ({reason})") from None


def kind(dtype, shape):
    """Return what an array is, as text: "float32 (200, 64)"."""
    return f"{dtype} {shape}"


def _read_header(archive, member):
    """Return the kind of an array in an npz file. Raises ValueError where its bytes cannot be of that kind."""
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{member.filename} is compressed")
    with archive.open(member) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{member.filename} is of another version of the npy format")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        size = dtype.itemsize * math.prod(shape)
        if dtype.hasobject or min(shape, default=0) < 0 or size != member.file_size - file.tell():
            raise ValueError(f"{member.filename} is not what its header says")
    return kind(dtype, shape)


# Folders


def fingerprint(path, hint=""):
    """Return the SHA-256 of a file that a person named; hint: see opened_by_name."""
    with opened_by_name(path, hint) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(folder):
    """Create a folder where there is none."""
    with naming(folder, "cannot be made a folder"):
        folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def locked(folder):
    """Hold a folder for as long as the context lasts; yield the handle that does. Raises UserError where another
    process holds it."""
    try:
        import fcntl
    except ImportError:  # Windows has no flock; one process at a time is then up to the user
        yield None
        return
    with naming(folder, "cannot be opened"):
        handle = os.open(folder, os.O_RDONLY)  # a lock on the folder itself leaves no file behind
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"{folder}: in use by another process; wait for it, or choose another --out") from None
    except OSError:
        pass  # some network file systems know no locks
    try:
        yield handle
    finally:
        os.close(handle)
