"""The training loop and its run folder: same bits again, stopped, killed and resumed; nothing half-written."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from minirec import data, evaluate, runs
from minirec.errors import UserError
from minirec.loss import LOSSES
from minirec.model import Config, init_parameters
from minirec.train import best, check_finite, finished, train

FILES = sorted(runs.FILES)


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
    training |= {"backend": "numpy", "workers": 1}
    source = {"path": "?", "sha256": log.sha256(), "format": None, "columns": None}
    source |= {"split": "leave-one-out", "k_core": 1, "drop_repeats": False}
    return log, {"data": source, "model": asdict(config), "training": training}


def content(folder):
    """Everything in a run folder but the seconds that it took."""
    assert sorted(f.name for f in folder.iterdir()) == FILES
    arrays = {f"{n}/{k}": v for n in ("checkpoint", "state") for k, v in runs.read_arrays(folder / f"{n}.npz").items()}
    del arrays["state/seconds"]
    records = runs.read_json_lines(folder / "metrics.jsonl")
    return {name: value.tobytes() for name, value in arrays.items()}, [r | {"train_seconds": 0} for r in records]


def test_a_run_leaves_what_the_contract_says(small, tmp_path):
    log, settings = small
    records, complete = train(log, settings, tmp_path / "run")
    assert complete and len(records) == 3
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == FILES
    assert json.loads((tmp_path / "run/items.json").read_text()) == log.items
    assert records == runs.read_json_lines(tmp_path / "run/metrics.jsonl")
    n_steps = math.ceil(len(data.training_windows(log, data.leave_one_out(log), 6)[0]) / 16)
    for epoch, record in enumerate(records, 1):
        assert record["epoch"] == epoch and record["steps"] == n_steps
        assert record["loss"] > 0 and record["train_seconds"] > 0 and 0 <= record["NDCG@10"] <= 1


def test_the_checkpoint_is_the_best_on_validation(small, tmp_path):
    log, settings = small
    records, _ = train(log, settings, tmp_path / "run")
    config = runs.model_config(settings)
    parameters = runs.load_parameters(tmp_path / "run", config)
    ranks = evaluate.rank_targets(parameters, config, log.sequence, data.leave_one_out(log).valid)
    found = evaluate.metrics(np.concatenate(list(ranks)))
    assert found["NDCG@10"] == best(records)["NDCG@10"]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_same_seed_gives_the_same_bits_with_any_number_of_workers(small, tmp_path, loss):
    log, settings = small
    settings["training"]["loss"] = loss
    for name, workers in (("one", 1), ("again", 1), ("two", 2)):
        settings["training"]["workers"] = workers
        train(log, settings, tmp_path / name)
    assert content(tmp_path / "one") == content(tmp_path / "again") == content(tmp_path / "two")


@pytest.mark.parametrize("stop_after", [1, 3, 4, 6])
def test_stopped_after_any_step_and_resumed_gives_the_same_bits(small, tmp_path, stop_after):
    log, settings = small
    train(log, settings, tmp_path / "whole")
    steps = []
    _, complete = train(
        log, settings, tmp_path / "run", on_step=lambda *_: steps.append(1), stop=lambda: len(steps) >= stop_after
    )
    assert not complete and len(steps) == stop_after
    assert "checkpoint.npz" in [f.name for f in (tmp_path / "run").iterdir()]
    train(log, settings, tmp_path / "run", resume=True)
    assert content(tmp_path / "run") == content(tmp_path / "whole")


@pytest.mark.parametrize("stage", ["checkpoint.npz", "metrics.jsonl", "state.npz"])
@pytest.mark.parametrize("moment", ["before", "half", "after"])
def test_killed_around_any_write_and_resumed_gives_the_same_bits(small, tmp_path, monkeypatch, stage, moment):
    log, settings = small
    train(log, settings, tmp_path / "whole")
    real_write, count = runs.write, []

    class Killed(BaseException):
        pass

    def write(path, fill):
        if path.name == stage:
            count.append(1)
            if len(count) == 2:  # the second time, so that there is something to lose
                if moment == "half":
                    path.with_name(f".{path.name}.tmp").write_bytes(b"half of")
                if moment == "after":
                    real_write(path, fill)
                raise Killed
        real_write(path, fill)

    monkeypatch.setattr(runs, "write", write)
    with pytest.raises(Killed):
        train(log, settings, tmp_path / "run")
    monkeypatch.setattr(runs, "write", real_write)
    train(log, settings, tmp_path / "run", resume=True)
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


def test_a_folder_that_holds_something_else_is_left_alone(small, tmp_path):
    log, settings = small
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="thesis.tex"):
        train(log, settings, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_truncated_state_is_named(small, tmp_path):
    log, settings = small
    train(log, settings, tmp_path / "run")
    state = tmp_path / "run/state.npz"
    state.write_bytes(state.read_bytes()[:-200])
    with pytest.raises(UserError, match="state.npz"):
        train(log, settings, tmp_path / "run", resume=True)


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


def test_nothing_to_train_on_leaves_no_folder(small, tmp_path):
    _, settings = small
    log = data.Log(["a", "b"], ["x", "y"], np.array([0, 3, 6]), np.array([0, 1, 0, 1, 0, 1], np.int32))
    with pytest.raises(UserError, match="nothing to train on"):
        train(log, settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_names_its_step():
    with pytest.raises(UserError, match="nan at step 13 .lr 0.1, seed 0.*--lr"):
        check_finite(np.array([1.0, 2.0, np.nan, np.nan]), 10, {"lr": 0.1, "seed": 0})


def test_a_checkpoint_is_verified_against_the_settings(small, tmp_path):
    _, settings = small
    config = runs.model_config(settings)
    good = init_parameters(config, 0)
    broken = {
        "missing": {k: v for k, v in good.items() if k != "item_embedding"},
        "no parameter": good | {"extra": np.zeros(3)},
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
    runs.write_arrays(tmp_path / "checkpoint.npz", good)
    assert list(runs.load_parameters(tmp_path, config)) == list(good)
