"""Recommending for many users at a time: everyone gets their own list, however the work is cut."""

import csv
import importlib

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ROOT

from minirec import evaluate


@pytest.fixture(scope="module")
def cli():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        yield importlib.import_module("cli")


def call(cli, *arguments, status=0):
    """Call a command in this process; return what click's runner says of it."""
    result = CliRunner().invoke(cli.main, [str(a) for a in arguments])
    assert result.exit_code == status, result.output
    return result


def write_lines(path, histories):
    path.write_text("".join(f"{user} {' '.join(items)}\n" for user, items in histories.items()))
    return path


@pytest.fixture(scope="module")
def histories():
    """71 users of 40 items: ten chunks of 7 and a remainder of one."""
    rng = np.random.default_rng(0)
    return {f"u{u}": [f"i{i}" for i in rng.integers(40, size=rng.integers(3, 12))] for u in range(71)}


@pytest.fixture(scope="module")
def run(cli, histories, tmp_path_factory):
    """The folder of a small run trained on these histories."""
    folder = tmp_path_factory.mktemp("small")
    log = write_lines(folder / "log.txt", histories)
    call(cli, "train", "--data", log, "--epochs", 1, "--hidden", 8, "--workers", 1, "--out", folder / "run")
    return folder / "run"


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(evaluate, "chunk_rows", lambda *_: 7)


def exported(path):
    """An export as {user: [(item, score), ...]}, its ranks checked."""
    found = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            ranking = found.setdefault(row["user"], [])
            ranking.append((row["item"], float(row["score"])))
            assert int(row["rank"]) == len(ranking)
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_an_export_over_many_chunks_gives_everyone_what_recommend_user_gives(
    cli, run, histories, small_chunks, tmp_path, workers
):
    result = call(cli, "recommend", run, "--all", "--top", 5, "--out", tmp_path / "all.csv", "--workers", workers)
    found = exported(tmp_path / "all.csv")
    assert list(found) == list(histories) and f"{len(histories)} users" in result.stderr
    for user in histories:
        lines = call(cli, "recommend", run, "--user", user, "--top", 5).stdout.splitlines()
        alone = [(item, float(score)) for _, item, score in map(str.split, lines)]
        assert [item for item, _ in found[user]] == [item for item, _ in alone]
        assert [score for _, score in found[user]] == pytest.approx([score for _, score in alone], abs=1e-3)
