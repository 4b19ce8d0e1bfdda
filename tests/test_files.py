"""Files: written whole or not at all, read without being led away, kept waiting or filled up."""

import io
import json
import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from minirec import files
from minirec.errors import UserError
from minirec.model import init_parameters
from minirec.training import runs


def array_file(*shape, dtype="<f4", content=b""):
    """The bytes of an npy file whose header announces a shape, whatever the content."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + content


def archive(path, *members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members:
            file.writestr(f"{name}.npy", content)


def lying_directory(path):
    """An npz whose directory says 4 GB of a member of 164 bytes."""
    archive(path, ("x", array_file(9, content=bytes(36))))
    content = bytearray(path.read_bytes())
    struct.pack_into("<II", content, content.rindex(b"PK\1\2") + 20, 0xFFFFFFF0, 0xFFFFFFF0)
    path.write_bytes(content)


def overlapping(path):
    """An npz whose directory names the same content a thousand times."""
    archive(path, ("x", array_file(1 << 18, content=bytes(1 << 20))))
    content = path.read_bytes()
    start = content.rindex(b"PK\1\2")
    end = content.rindex(b"PK\5\6")
    entries = content[start:end] * 1000
    tail = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 1000, 1000, len(entries), start, 0)
    path.write_bytes(content[:start] + entries + tail)


BOMBS = {
    "10^15 elements": lambda path: archive(path, ("x", array_file(10**15))),
    "a product that overflows": lambda path: archive(path, ("x", array_file(1 << 33, 1 << 33))),
    "a negative length": lambda path: archive(path, ("x", array_file(-(1 << 40), -1))),
    "large elements": lambda path: archive(path, ("x", array_file(1, dtype="|V2000000000"))),
    "a member that inflates": lambda path: archive(path, ("x", bytes(1 << 28)), compression=zipfile.ZIP_DEFLATED),
    "a small compressed one": lambda path: archive(path, ("x", os.urandom(99)), compression=zipfile.ZIP_LZMA),
    "a directory that lies": lying_directory,
    "one content a thousand times": overlapping,
    "pickled objects": lambda path: np.savez(path, x=np.array([{}], object)),
    "no npy": lambda path: archive(path, ("x", b"hello")),
    "no zip": lambda path: path.write_bytes(b"hello"),
    "nothing but a hole": lambda path: (path.touch(), os.truncate(path, 1 << 36)),
}


@pytest.mark.parametrize("make", BOMBS.values(), ids=BOMBS)
def test_an_npz_file_never_makes_more_than_it_holds(tmp_path, make):
    make(tmp_path / "x.npz")
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="x.npz: not a readable npz file"):
            files.read_arrays(tmp_path / "x.npz")
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


def test_arrays_come_back_as_they_were(tmp_path):
    arrays = {"a.b": np.arange(6.0).reshape(2, 3).T, "word": np.str_("é"), "none": np.zeros((0, 5)), "n": np.int64(3)}
    files.write_arrays(tmp_path / "x.npz", arrays)
    found = files.read_arrays(tmp_path / "x.npz")
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    found["a.b"][0, 0] = 7  # writable


def test_a_checkpoint_larger_than_its_settings_say_is_refused_by_its_header(tmp_path):
    config = runs.model_config({"model": {"n_items": 5, "hidden_size": 4}})
    parameters = init_parameters(config, 0) | {"item_embedding": np.zeros((1 << 22, 4))}
    files.write_arrays(tmp_path / "checkpoint.npz", parameters)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"item_embedding is float64 \(4194304, 4\), expected float32 \(5, 4\)"):
        runs.load_parameters(tmp_path, config)
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


IN_PLACE = {
    "a pipe": lambda path: os.mkfifo(path),
    "a link": lambda path: path.symlink_to(path.parent / "secret"),
    "a link to nowhere": lambda path: path.symlink_to(path.parent / "nowhere"),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("put", IN_PLACE.values(), ids=IN_PLACE)
def test_what_is_no_regular_file_is_neither_read_nor_written(tmp_path, put):
    (tmp_path / "secret").write_text("[1]")
    put(tmp_path / "x")
    for read in (files.read_json, files.read_json_lines, files.read_arrays):
        with pytest.raises(UserError, match="x: a regular file belongs here"):
            read(tmp_path / "x")
    with pytest.raises(UserError, match="x: a regular file belongs here"):
        files.write_json(tmp_path / "x", [2])
    assert (tmp_path / "secret").read_text() == "[1]"
    assert sorted(os.listdir(tmp_path)) == ["secret", "x"]


def test_json_is_read_no_further_than_makes_sense(tmp_path):
    (tmp_path / "x").write_text("[" + "1," * 1000 + "1]")
    assert len(files.read_json(tmp_path / "x")) == 1001
    with pytest.raises(UserError, match="2,003 bytes long, where at most 2,000"):
        files.read_json(tmp_path / "x", 2000)
    os.truncate(tmp_path / "x", files.LARGEST_JSON + 1)
    for read in (files.read_json, files.read_json_lines):
        with pytest.raises(UserError, match="at most 67,108,864"):
            read(tmp_path / "x")


@pytest.mark.parametrize("text", ["[" * 100_000, "[NaN", "\xff", "9" * 9999, "[1]\n{"])
def test_what_is_no_json_is_named(tmp_path, text):
    (tmp_path / "x").write_bytes(text.encode("latin-1"))
    for read in (files.read_json, files.read_json_lines):
        with pytest.raises(UserError, match="x: not "):
            read(tmp_path / "x")


def test_the_file_before_is_kept(tmp_path):
    for content in (b"1", b"2", b"3"):
        files.replace(tmp_path / "x", lambda file, content=content: file.write(content), tmp_path / "before")
    assert (tmp_path / "x").read_bytes() == b"3" and (tmp_path / "before").read_bytes() == b"2"
    assert sorted(os.listdir(tmp_path)) == ["before", "x"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    files.write_json(tmp_path / "x", [1])

    def fill(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="x: cannot be written .No space left on device"):
        files.replace(tmp_path / "x", fill, tmp_path / "before")
    assert json.loads((tmp_path / "x").read_text()) == [1] and os.listdir(tmp_path) == ["x"]


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="names open files")
def test_what_fill_returns_comes_back_from_a_file_and_from_what_is_none(tmp_path):
    assert files.write(tmp_path / "x", lambda file: file.write(b"12")) == 2
    reading, writing = os.pipe()
    assert files.write(f"/dev/fd/{writing}", lambda file: file.write(b"123")) == 3  # as a shell's >(command)
    assert os.read(reading, 9) == b"123"
    os.close(reading), os.close(writing)


def test_a_file_that_another_process_is_writing_is_left_alone(tmp_path):
    pytest.importorskip("fcntl")

    def fill(file):
        file.write(b"first half, ")
        with pytest.raises(UserError, match=r"x.tmp: in use by another process"):
            files.replace(tmp_path / "x", lambda other: other.write(b"other"))
        file.write(b"second half")

    files.replace(tmp_path / "x", fill)
    assert (tmp_path / "x").read_bytes() == b"first half, second half" and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize(
    "put", [lambda path: path.write_bytes(b"half"), IN_PLACE["a link"], IN_PLACE["a link to nowhere"]]
)
def test_what_a_killed_process_or_a_stranger_left_beside_is_replaced(tmp_path, put):
    (tmp_path / "secret").write_text("s")
    put(tmp_path / ".x.tmp")
    files.write_json(tmp_path / "x", [1])
    assert files.read_json(tmp_path / "x") == [1] and (tmp_path / "secret").read_text() == "s"
    assert sorted(os.listdir(tmp_path)) == ["secret", "x"]
