"""The training loop and its run folder: same bits again, stopped, killed and resumed; nothing half-written."""

import itertools
import json
import math
import multiprocessing
import os
import pickle
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import log_of
from threadpoolctl import threadpool_limits

from minirec import files
from minirec.data import log as data
from minirec.data.split import leave_one_out, training_windows
from minirec.errors import UserError
from minirec.loss import LOSSES
from minirec.model import Config, encode, init_parameters
from minirec.training import ranking, runs
from minirec.training.fit import train
from minirec.training.mpi import Ranks
from minirec.training.parallel import Team
from minirec.training.progress import best, finished

FILES = sorted(set(runs.FILES) - {runs.LOG})
DEAD = 77  # an exit status


@pytest.fixture
def small():
    """A log of 60 users who count upwards from somewhere, and settings for three epochs of four steps."""
    rng = np.random.default_rng(0)
    sequences = [(rng.integers(20) + np.arange(n)) % 20 for n in rng.integers(2, 12, 60)]
    log = data.Log(
        [f"u{i}" for i in range(60)],
        [f"i{i}" for i in range(20)],
        np.cumsum([0] + [len(s) for s in sequences]),
        np.concatenate(sequences).astype(np.int32),
    )
    config = Config(20, hidden_size=8, max_length=6)
    training = {"loss": "ce", "negatives": 7, "epochs": 3, "batch_size": 16, "lr": 0.01, "patience": 10, "seed": 1}
    training |= {"backend": "numpy", "workers": 1, "filter_seen": True}
    source = {"path": "?", "sha256": log.sha256(), "format": None, "columns": None}
    source |= {"split": "leave-one-out", "k_core": 1, "drop_repeats": False}
    return log, {"data": source, "model": asdict(config), "training": training}


def content(folder):
    """Everything in a run folder but the seconds that it took, and the state before the last."""
    assert sorted(f.name for f in folder.iterdir()) == FILES
    records = [r | {"train_seconds": 0} for r in files.read_json_lines(folder / "metrics.jsonl")]
    return state_of(folder, "checkpoint.npz"), state_of(folder), records


def state_of(folder, name="state.npz"):
    """The arrays of a file as bytes, but for the seconds."""
    return {name: value.tobytes() for name, value in files.read_arrays(folder / name).items() if name != "seconds"}


def test_a_run_leaves_what_the_contract_says(small, tmp_path):
    log, settings = small
    records, complete, _ = train(log, settings, tmp_path / "run")
    assert complete and len(records) == 3
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == FILES
    assert json.loads((tmp_path / "run/items.json").read_text()) == log.items
    assert records == files.read_json_lines(tmp_path / "run/metrics.jsonl")
    n_steps = math.ceil(len(training_windows(log, leave_one_out(log), 6)[0]) / 16)
    for epoch, record in enumerate(records, 1):
        assert record["epoch"] == epoch and record["steps"] == n_steps
        assert record["loss"] > 0 and record["train_seconds"] > 0 and 0 <= record["NDCG@10"] <= 1


def test_the_checkpoint_is_the_best_on_validation(small, tmp_path):
    log, settings = small
    records, *_ = train(log, settings, tmp_path / "run")
    config = runs.model_config(settings)
    parameters = runs.load_parameters(tmp_path / "run", config)
    ranks = ranking.rank_targets(parameters, config, log.sequence, leave_one_out(log).valid)
    found = ranking.metrics(np.concatenate(list(ranks)))
    assert found["NDCG@10"] == best(records)["NDCG@10"]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_same_seed_gives_the_same_bits_with_any_number_of_workers(small, tmp_path, loss):
    log, settings = small
    settings["training"]["loss"] = loss
    for name, workers in (("one", 1), ("again", 1), ("two", 2)):
        settings["training"]["workers"] = workers
        train(log, settings, tmp_path / name)
    assert content(tmp_path / "one") == content(tmp_path / "again") == content(tmp_path / "two")


def test_a_negative_is_an_item_that_its_own_user_was_not_trained_on(small, tmp_path):
    """User u has had all items but item u, which is therefore the negative of each position."""
    _, settings = small
    rng = np.random.default_rng(0)
    others = [rng.permutation([item for item in range(8) if item != user]) for user in range(8)]
    again = [rng.choice(items, 1 + user % 4) for user, items in enumerate(others)]  # so that the lengths differ
    log = log_of([[*a, *b, user, user] for user, (a, b) in enumerate(zip(others, again, strict=True))])
    config = Config(8, hidden_size=8, max_length=8, dropout=0)
    settings |= {"model": asdict(config)}
    settings["training"] |= {"loss": "bce", "epochs": 1, "batch_size": 8}  # one step
    (record,), *_ = train(log, settings, tmp_path / "run")
    parameters, losses = init_parameters(config, 1, np.float64), []
    for user in range(8):
        trained = log.history(user)[:-2]
        (x,) = encode(parameters, config, [trained[:-1]])
        for row, target in zip(x, trained[1:][-8:], strict=True):
            positive, negative = parameters["item_embedding"][[target, user]] @ row
            losses.append(math.log(1 + math.exp(-positive)) + math.log(1 + math.exp(negative)))
    assert record["loss"] == pytest.approx(np.mean(losses), rel=1e-6)


@pytest.mark.parametrize("stop_after", [None, 1, 4, 6])
def test_the_seconds_of_an_epoch_are_those_of_its_steps(small, tmp_path, monkeypatch, stop_after):
    log, settings = small
    clock, steps = [0.0], []

    def slow(call, seconds):
        def wrapped(*arguments, **options):
            clock[0] += seconds
            return call(*arguments, **options)

        return wrapped

    monkeypatch.setattr("minirec.training.fit.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(Team, "compute_gradients", slow(Team.compute_gradients, 2))
    monkeypatch.setattr(Team, "update", slow(Team.update, 0.5))
    monkeypatch.setattr("minirec.training.progress.rank_targets", slow(ranking.rank_targets, 100))
    stop = stop_after and (lambda: len(steps) >= stop_after)
    train(log, settings, tmp_path / "run", on_step=lambda *_: steps.append(1), stop=stop)
    records, *_ = train(log, settings, tmp_path / "run", resume=True)
    assert [record["train_seconds"] for record in records] == [2.5 * record["steps"] for record in records]
    assert len(records) == 3 and len(steps) == (stop_after or 3 * records[0]["steps"])


@pytest.mark.parametrize("stop_after", [1, 3, 4, 6])
def test_stopped_after_any_step_and_resumed_gives_the_same_bits(small, tmp_path, stop_after):
    log, settings = small
    train(log, settings, tmp_path / "whole")
    steps = []
    _, complete, _ = train(
        log, settings, tmp_path / "run", on_step=lambda *_: steps.append(1), stop=lambda: len(steps) >= stop_after
    )
    assert not complete and len(steps) == stop_after
    assert "checkpoint.npz" in [f.name for f in (tmp_path / "run").iterdir()]
    train(log, settings, tmp_path / "run", resume=True)
    assert content(tmp_path / "run") == content(tmp_path / "whole")


@pytest.mark.parametrize("epochs, patience, last_step", [(3, 10, 12), (9, 1, None)])
def test_asked_to_stop_at_the_end_of_the_last_epoch_training_is_complete(small, tmp_path, epochs, patience, last_step):
    log, settings = small
    settings["training"] |= {"epochs": epochs, "patience": patience}
    whole, *_ = train(log, settings, tmp_path / "whole")
    assert last_step or len(whole) < epochs  # out of patience
    steps, last_step = [], last_step or 4 * len(whole)
    records, complete, _ = train(
        log, settings, tmp_path / "run", on_step=lambda *_: steps.append(1), stop=lambda: len(steps) >= last_step
    )
    assert complete and len(records) == len(whole)
    assert content(tmp_path / "run") == content(tmp_path / "whole")


class Threads:
    """A communicator among threads: as much of MPI as workers.Ranks uses."""

    def __init__(self, rank, values, barrier):
        self.rank, self.size, self.values, self.barrier = rank, len(values), values, barrier

    def allgather(self, value):
        self.values[self.rank] = pickle.dumps(value)
        self.barrier.wait()
        found = [pickle.loads(value) for value in self.values]
        self.barrier.wait()
        return found

    def bcast(self, value):
        return self.allgather(value)[0]

    def Allreduce(self, _, x):
        x[...] = sum(self.allgather(x))


def train_over_ranks(n, log, settings, folder, stop_after=None):
    """Train over n ranks, which are threads here; each of them stops after so many steps."""
    values, barrier = [None] * n, threading.Barrier(n)

    def train_rank(rank):
        steps = []
        stop = stop_after and (lambda: len(steps) >= stop_after)
        try:
            ranks = Ranks(Threads(rank, values, barrier))
            return train(log, settings, folder, True, lambda *_: steps.append(1), stop=stop, ranks=ranks)
        except BaseException:
            barrier.abort()  # the others would wait for this one
            raise

    with threadpool_limits(1, "blas"), ThreadPoolExecutor(n) as pool:
        return list(pool.map(train_rank, range(n)))


@pytest.mark.parametrize("n_before, n_after", [(1, 2), (1, 3), (2, 1), (2, 2), (3, 2)])
def test_stopped_in_mid_epoch_and_resumed_over_ranks_records_the_loss_of_an_unbroken_run(
    small, tmp_path, monkeypatch, n_before, n_after
):
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=SimpleNamespace(IN_PLACE=None)))
    log, settings = small
    whole, *_ = train(log, settings, tmp_path / "whole")
    stopped = train_over_ranks(n_before, log, settings, tmp_path / "run", stop_after=6)
    assert [complete for _, complete, _ in stopped] == [False] * n_before
    state = files.read_arrays(tmp_path / "run/state.npz")
    assert state["step"] == 6 and whole[0]["steps"] == 4
    resumed = train_over_ranks(n_after, log, settings, tmp_path / "run")
    for records, complete, _ in resumed:
        assert complete
        assert [record["loss"] for record in records] == pytest.approx([record["loss"] for record in whole], rel=1e-6)
    assert [r["loss"] for r in files.read_json_lines(tmp_path / "run/metrics.jsonl")] == [r["loss"] for r in records]
    losses = [files.read_arrays(tmp_path / name / "state.npz")["losses"] for name in ("run", "whole")]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def die_at_call(n, log, settings, folder):
    """A process of its own: train, and die without a word at the n-th call that changes what is on disk."""
    calls = itertools.count(1)

    def dying(call):
        def wrapped(*arguments, **options):
            if next(calls) == n:
                os._exit(DEAD)
            return call(*arguments, **options)

        return wrapped

    for name in ("fsync", "replace"):
        setattr(os, name, dying(getattr(os, name)))
    train(log, settings, folder)


@pytest.mark.skipif(sys.platform != "linux", reason="needs processes that can be forked")
def test_killed_at_any_call_that_changes_the_disk_and_resumed_gives_the_same_bits(small, tmp_path):
    log, settings = small
    settings["training"] |= {"epochs": 2, "batch_size": 60}
    train(log, settings, tmp_path / "whole")
    for n in itertools.count(1):
        folder = tmp_path / f"run-{n}"
        process = multiprocessing.get_context("fork").Process(target=die_at_call, args=(n, log, settings, folder))
        process.start()
        process.join()
        if process.exitcode == 0:  # there are fewer calls
            break
        assert process.exitcode == DEAD
        train(log, settings, folder, resume=True)
        assert content(folder) == content(tmp_path / "whole"), n
        assert state_of(folder, "state.previous.npz") == state_of(tmp_path / "whole", "state.previous.npz"), n
    assert n > 3 * 2 + 4 * 2  # an epoch syncs and renames three files, and the second one a copy of the state too


def test_an_epoch_that_was_recorded_is_not_taken_back(small, tmp_path):
    """Its parameters may be the checkpoint already: the run repeats it, and goes on with no fewer epochs."""
    log, settings = small
    train(log, settings, tmp_path / "whole")
    assert best(files.read_json_lines(tmp_path / "whole/metrics.jsonl"))["epoch"] == 3
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    (tmp_path / "run/state.previous.npz").replace(tmp_path / "run/state.npz")
    fewer = settings | {"training": settings["training"] | {"epochs": 2}}
    for folder in ("run", "whole"):
        with pytest.raises(UserError, match="ran for 3 epochs, longer than --epochs"):
            train(log, fewer, tmp_path / folder, resume=True)
    records, complete, _ = train(log, settings, tmp_path / "run", resume=True)
    assert complete and len(records) == 3
    assert content(tmp_path / "run") == content(tmp_path / "whole")


def test_more_epochs_go_on_from_the_end(small, tmp_path):
    log, settings = small
    train(log, settings, tmp_path / "whole")
    settings["training"]["epochs"] = 2
    train(log, settings, tmp_path / "run")
    settings["training"]["epochs"] = 3
    train(log, settings, tmp_path / "run", resume=True)
    assert content(tmp_path / "run") == content(tmp_path / "whole")


def test_a_run_stops_when_patience_is_out():
    records = [{"epoch": e, "NDCG@10": s} for e, s in enumerate([0.1, 0.3, 0.2, 0.3], 1)]
    assert best(records)["epoch"] == 2
    assert not finished(records[:3], {"epochs": 9, "patience": 2})
    assert finished(records, {"epochs": 9, "patience": 2})
    assert finished(records, {"epochs": 4, "patience": 9})
    assert not finished([], {"epochs": 1, "patience": 1})


def test_an_existing_run_needs_resume_and_is_left_as_it_was(small, tmp_path):
    log, settings = small
    train(log, settings, tmp_path / "run")
    before = content(tmp_path / "run")
    with pytest.raises(UserError, match="--resume"):
        train(log, settings, tmp_path / "run")
    settings["training"]["lr"] = 0.02
    with pytest.raises(UserError, match="lr 0.01, not 0.02"):
        train(log, settings, tmp_path / "run", resume=True)
    assert content(tmp_path / "run") == before


def test_a_folder_in_use_is_refused(small, tmp_path):
    log, settings = small
    with runs.opened(tmp_path / "run", resume=False), pytest.raises(UserError, match="in use"):
        train(log, settings, tmp_path / "run")


@pytest.mark.parametrize("name", ["thesis.tex", "items.json"])
def test_a_folder_that_holds_something_else_is_left_alone(small, tmp_path, name):
    log, settings = small
    (tmp_path / name).write_text("years of work")
    with pytest.raises(UserError, match=f"holds {name} and no run"):
        train(log, settings, tmp_path)
    assert [f.read_text() for f in tmp_path.iterdir()] == ["years of work"]


def rewrite(path, **changes):
    """Write an npz file again with some arrays changed, or left out where they are None."""
    arrays = files.read_arrays(path) | changes
    files.write_arrays(path, {name: value for name, value in arrays.items() if value is not None})


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in the moments
    path.write_bytes(content)


REFUSED = {  # what may have become of state.npz, and how it is named
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 200), "not a readable npz"),
    "empty": (lambda path: os.truncate(path, 0), "not a readable npz"),
    "flipped bits": (flip_a_bit, "not a readable npz"),
    "gone": (lambda path: path.unlink(), "No such file"),
    "an older version": (lambda path: rewrite(path, version=None, settings=None), "another version"),
    "a newer version": (lambda path: rewrite(path, version=np.int64(3)), "another version"),
    "a strange version": (lambda path: rewrite(path, version=np.array([{}], object).astype(str)), "another version"),
    "other settings": (lambda path: rewrite(path, settings=np.str_("0" * 64)), "other settings"),
    "other arrays": (lambda path: rewrite(path, losses=np.zeros(3)), "damaged"),
    "an array too many": (lambda path: rewrite(path, extra=np.zeros(3)), "damaged"),
    "no time": (lambda path: rewrite(path, seconds=np.float64("nan")), "damaged: step 12, nan seconds"),
}


@pytest.mark.parametrize("damage, named", REFUSED.values(), ids=REFUSED)
def test_a_state_that_will_not_do_is_named_and_the_one_before_goes_on_to_the_same_bits(small, tmp_path, damage, named):
    log, settings = small
    train(log, settings, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    damage(tmp_path / "run/state.npz")
    with pytest.warns(UserWarning, match=f"state.npz: .*{named}.*; going on from state.previous.npz"):
        records, complete, _ = train(log, settings, tmp_path / "run", resume=True)
    assert complete and len(records) == 3
    assert content(tmp_path / "run") == content(tmp_path / "whole")
    assert state_of(tmp_path / "run", "state.previous.npz") == state_of(tmp_path / "whole", "state.previous.npz")


def test_without_a_good_state_nothing_is_changed(small, tmp_path):
    log, settings = small
    train(log, settings, tmp_path / "run")
    os.truncate(tmp_path / "run/state.npz", 99)
    rewrite(tmp_path / "run/state.previous.npz", version=None)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "run").iterdir()}
    for epochs in (3, 5):
        settings["training"]["epochs"] = epochs
        with pytest.raises(UserError, match="state.npz: not.*state.previous.npz: .*another version.*another --out"):
            train(log, settings, tmp_path / "run", resume=True)
        assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "run").iterdir()}


def test_a_state_that_will_not_do_never_takes_the_place_of_the_one_before(small, tmp_path, monkeypatch):
    log, settings = small
    train(log, settings, tmp_path / "run")
    good = state_of(tmp_path / "run", "state.previous.npz")
    os.truncate(tmp_path / "run/state.npz", 99)
    settings["training"]["epochs"] = 9
    with pytest.warns(UserWarning, match="going on"):
        train(log, settings, tmp_path / "run", resume=True, stop=lambda: True)  # after one step, with its state saved
    assert state_of(tmp_path / "run", "state.previous.npz") == good != state_of(tmp_path / "run")
    train(log, settings, tmp_path / "run", resume=True)
    assert len(files.read_json_lines(tmp_path / "run/metrics.jsonl")) == 9


def test_a_folder_without_a_state_is_started_afresh_and_keeps_nothing_of_another_run(small, tmp_path):
    log, settings = small
    train(log, settings, tmp_path / "whole")
    settings["training"] |= {"seed": 5, "epochs": 4}
    train(log, settings, tmp_path / "run")
    for name in runs.STATES:
        (tmp_path / "run" / name).unlink()
    settings["training"] |= {"seed": 1, "epochs": 3}
    steps = []
    train(log, settings, tmp_path / "run", on_step=lambda *_: steps.append(sorted(os.listdir(tmp_path / "run"))))
    assert steps[0] == ["config.json", "items.json"]
    assert content(tmp_path / "run") == content(tmp_path / "whole")


def test_settings_are_the_same_however_they_are_written(small, tmp_path):
    log, settings = small
    settings["model"] |= {"attn": ("softmax", "uniform"), "dropout": 0}
    settings["training"] |= {"lr": 1, "epochs": 1}
    train(log, settings, tmp_path / "run")
    again = json.loads((tmp_path / "run/config.json").read_text())
    again["training"] |= {"lr": 1.0, "epochs": 2, "patience": 3, "workers": 2}
    again["model"]["dropout"] = 0.0
    records, *_ = train(log, again, tmp_path / "run", resume=True)
    assert len(records) == 2


@pytest.mark.parametrize("records", [None, '{"epoch": 1}\n', "1\n2\n3\n"])
def test_missing_or_foreign_records_are_refused(small, tmp_path, records):
    log, settings = small
    train(log, settings, tmp_path / "run")
    path = tmp_path / "run/metrics.jsonl"
    path.unlink() if records is None else path.write_text(records)
    with pytest.raises(UserError, match="metrics.jsonl: epoch 1 is missing or damaged"):
        train(log, settings, tmp_path / "run", resume=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_parameters_that_are_not_finite_are_never_kept(small, tmp_path):
    log, settings = small
    settings["training"] |= {"lr": 1e300, "epochs": 1, "batch_size": 60}  # one step: its loss is still finite
    with pytest.raises(UserError, match="--lr"):
        train(log, settings, tmp_path / "run")
    assert not (tmp_path / "run/checkpoint.npz").exists()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_loss_that_is_not_finite_is_no_state_to_stop_in(small, tmp_path):
    log, settings = small
    train(log, settings | {"training": settings["training"] | {"epochs": 1}}, tmp_path / "run")
    before = (tmp_path / "run/state.npz").read_bytes()
    settings["training"]["lr"] = 1e300
    steps = []
    with pytest.raises(UserError, match="lr 0.01, not 1e.300"):
        train(log, settings, tmp_path / "run", resume=True)
    with pytest.raises(UserError, match="at step [23] .*--lr"):
        train(log, settings, tmp_path / "new", on_step=lambda *_: steps.append(1), stop=lambda: len(steps) == 3)
    assert (tmp_path / "run/state.npz").read_bytes() == before
    assert sorted(f.name for f in (tmp_path / "new").iterdir()) == ["config.json", "items.json"]


def test_a_run_that_cannot_be_started_leaves_no_folder(small, tmp_path, monkeypatch):
    log, settings = small

    def fail(*_):
        raise UserError("config.json: cannot be written (No space left on device)")

    monkeypatch.setattr(files, "write_json", fail)
    with pytest.raises(UserError, match="No space left"):
        train(log, settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", runs.FILES)
def test_a_link_in_a_run_folder_is_never_written_through(small, tmp_path, name):
    log, settings = small
    if name == runs.LOG:
        settings["data"]["path"] = runs.LOG
    train(log, settings, tmp_path / "run")
    shutil.copy(tmp_path / "run" / name, tmp_path / "precious")
    before = (tmp_path / "precious").read_bytes()
    (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / name).symlink_to(tmp_path / "precious")
    (tmp_path / "run" / f".{name}.tmp").symlink_to(tmp_path / "precious")
    settings["training"]["epochs"] = 5
    with pytest.raises(UserError, match=f"{name}: a regular file belongs here"):
        train(log, settings, tmp_path / "run", resume=True)
    (tmp_path / "run" / name).unlink()
    shutil.copy(tmp_path / "precious", tmp_path / "run" / name)
    train(log, settings, tmp_path / "run", resume=True)
    assert (tmp_path / "precious").read_bytes() == before
    assert {f.name for f in (tmp_path / "run").iterdir()} == {*FILES, name}


@pytest.mark.parametrize("length, what", [(3, "train"), (2, "validate")])
def test_nothing_to_train_or_validate_on_leaves_no_folder(small, tmp_path, length, what):
    _, settings = small
    log = data.Log(["a", "b"], ["x", "y"], length * np.arange(3), np.arange(2 * length, dtype=np.int32) % 2)
    with pytest.raises(UserError, match=f"nothing to {what} on"):
        train(log, settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_users_without_an_unseen_item_are_told_of_and_a_single_item_is_refused(small, tmp_path):
    _, settings = small
    settings["training"] |= {"loss": "bce", "epochs": 1}
    settings["model"]["n_items"] = 3
    sequence = np.array([0, 1, 2, 0, 1, 0, 1, 0, 1], np.int32)
    log = data.Log(["a", "b"], ["x", "y", "z"], np.array([0, 5, 9]), sequence)
    with pytest.warns(UserWarning, match="bce: 1 of 2 users were trained on all 3 items.*any items but the target"):
        train(log, settings, tmp_path / "run")
    settings["model"]["n_items"] = 1
    log = data.Log(["a", "b"], ["x"], np.array([0, 5, 9]), np.zeros(9, np.int32))
    with pytest.raises(UserError, match="--loss bce needs a second item.*--loss ce"):
        train(log, settings, tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_the_first_loss_that_is_not_finite_is_named_by_its_step(small, tmp_path, monkeypatch):
    log, settings = small
    compute, losses = Team.compute_gradients, iter([1.0] * 6 + [np.nan, np.inf])
    monkeypatch.setattr(Team, "compute_gradients", lambda *arguments: compute(*arguments) * 0 + next(losses))
    with pytest.raises(UserError, match="not finite at step 7 .lr 0.01, seed 1.*--lr"):  # of the second epoch's 5 to 8
        train(log, settings, tmp_path / "run")


def test_a_checkpoint_is_verified_against_the_settings(small, tmp_path):
    _, settings = small
    config = runs.model_config(settings)
    good = init_parameters(config, 0)
    broken = {
        "missing": {k: v for k, v in good.items() if k != "item_embedding"},
        "expected no array": good | {"extra": np.zeros(3)},
        r"expected float32 \(20, 8\)": good | {"item_embedding": np.zeros((20, 9), np.float32)},
        "not a readable npz": good | {"item_embedding": np.array([{}], object)},
    }
    for message, arrays in broken.items():
        np.savez(tmp_path / "checkpoint.npz", **arrays)
        with pytest.raises(UserError, match=message):
            runs.load_parameters(tmp_path, config)
    (tmp_path / "checkpoint.npz").write_bytes(b"not a zip")
    with pytest.raises(UserError, match="not a readable npz"):
        runs.load_parameters(tmp_path, config)
    files.write_arrays(tmp_path / "checkpoint.npz", good)
    assert list(runs.load_parameters(tmp_path, config)) == list(good)


def test_a_run_of_an_older_protocol_is_not_gone_on_with(tmp_path, trained):
    settings = runs.load_settings(trained)
    older = settings | {"training": {k: v for k, v in settings["training"].items() if k != "protocol"}}
    files.write_json(tmp_path / "config.json", older)
    runs.check_same(tmp_path, older)
    with pytest.raises(UserError, match="trained by an older version.*choose another --out"):
        runs.check_same(tmp_path, settings)
