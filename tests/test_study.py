"""The study: its grid, what it measures of a run, what it concludes, and the regimes of the planted datasets."""

import csv
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import ROOT, last_json, log_of, run_cli

from minirec import files, packing
from minirec.cli import main
from minirec.cli.study import study_table
from minirec.data import log as data
from minirec.data import planted
from minirec.data.read import read_log
from minirec.data.split import Targets, leave_one_out, temporal
from minirec.decompose import RATIOS, decompose, summarise
from minirec.errors import UserError
from minirec.studies import grid, statistics
from minirec.training import baselines, ranking, runs
from minirec.training.fit import train

pytest.importorskip("scipy", reason="the study needs scipy")

ARMS = ("softmax", "uniform", "identity")
QUICK = ("--epochs", 2, "--seeds", 2, "--max-length", 8, *(word for attn in ARMS for word in ("--attn", attn)))


@pytest.fixture(scope="module")
def log_path(tmp_path_factory):
    """A log of 80 users of 30 items."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("logs") / "small.txt"
    path.write_text("".join(f"u{u} " + " ".join(f"i{i}" for i in rng.integers(30, size=9)) + "\n" for u in range(80)))
    return path


@pytest.fixture(scope="module")
def finished(log_path, tmp_path_factory):
    """The folder of a small study that has run, and its JSON."""
    folder = tmp_path_factory.mktemp("study")
    return folder / "out", last_json(run_cli("study", "--data", log_path, *QUICK, "--out", "out", "--json", cwd=folder))


def test_a_study_leaves_what_the_contract_says(finished):
    folder, printed = finished
    assert json.loads((folder / "study.json").read_text()) == printed
    (result,) = printed["datasets"].values()
    assert list(printed["datasets"]) == ["small"] and result["seeds"] == [0, 1]
    assert result["regime"] in ("preserving", "mixing_without_reliance", "mixing_with_reliance")
    assert result["confident"] is False  # two seeds are too few
    assert 0 < result["mixing_ratio"] < 1
    assert set(result["hedges_g"]) == set(statistics.METRICS)
    assert set(result["metrics"]) == set(ARMS)
    assert set(result["substitution"]) == {"all", "block 0", "block 1"}
    with open(folder / "study.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 2 + 2 * 3 + 2  # each run as it is and shuffled, softmax substituted, two baselines
    for name in ("rq3", "small-heatmaps", "small-ratios", "small-curves"):
        assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_the_numbers_are_those_of_evaluate_and_decompose_on_the_runs(finished):
    folder, printed = finished
    result = printed["datasets"]["small"]
    for metric in ("HR@10", "NDCG@100"):
        values = {
            (attn, put_in): [
                last_json(run_cli("evaluate", folder / f"small/{attn}-{seed}", *put_in, "--json", cwd=folder))[metric]
                for seed in (0, 1)
            ]
            for attn, put_in in (("softmax", ()), ("uniform", ()), ("softmax", ("--attn", "uniform")))
        }
        softmax, uniform, substituted = values.values()
        assert result["metrics"]["softmax"][metric]["mean"] == pytest.approx(np.mean(softmax))
        assert result["weighting"][metric]["difference"] == pytest.approx(np.mean(softmax) - np.mean(uniform))
        assert result["hedges_g"][metric] == pytest.approx(statistics.hedges_g(softmax, uniform))
        assert result["substitution"]["all"][metric] == pytest.approx(np.mean(substituted))
    ratios = [
        last_json(run_cli("decompose", folder / f"small/softmax-{seed}", "--json", cwd=folder)) for seed in (0, 1)
    ]
    assert result["mixing_ratio"] == pytest.approx(np.mean([r["all"]["attn_res_ln"]["mean"] for r in ratios]))
    assert result["mixing"]["all"]["entropy"]["mean"] == pytest.approx(
        np.mean([r["all"]["entropy"]["mean"] for r in ratios])
    )


def test_a_study_that_was_killed_goes_on_to_the_same_results(finished, log_path, tmp_path):
    folder, printed = finished
    command = [sys.executable, str(ROOT / "cli.py"), "study", "--data", str(log_path), *map(str, QUICK), "--out", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE)
    while b"[1/6]" not in process.stderr.readline():  # until the first run is done
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()
    if sys.platform != "linux":
        time.sleep(1)  # its runs find the parent gone
    again = run_cli("study", "--data", log_path, *QUICK, "--out", "out", "--json", cwd=tmp_path)
    assert "of 6 runs are finished already" in again.stderr
    assert last_json(again) == printed
    assert (tmp_path / "out/study.json").read_bytes() == (folder / "study.json").read_bytes()
    assert (tmp_path / "out/study.csv").read_bytes() == (folder / "study.csv").read_bytes()


def test_a_finished_run_is_not_repeated_and_other_settings_are_refused(finished, log_path):
    folder, printed = finished
    before = {path: path.stat().st_mtime_ns for path in folder.glob("small/*/*")}
    again = run_cli("study", "--data", log_path, *QUICK, "--out", folder, "--json", cwd=folder.parent)
    assert last_json(again) == printed and "6 of 6 runs are finished already" in again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("small/*/*")}
    other = run_cli("study", "--data", log_path, *QUICK, "--dropout", 0.3, "--out", folder, cwd=folder.parent)
    assert other.returncode == 1 and "was trained with dropout 0.2, not 0.3" in other.stderr


def test_a_study_of_an_older_version_is_summarised_where_its_runs_are_finished(finished, log_path, tmp_path):
    folder, printed = finished
    shutil.copytree(folder, tmp_path / "out")
    for path in (tmp_path / "out").glob("small/*/state.npz"):
        (path.parent / "state.previous.npz").unlink()
        arrays = files.read_arrays(path)
        files.write_arrays(path, {name: arrays[name] for name in arrays if name not in ("version", "settings")})
    again = run_cli("study", "--data", log_path, *QUICK, "--out", "out", "--json", cwd=tmp_path)
    assert last_json(again) == printed and "6 of 6 runs are finished already" in again.stderr
    more = run_cli("study", "--data", log_path, *QUICK, "--epochs", 3, "--out", "out", cwd=tmp_path)
    assert more.returncode == 1 and "state.npz: written by another version" in more.stderr


def test_a_study_in_use_is_left_alone_by_a_second_process(log_path, tmp_path):
    files.make_folder(tmp_path / "out")
    with files.locked(tmp_path / "out"):
        process = run_cli("study", "--data", log_path, *QUICK, "--out", "out", cwd=tmp_path)
    assert process.returncode == 1 and "out: in use by another process" in process.stderr.splitlines()[-1]
    assert not list((tmp_path / "out").iterdir())


def test_a_study_that_is_told_to_end_ends_its_runs_and_goes_on_later(log_path, tmp_path):
    arguments = ["study", "--data", str(log_path), *map(str, QUICK), "--epochs", "500", "--patience", "500"]
    command = [sys.executable, str(ROOT / "cli.py"), *arguments, "--out", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list(tmp_path.glob("out/small/*/state.npz")):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    words = process.communicate(timeout=60)[1]  # returns once its runs, too, have closed stderr
    assert process.returncode == 130 and "the same command goes on from here" in words.splitlines()[-1]
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_no_link_leads_a_study_out_of_its_folder(log_path, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/small").symlink_to(tmp_path / "elsewhere")
    process = run_cli("study", "--data", log_path, *QUICK, "--out", "out", cwd=tmp_path)
    assert process.returncode == 1 and "a link that leads out of out" in process.stderr.splitlines()[-1]
    assert not list((tmp_path / "elsewhere").iterdir())


def test_an_analysis_is_that_of_the_run_beside_it(finished, tmp_path):
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "out")
    job = job_of(tmp_path / "out")
    (job.folder / "state.npz").unlink()  # another run may now begin here, but this one's results are not its own
    other = job.dataset._replace(settings=job.settings() | {"data": job.settings()["data"] | {"k_core": 2}})
    with pytest.raises(UserError, match="was trained with k_core 1, not 2"):
        grid.grid([other], ["softmax"], 1, tmp_path / "out")
    with pytest.warns(UserWarning, match="going on from state.previous.npz"):
        grid.execute(job_of(tmp_path / "out", epochs=3), stop=lambda: True)
    assert not (job.folder / "analysis.json").exists()


@pytest.mark.parametrize("found", ["[]", '{"datasets": 3}', '{"datasets": [1]}'])
def test_damaged_results_of_earlier_studies_are_named(tmp_path, found):
    (tmp_path / "study.json").write_text(found)
    (tmp_path / "study.csv").write_text("dataset,arm\n")
    with pytest.raises(UserError, match="study.json or study.csv is damaged"):
        grid.write_results(tmp_path, {"small": {}}, [("small", "softmax", 0, {"HR@1": 0.5})])
    assert (tmp_path / "study.json").read_text() == found


@pytest.mark.parametrize(
    "change", [os.remove, lambda path: path.write_text("dataset,arm,seed,HR@2\nearlier,a,0,0.1\n")]
)
def test_a_table_that_does_not_fit_earlier_results_is_refused_not_forgotten(tmp_path, change):
    row = "softmax", 0, {"HR@1": 0.5}
    grid.write_results(tmp_path, {"earlier": {}}, [("earlier", *row)])
    found = (tmp_path / "study.json").read_text()
    change(tmp_path / "study.csv")
    with pytest.raises(UserError, match="study.json or study.csv is damaged"):
        grid.write_results(tmp_path, {"small": {}}, [("small", *row)])
    assert (tmp_path / "study.json").read_text() == found
    assert grid.write_results(tmp_path, {"earlier": {}}, [("earlier", *row)]) == {"earlier": {}}  # needs none of it
    assert (tmp_path / "study.csv").read_text() == "dataset,arm,seed,HR@1\nearlier,softmax,0,0.500000\n"


def test_a_run_that_fails_is_named_and_does_not_stop_the_others(log_path, tmp_path):
    (tmp_path / "out/small/uniform-1").mkdir(parents=True)
    (tmp_path / "out/small/uniform-1/config.json").mkdir()  # cannot be written
    process = run_cli("study", "--data", log_path, *QUICK, "--out", "out", cwd=tmp_path)
    assert process.returncode == 1 and "failed: small uniform seed 1:" in process.stderr
    assert "1 of 6 runs failed" in process.stderr.splitlines()[-1]
    result = json.loads((tmp_path / "out/study.json").read_text())["datasets"]["small"]
    assert result["seeds"] == [0]
    assert set(result["hedges_g"].values()) == {None} and "one seed cannot say" in process.stdout


def test_wrong_input_is_refused_in_one_line(log_path, tmp_path):
    short = log_path.parent / "short.txt"
    short.write_text("a x y z\nb z y x\n")
    for arguments, status, words in (
        (("--attn", "uniform"), 2, "--attn must name both"),
        (("--data", log_path, "--data", log_path), 2, "two logs are called small"),
        (("--split", "temporal"), 1, "chain: the log has no timestamps"),
        (("--data", log_path, "--k-core", 99), 1, "--k-core 99 leaves no interaction"),
        (("--data", "missing.csv"), 1, "missing.csv: cannot be read"),
        (("--seeds", 0), 2, "--seeds"),
        (("--data", short), 1, "short.txt: too small for a leave-one-out split"),
    ):
        process = run_cli("study", *arguments, cwd=tmp_path)
        assert process.returncode == status and words in process.stderr, process.stderr
        assert "Traceback" not in process.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("library", ["scipy", "matplotlib"])
def test_a_missing_library_is_named(library, log_path, tmp_path):
    (tmp_path / "without" / library).mkdir(parents=True)
    (tmp_path / "without" / library / "__init__.py").write_text(f"raise ImportError('no {library}')")
    process = run_cli(
        "study",
        "--data",
        log_path,
        "--epochs",
        1,
        "--seeds",
        1,
        cwd=tmp_path,
        environment={"PYTHONPATH": str(tmp_path / "without")},
    )
    assert "pip install 'minirec[study]'" in process.stderr and "Traceback" not in process.stderr
    assert process.returncode == (1 if library == "scipy" else 0)


def test_defaults_follow_the_data():
    def log(counts, n_items):
        offsets = np.concatenate([[0], np.cumsum(counts)])
        return data.Log([""] * len(counts), [""] * n_items, offsets, np.zeros(offsets[-1], np.int32))

    assert grid.sensible(log([9] * 20, 1000)) == (9, 0.5)
    assert grid.sensible(log([90] * 20, 1000)) == (50, 0.2)
    assert grid.sensible(log([150, 300], 10_000)) == (200, 0.2)
    assert grid.sensible(log([100] * 20, 5_000)) == (100, 0.2)  # both limits exactly


def test_shuffling_moves_only_what_the_model_sees_before_the_target():
    sequence = np.arange(20)
    cases = Targets(np.array([0, 1]), np.array([0, 10]), np.array([7, 19]))
    shuffled = grid.shuffle_histories(sequence, cases, 5, seed=0)
    assert sorted(shuffled[2:7]) == list(range(2, 7)) and sorted(shuffled[14:19]) == list(range(14, 19))
    unmoved = [*range(2), *range(7, 14), 19]
    assert list(shuffled[unmoved]) == unmoved and (shuffled != sequence).any()


def test_every_history_and_every_seed_has_an_order_of_its_own():
    sequence = np.arange(60)  # three histories of 20
    cases = Targets(np.arange(3), np.arange(0, 60, 20), np.arange(19, 60, 20))
    orders = [grid.shuffle_histories(sequence, cases, 50, seed).reshape(3, 20) % 20 for seed in (0, 1)]
    assert len({tuple(order) for order in np.concatenate(orders)}) == 6
    np.testing.assert_array_equal(grid.shuffle_histories(sequence, cases, 50, 1).reshape(3, 20) % 20, orders[1])


@pytest.mark.parametrize("loss_bytes", [1, 4 << 20])  # chunks of 16, 16 and 1 users, of all
def test_baselines_equal_counting_by_hand(rng, loss_bytes, monkeypatch):
    monkeypatch.setattr(packing, "CPU_PLAN", packing.CPU_PLAN._replace(loss_bytes=loss_bytes))
    sequences = [rng.integers(12, size=rng.integers(3, 9)).tolist() for _ in range(33)]
    log = log_of(sequences)
    split = leave_one_out(log)
    found = baselines.rank_baselines(log, split, split.test)
    trained = [s[:-2] for s in sequences]
    popularity = [sum(s.count(i) for s in trained) for i in range(12)]
    for case, sequence in enumerate(sequences):
        *history, target = sequence
        follows = [sum(pair == (history[-1], i) for s in trained for pair in itertools.pairwise(s)) for i in range(12)]
        for name, score in (("popularity", popularity), ("transitions", list(zip(follows, popularity, strict=True)))):
            ahead = sum(score[i] >= score[target] for i in range(12) if i not in history and i != target)
            assert found[name][case] == (ranking.MISS if target in history else ahead)


def test_a_history_shorter_than_max_length_is_shuffled_within_itself():
    sequence = np.arange(60)  # three histories of 19 items and a target
    cases = Targets(np.arange(3), np.arange(0, 60, 20), np.arange(19, 60, 20))
    for user, (*history, target) in enumerate(grid.shuffle_histories(sequence, cases, 50, 0).reshape(3, 20)):
        assert sorted(history) == list(range(20 * user, 20 * user + 19)) and target == 20 * user + 19


@pytest.mark.parametrize("attn", ["softmax", "uniform"])
def test_the_ranks_that_a_run_keeps_are_those_of_their_names(tmp_path, attn):
    rng = np.random.default_rng(0)
    log = log_of([(rng.integers(20) + np.arange(n) ** 2) % 20 for n in rng.integers(2, 12, 60)])
    sizes = {"n_items": 20, "hidden_size": 8, "n_blocks": 2, "n_heads": 2, "max_length": 6, "dropout": 0.1}
    source = {"path": "?", "sha256": log.sha256(), "format": None, "columns": None, "split": "leave-one-out"}
    training = {
        "loss": "ce",
        "negatives": 1,
        "epochs": 12,
        "batch_size": 16,
        "lr": 0.03,
        "patience": 12,
        "filter_seen": True,
    }
    settings = {"data": source | {"k_core": 1, "drop_repeats": False}, "model": sizes}
    settings |= {"training": training | {"backend": "numpy"}}
    job = grid.Job(grid.Dataset("small", log, settings), attn, 3, tmp_path / "run")
    train(log, job.settings(), job.folder)
    clock = iter([0, 6, 10, 13, 20, 25])  # ranking takes 6, 3 and 5 seconds
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid.time, "perf_counter", lambda: next(clock))
        assert grid.analyse(log, job.settings(), job.folder)
    config, test = runs.model_config(job.settings()), leave_one_out(log).test
    parameters = runs.load_parameters(job.folder, config)
    shuffled = grid.shuffle_histories(log.sequence, test, 6, seed=3)
    wanted = {"test": (config, log.sequence), "shuffled": (config, shuffled)}
    if attn == "softmax":
        for name, weightings in (("", ("uniform",) * 2), (".0", ("uniform", attn)), (".1", (attn, "uniform"))):
            wanted[f"uniform{name}"] = replace(config, attn=weightings), log.sequence
    analysis, ranks = grid.load_analysis(job)
    assert ranks.keys() == wanted.keys() and len({r.tobytes() for r in ranks.values()}) == len(wanted)
    for name, (substituted, sequence) in wanted.items():
        expected = np.concatenate(list(ranking.rank_targets(parameters, substituted, sequence, test)))
        np.testing.assert_array_equal(ranks[name], expected)
    records = files.read_json_lines(job.folder / "metrics.jsonl")
    best = max(records, key=lambda record: record["NDCG@10"])["epoch"]
    assert (analysis["epochs"], analysis["best_epoch"]) == (12, best)
    assert analysis["milliseconds_per_user"] == pytest.approx(3000 / len(test.users))
    if attn == "softmax":
        result = decompose(
            parameters, config, [log.sequence[a:b] for a, b in zip(test.starts, test.stops, strict=True)]
        )
        assert analysis["mixing"] == summarise(result)
        for picture, block in zip(analysis["pictures"], result["blocks"], strict=True):
            for name in RATIOS:
                bins = np.minimum((block[name] * grid.BINS).astype(int), grid.BINS - 1)
                assert picture[name] == np.bincount(bins, minlength=grid.BINS).tolist()
            for name in ("attention", "contribution"):
                np.testing.assert_array_equal(np.array(picture[name], float), block[name])


EPOCHS = {"softmax": (4, 5), "uniform": (3, 4), "identity": (6, 3)}  # of two seeds; at most six, two after the best


def invent(job):
    """Write what a run leaves, all numbers invented and different ones."""
    rng = np.random.default_rng([list(EPOCHS).index(job.attn), job.seed])
    n_users, n_epochs = len(runs.split_log(job.dataset.log, job.settings()).test.users), EPOCHS[job.attn][job.seed]

    def numbers(*shape):
        return rng.random(shape).tolist()

    scores = [i / 10 for i in range(n_epochs)]
    if n_epochs < 6:
        scores[-2:] = 0, 0
    records = [
        {"epoch": i, "loss": 1.0, "steps": 1, "train_seconds": rng.random(), "NDCG@10": score}
        for i, score in enumerate(scores, 1)
    ]
    positions = ("all", "without_first", "latest")
    names, values = (*RATIOS, "entropy"), ("mean", "median", "std", "n")
    summaries = [{name: dict(zip(values, numbers(4), strict=True)) for name in names} for _ in range(5)]
    pictures = [{name: numbers(9) for name in RATIOS} | {m: numbers(3, 3) for m in PICTURES} for _ in range(2)]
    pictures[1]["attention"][0][2] = None
    analysis = {"epochs": n_epochs, "best_epoch": 1, "milliseconds_per_user": rng.random()}
    kinds = ["test", "shuffled"]
    if job.attn == "softmax":
        kinds += ["uniform", "uniform.0", "uniform.1"]
        analysis |= {"mixing": {"blocks": summaries[:2]} | dict(zip(positions, summaries[2:], strict=True))}
        analysis |= {"pictures": pictures}
    never = np.arange(n_users) % 7 == 0
    ranks = {kind: np.where(never, ranking.MISS, rng.geometric(0.04, n_users) - 1) for kind in kinds}
    files.make_folder(job.folder)
    files.write_json(job.folder / "config.json", job.settings())
    files.write_json_lines(job.folder / "metrics.jsonl", records)
    files.write_json(job.folder / "analysis.json", analysis)
    files.write_arrays(job.folder / "ranks.npz", ranks)


PICTURES = ("attention", "contribution")


def invented_study(folder, n_seeds, *options):
    """Run a study of small.txt in `folder` whose runs are invented, into its folder "out"; return what click tells."""

    def run_grid(jobs, n_processes, report, lock=None):
        for job in jobs:
            invent(job)
            report(job, "done", None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "run_grid", run_grid)
        patch.setitem(sys.modules, "matplotlib", None)
        arguments = ["study", "--data", folder / "small.txt", "--epochs", 6, "--patience", 2, "--seeds", n_seeds]
        arguments += [word for attn in EPOCHS for word in ("--attn", attn)]
        result = CliRunner().invoke(main, [*map(str, arguments), *options, "--out", str(folder / "out")])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def invented(log_path, tmp_path_factory):
    """The folder of a study whose runs left invented numbers, its log, and what the study printed."""
    folder = tmp_path_factory.mktemp("invented")
    text = "u0 i1 i2\n" + log_path.read_text().replace("u", "v")  # the first user has no test target
    (folder / "small.txt").write_text(text)
    printed = invented_study(folder, 2).stdout
    return folder / "out", read_log(folder / "small.txt"), printed


def kept(folder, attn, seed):
    """The analysis and the ranks that a run of a study left."""
    run = folder / "small" / f"{attn}-{seed}"
    return files.read_json(run / "analysis.json"), files.read_arrays(run / "ranks.npz")


def metric(name, ranks):
    """The values [M] of a metric by its definition."""
    kind, k = name.split("@")
    gain = {"HR": np.ones(len(ranks)), "NDCG": 1 / np.log2(ranks + 2), "MRR": 1 / (ranks + 1)}[kind]
    return np.where(ranks < int(k), gain, 0)


def test_the_results_of_a_study_are_those_of_its_runs(invented):
    folder, log, _ = invented
    result = json.loads((folder / "study.json").read_text())["datasets"]["small"]
    counts = {"users": 81, "items": 30, "interactions": 722, "test_users": 80, "unreachable": 12, "max_length": 9}
    assert {name: result[name] for name in counts} == counts and result["seeds"] == [0, 1]
    assert result["epochs"] == {attn: list(epochs) for attn, epochs in EPOCHS.items()} and result["epochs_at_most"] == 6
    runs_of = {attn: [kept(folder, attn, seed) for seed in (0, 1)] for attn in EPOCHS}
    split = leave_one_out(log)
    counted = baselines.rank_baselines(log, split, split.test)
    for name in statistics.METRICS:
        values = {
            (attn, kind): np.array([metric(name, ranks[kind]).mean() for _, ranks in found])
            for attn, found in runs_of.items()
            for kind in found[0][1]
        }
        for attn in EPOCHS:
            a, b = values[attn, "test"]
            assert result["metrics"][attn][name] == pytest.approx({"mean": (a + b) / 2, "std": abs(a - b) / 2**0.5})
            assert result["shuffled"][attn][name] == pytest.approx(values[attn, "shuffled"].mean())
        for title, kind in (("all", "uniform"), ("block 0", "uniform.0"), ("block 1", "uniform.1")):
            assert result["substitution"][title][name] == pytest.approx(values["softmax", kind].mean())
        for baseline, ranks in counted.items():
            assert result["baselines"][baseline][name] == pytest.approx(metric(name, ranks).mean())
        for effect, one, other in (("weighting", "softmax", "uniform"), ("integration", "uniform", "identity")):
            pairs = zip(runs_of[one], runs_of[other], strict=True)
            by_user = [metric(name, a["test"]) - metric(name, b["test"]) for (_, a), (_, b) in pairs]
            a, b = values[one, "test"], values[other, "test"]
            found = result[effect][name]
            assert found["difference"] == pytest.approx(a.mean() - b.mean())
            assert found["relative"] == pytest.approx(a.mean() / b.mean() - 1)
            assert found["hedges_g"] == pytest.approx(statistics.hedges_g(a, b))
            test = statistics.paired_t(a, b)
            assert (found["t"], found["p"], found["interval_seeds"]) == (
                pytest.approx(test["t"]),
                pytest.approx(test["p"]),
                pytest.approx(test["interval"]),
            )
            assert found["interval_users"] == pytest.approx(statistics.bootstrap(np.mean(by_user, axis=0)))
    softmax = [analysis for analysis, _ in runs_of["softmax"]]
    for part in ("all", "without_first", "latest"):
        for name in (*RATIOS, "entropy"):
            means = [analysis["mixing"][part][name]["mean"] for analysis in softmax]
            assert result["mixing"][part][name]["mean"] == pytest.approx(np.mean(means))
    for block in (0, 1):
        for name in (*RATIOS, *PICTURES):
            both = [np.array(analysis["pictures"][block][name], float) for analysis in softmax]
            np.testing.assert_allclose(np.array(result["pictures"][block][name], float), np.mean(both, axis=0))
    ratios = [analysis["mixing"]["all"]["attn_res_ln"]["mean"] for analysis in softmax]
    assert result["mixing_ratio"] == pytest.approx(np.mean(ratios))
    assert result["mixing_ratio_std"] == pytest.approx(np.std(ratios, ddof=1))
    assert result["hedges_g"] == {name: result["weighting"][name]["hedges_g"] for name in statistics.METRICS}
    assert result["mean_g"] == pytest.approx(np.mean(list(result["hedges_g"].values())))
    times = {
        attn: {
            "train_seconds": [
                pytest.approx(sum(record["train_seconds"] for record in files.read_json_lines(path / "metrics.jsonl")))
                for path in (folder / "small" / f"{attn}-{seed}" for seed in (0, 1))
            ],
            "milliseconds": [analysis["milliseconds_per_user"] for analysis, _ in runs_of[attn]],
        }
        for attn in EPOCHS
    }
    assert json.loads((folder / "times.json").read_text()) == {"small": times}


def test_the_table_of_a_study_holds_in_each_row_the_metrics_of_its_arm(invented):
    folder, log, _ = invented
    with open(folder / "study.csv", newline="") as file:
        rows = {(row["arm"], row["seed"]): row for row in csv.DictReader(file)}
    titles = {"test": "", "shuffled": ", shuffled", "uniform": ", uniform"}
    titles |= {f"uniform.{i}": f", uniform in block {i}" for i in (0, 1)}
    expected = {
        (attn + titles[kind], str(seed)): ranks
        for attn in EPOCHS
        for seed in (0, 1)
        for kind, ranks in kept(folder, attn, seed)[1].items()
    }
    split = leave_one_out(log)
    expected |= {(name, ""): ranks for name, ranks in baselines.rank_baselines(log, split, split.test).items()}
    assert list(rows) == list(expected) and len(rows) == 3 * 2 * 2 + 3 * 2 + 2
    for arm, ranks in expected.items():
        found = {name: float(value) for name, value in rows[arm].items() if "@" in name}
        assert found == pytest.approx({name: metric(name, ranks).mean() for name in found}, abs=1e-6)
        assert len(found) == 18


def test_what_a_study_prints_is_what_its_results_hold(invented):
    folder, _, printed = invented
    result = json.loads((folder / "study.json").read_text())["datasets"]["small"]
    lines = [line.strip() for line in printed.strip().splitlines()]
    first = next(i for i, line in enumerate(lines) if line.startswith("weighting"))
    (title, *headings), *rows = (re.split(r" {2,}|(?<=\d) (?=\d)", line) for line in lines[:first])
    assert title == "small (mean ± std of 2 seeds)" and headings == [*statistics.METRICS, "ms/user"]
    times = json.loads((folder / "times.json").read_text())["small"]
    expected = [
        [attn, *(f"{v['mean']:.4f} ±{v['std']:.4f}" for v in map(values.get, statistics.METRICS))]
        + [f"{np.mean(times[attn]['milliseconds']):.2f}"]
        for attn, values in result["metrics"].items()
    ]
    others = {"softmax, uniform put in": result["substitution"]["all"]}
    others |= {f"only in block {i}": result["substitution"][f"block {i}"] for i in (0, 1)}
    others |= {f"{attn}, history shuffled": result["shuffled"][attn] for attn in EPOCHS}
    others |= {f"{name} (counts)": result["baselines"][name] for name in ("popularity", "transitions")}
    expected += [[title, *(f"{values[name]:.4f}" for name in statistics.METRICS)] for title, values in others.items()]
    assert rows == expected
    for effect, arms in (("weighting", "softmax - uniform"), ("integration", "uniform - identity")):
        c, g = result[effect]["NDCG@10"], np.mean([c["hedges_g"] for c in result[effect].values()])
        first = lines.index(
            f"{effect}, {arms}: NDCG@10 {c['difference']:+.4f} ({c['relative']:+.1%}); "
            f"Hedges' g {g:+.2f}, the mean of 5 metrics; paired t-test p = {c['p']:.2g}"
        )
        seeds, users = ("{:+.4f} to {:+.4f}".format(*c[f"interval_{over}"]) for over in ("seeds", "users"))
        assert lines[first + 1] == f"95 % intervals: {seeds} over seeds, {users} over users"
    mixing = result["mixing"]
    ratios = [f"block {i} {block['attn_res_ln']['mean']:.3f}" for i, block in enumerate(mixing["blocks"])]
    assert lines[first + 2 : first + 5] == [
        f"mixing ratio {result['mixing_ratio']:.3f} ({', '.join(ratios)}; latest position "
        f"{mixing['latest']['attn_res_ln']['mean']:.3f}); entropy of A {mixing['all']['entropy']['mean']:.3f}",
        "identity: ended by the limit of 6 epochs, and might still improve (--epochs)",
        "12 of 80 targets are items the user had before: misses",
    ]
    assert lines[-1] == grid.verdict("small", result)


def test_what_a_study_of_one_seed_prints_holds_no_number_that_is_none(log_path, tmp_path):
    (tmp_path / "small.txt").write_text(log_path.read_text())
    printed = invented_study(tmp_path, 1).stdout
    result = json.loads((tmp_path / "out/study.json").read_text())["datasets"]["small"]
    lines = [line.strip() for line in printed.strip().splitlines()]
    assert lines[0].startswith("small (mean ± std of 1 seed)  ") and "±" not in "".join(lines[1:])
    assert "None" not in printed and "nan" not in printed
    c = result["weighting"]["NDCG@10"]
    first = lines.index(
        f"weighting, softmax - uniform: NDCG@10 {c['difference']:+.4f} ({c['relative']:+.1%}); "
        "g undefined for HR@1, HR@10, HR@100, NDCG@10, NDCG@100: no spread over seeds"
    )
    low, high = c["interval_users"]
    assert lines[first + 1] == f"95 % intervals: {low:+.4f} to {high:+.4f} over users"
    assert "one seed cannot say" in lines[-1]


def test_a_study_table_says_what_is_undefined_and_why(invented, monkeypatch):
    folder, _, _ = invented
    result = json.loads((folder / "study.json").read_text())["datasets"]["small"]
    g = {name: comparison["hedges_g"] for name, comparison in result["weighting"].items()}
    mean = (g["HR@100"] + g["NDCG@10"] + g["NDCG@100"]) / 3
    result["weighting"]["HR@1"]["hedges_g"] = result["weighting"]["HR@10"]["hedges_g"] = None
    result["weighting"]["NDCG@10"] |= {"difference": 0.5, "relative": None, "p": 0.25}
    result["mixing"]["all"]["entropy"]["mean"] = None
    result["epochs"] |= {"softmax": [6, 2], "uniform": [2, 5], "identity": [3, 6]}
    times = json.loads((folder / "times.json").read_text())["small"]
    lines = [line.strip() for line in study_table("small", result, times).splitlines()]
    assert (
        f"weighting, softmax - uniform: NDCG@10 +0.5000; Hedges' g {mean:+.2f}, the mean of 3 metrics; "
        "g undefined for HR@1, HR@10: no spread over seeds; paired t-test p = 0.25"
    ) in lines
    assert any(line.startswith("mixing ratio") and line.endswith("; entropy of A -") for line in lines)
    assert "softmax, identity: ended by the limit of 6 epochs, and might still improve (--epochs)" in lines


def test_a_study_says_how_many_users_it_tests_on(tmp_path, rng):
    rows = [(rng.integers(20), rng.integers(9), rng.integers(100)) for _ in range(300)]
    (tmp_path / "small.txt").write_text("user,item,time\n" + "".join(f"u{u},i{i},{t}\n" for u, i, t in rows))
    log = read_log(tmp_path / "small.txt")
    split = temporal(log)
    assert len(split.valid.users) != len(split.test.users) < 20
    words = f"small: 20 users, 9 items, 300 interactions; {len(split.test.users)} test users; the last "
    assert words in invented_study(tmp_path, 1, "--split", "temporal").stderr


def test_the_results_of_several_datasets_stand_under_their_names(invented, tmp_path):
    folder, log, _ = invented
    settings, jobs = runs.load_settings(folder / "small/softmax-0"), []
    for name in ("one", "two"):
        dataset = grid.Dataset(name, log, settings)
        for job in grid.grid([dataset], list(EPOCHS), 2, tmp_path):
            other = job._replace(seed=job.seed ^ (name == "two"))  # the numbers of the seeds change places
            shutil.copytree(folder / f"small/{other.attn}-{other.seed}", job.folder)
            jobs.append(job)
    results, rows = grid.collect(jobs)
    assert list(results) == ["one", "two"]
    assert [row[0] for row in rows] == ["one"] * (len(rows) // 2) + ["two"] * (len(rows) // 2)
    values = {(dataset, arm, seed): metrics["HR@10"] for dataset, arm, seed, metrics in rows}
    for attn in EPOCHS:
        assert values["one", attn, 0] == values["two", attn, 1] != values["two", attn, 0]


def test_learning_curves_hold_the_validation_of_each_epoch_of_each_seed(invented):
    folder, log, _ = invented
    dataset = grid.Dataset("small", log, runs.load_settings(folder / "small/softmax-0"))
    (curves,) = grid.learning_curves(grid.grid([dataset], list(EPOCHS), 2, folder)).values()
    for attn in EPOCHS:
        for seed in (0, 1):
            records = files.read_json_lines(folder / f"small/{attn}-{seed}/metrics.jsonl")
            assert curves[attn][seed] == [record["NDCG@10"] for record in records]
    assert list(curves) == list(EPOCHS)


@pytest.mark.parametrize("attn", EPOCHS)
def test_a_seed_counts_where_each_weighting_has_finished_it(invented, tmp_path, attn):
    folder, log, _ = invented
    shutil.copytree(folder, tmp_path / "out")
    dataset = grid.Dataset("small", log, runs.load_settings(folder / "small/softmax-0"))
    jobs = grid.grid([dataset], list(EPOCHS), 2, tmp_path / "out")
    (tmp_path / f"out/small/{attn}-0/analysis.json").unlink()
    results, rows = grid.collect(jobs)
    whole = json.loads((folder / "study.json").read_text())["datasets"]["small"]
    assert results["small"]["seeds"] == [1] and {row[2] for row in rows} == {1, None}
    for other in EPOCHS:
        found = results["small"]["metrics"][other]["HR@10"]
        assert found["mean"] == pytest.approx(metric("HR@10", kept(folder, other, 1)[1]["test"]).mean())
        assert found["mean"] != whole["metrics"][other]["HR@10"]["mean"] and found["std"] is None
    (tmp_path / f"out/small/{attn}-1/analysis.json").unlink()
    assert grid.collect(jobs) == ({}, [])


def test_a_verdict_is_no_stronger_than_its_seeds():
    test = {"hedges_g": 0.1, "relative": -0.01, "p": 0.6}
    result = {"weighting": {"NDCG@10": test}, "seeds": [0, 1, 2, 3, 4], "mean_g": 0.1, "mixing_ratio": 0.12}
    result |= {"regime": "preserving", "doubts": [], "judgements": {"weighting": "equal"}}
    assert grid.verdict("beauty", result) == (
        "beauty: a causal average does as well as learned attention (NDCG@10 -1%, p = 0.6, mean g = +0.1, 5 seeds); "
        "blocks keep 88% of each position: regime preserving."
    )
    doubt = result | {"doubts": ["too few"], "judgements": {"weighting": "unclear"}}
    assert "cannot tell learned attention" in grid.verdict("beauty", doubt)
    assert grid.verdict("beauty", doubt).endswith("regime preserving, not confident (too few).")
    alone = doubt | {"seeds": [0], "mean_g": None, "weighting": {"NDCG@10": test | {"p": None}}}
    assert "one seed cannot say" in grid.verdict("beauty", alone) and "(NDCG@10 -1%, 1 seed)" in grid.verdict(
        "beauty", alone
    )


def test_a_conclusion_follows_from_effects_ratios_and_users():
    def conclude(g, difference, **changes):
        comparison = {"hedges_g": g, "difference": difference}
        comparison |= {"interval_seeds": [difference / 2, difference * 2], "interval_users": [difference, difference]}
        result = {"weighting": {"NDCG@10": comparison, "HR@10": comparison | {"hedges_g": None}}}
        result |= {"metrics": {attn: {"NDCG@10": {"mean": 0.5}} for attn in ("softmax", "uniform")}}
        result |= {"baselines": {"popularity": {"NDCG@10": 0.1}}, "test_users": 90, "unreachable": 40} | changes
        return grid.conclude(result, [0.40, 0.41, 0.45])

    found = conclude(2.0, 0.1)
    assert (found["mixing_ratio"], found["mixing_ratio_std"]) == pytest.approx(
        (0.42, np.std([40, 41, 45], ddof=1) / 100)
    )
    assert found["hedges_g"] == {"NDCG@10": 2.0, "HR@10": None} and found["mean_g"] == 2
    assert (found["regime"], found["confident"], found["doubts"]) == ("mixing_with_reliance", True, [])
    assert found["judgements"] == {"weighting": "better"}
    assert conclude(-2.0, 0.1)["regime"] == "mixing_without_reliance"  # the sign is that of the mean effect size,
    assert conclude(None, 0.1)["regime"] == "mixing_with_reliance"  # or, without one, that of the difference
    assert conclude(None, -0.1)["regime"] == "mixing_without_reliance"
    few = conclude(2.0, 0.1, unreachable=70)
    assert not few["confident"] and few["doubts"] == ["fewer than 30 users to test on"]
    assert conclude(2.0, 0.1, baselines={"transitions": {"NDCG@10": 0.6}})["doubts"] == [
        "counting does better than the model"
    ]


def test_a_verdict_speaks_of_the_past_of_all_doubts_and_of_no_number_that_is_none():
    result = {"weighting": {"NDCG@10": {"relative": 0.214, "p": 0.0123}}, "seeds": [0, 1], "mean_g": 2.345}
    result |= {"mixing_ratio": 0.456, "regime": "mixing_with_reliance", "doubts": ["few seeds", "few users"]}
    result |= {"judgements": {"weighting": "better", "integration": "better"}}
    assert grid.verdict("log", result) == (
        "log: learned attention beats a causal average (NDCG@10 +21%, p = 0.012, mean g = +2.3, 2 seeds); the past "
        "adds to the last item; blocks keep 54% of each position: regime mixing with reliance, not confident (few "
        "seeds; few users)."
    )
    result |= {"weighting": {"NDCG@10": {"relative": None, "p": None}}, "seeds": [0], "mean_g": None}
    assert grid.verdict("log", result | {"doubts": [], "regime": "preserving"}) == (
        "log: one seed cannot say whether learned attention is needed (1 seed); the past adds to the last item; "
        "blocks keep 54% of each position: regime preserving."
    )


def job_of(folder, epochs=2):
    """A finished run of the small study, as a Job of a study with so many epochs at most."""
    settings = runs.load_settings(folder / "small/softmax-0")
    log = runs.load_log(settings["data"])
    settings["training"]["epochs"] = epochs
    return grid.Job(grid.Dataset("small", log, settings), "softmax", 0, folder / "small/softmax-0")


def test_a_run_counts_for_the_epochs_that_it_was_to_have(finished):
    folder, _ = finished
    assert grid.load_analysis(job_of(folder)) is not None
    assert grid.load_analysis(job_of(folder, epochs=3)) is None  # it goes on
    with pytest.raises(UserError, match="ran for 2 epochs, longer than --epochs"):
        grid.grid([job_of(folder, epochs=1).dataset], ["softmax"], 1, folder)


@pytest.mark.parametrize(
    "name, content",
    [
        ("analysis.json", b"{"),
        ("analysis.json", b"[]"),
        ("analysis.json", b'{"epochs": 2}'),
        ("ranks.npz", b"x"),
        ("ranks.npz", None),
    ],
)
def test_a_damaged_analysis_is_made_again(finished, tmp_path, name, content):
    folder, printed = finished
    shutil.copytree(folder, tmp_path / "out")
    damaged = tmp_path / "out/small/softmax-0" / name
    if content is None:
        shutil.copy(tmp_path / "out/small/uniform-0" / name, damaged)
    else:
        damaged.write_bytes(content)
    job = job_of(tmp_path / "out")
    assert grid.load_analysis(job) is None
    grid.execute(job)
    results, _ = grid.collect([job, job._replace(attn="uniform", folder=tmp_path / "out/small/uniform-0")])
    assert results["small"]["metrics"]["softmax"]["HR@10"]["mean"] <= 1
    assert (
        grid.load_analysis(job)[0]["mixing"]["all"]
        == files.read_json(folder / "small/softmax-0/analysis.json")["mixing"]["all"]
    )


def test_datasets_studied_in_a_folder_before_stay_in_its_results(finished, log_path, tmp_path):
    folder, printed = finished
    shutil.copytree(folder, tmp_path / "out")
    other = tmp_path / "other.txt"
    other.write_text(log_path.read_text())
    process = run_cli("study", "--data", other, *QUICK, "--seeds", 1, "--out", "out", "--json", cwd=tmp_path)
    assert list(last_json(process)["datasets"]) == ["other"]
    kept = json.loads((tmp_path / "out/study.json").read_text())["datasets"]
    assert list(kept) == ["small", "other"] and kept["small"] == printed["datasets"]["small"]
    times = json.loads((tmp_path / "out/times.json").read_text())
    assert list(times) == ["small", "other"]
    assert times["small"] == json.loads((folder / "times.json").read_text())["small"]
    arms = printed["datasets"]["small"]["metrics"]
    assert {attn: len(own["train_seconds"]) for attn, own in times["other"].items()} == dict.fromkeys(arms, 1)
    lines = (tmp_path / "out/study.csv").read_text().splitlines()
    assert lines[: -(3 * 2 + 3 + 2)] == (folder / "study.csv").read_text().splitlines()


def test_times_of_a_dataset_that_is_studied_again_are_the_new_ones(tmp_path):
    for times in ({"a": {"softmax": 1}, "b": 2}, {"a": {"uniform": 3}}):
        grid.write_times(tmp_path, times)
    assert files.read_json(tmp_path / "times.json") == {"b": 2, "a": {"uniform": 3}}
    for text in ("[1]", "{"):
        (tmp_path / "times.json").write_text(text)
        with pytest.raises(UserError, match="times.json: (damaged|not valid JSON)"):
            grid.write_times(tmp_path, times)


def test_a_log_without_a_reachable_target_gives_no_verdict(tmp_path):
    (tmp_path / "one.txt").write_text("".join(f"u{u} a a a a\n" for u in range(20)))
    process = run_cli("study", "--data", "one.txt", "--epochs", 2, "--max-length", 1, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "cannot tell" in process.stdout and "not confident (fewer than 30 users to test on" in process.stdout
    assert (tmp_path / "runs/study-one/study.json").exists()


def test_the_planted_datasets_lie_in_their_regimes(tmp_path):
    """The study as the command line runs it, on a grid of fewer seeds and epochs."""
    process = run_cli(
        "study", "--seeds", 1, "--epochs", 30, "--attn", "softmax", "--attn", "uniform", "--json", cwd=tmp_path
    )
    found = {name: result["regime"] for name, result in last_json(process)["datasets"].items()}
    assert list(found) == list(planted.DATASETS)
    assert found == {
        "chain": "preserving",
        "taste": "mixing_without_reliance",
        "household": "mixing_with_reliance",
    }


def test_a_study_that_an_older_version_left_is_read_and_its_models_are_measured_again():
    folder = Path(__file__).parent / "older_study"
    settings = runs.load_settings(folder / "study/log/softmax-0")
    settings["data"]["path"] = str(folder / "log.csv")
    dataset = grid.Dataset("log", runs.load_log(settings["data"]), settings)
    jobs = grid.grid([dataset], ("softmax", "uniform", "identity", "recency"), 2, folder / "study")
    results, _ = grid.collect(jobs)
    kept = json.loads((folder / "study/study.json").read_text())["datasets"]["log"]
    assert results["log"]["metrics"] == kept["metrics"] and results["log"]["mixing_ratio"] == kept["mixing_ratio"]
    test = runs.split_log(dataset.log, settings).test
    histories = [dataset.log.sequence[a:b] for a, b in zip(test.starts, test.stops, strict=True)]
    for job in jobs:
        analysis, ranks = grid.load_analysis(job)
        config = runs.model_config(job.settings())
        parameters = runs.load_parameters(job.folder, config)
        again = np.concatenate(list(ranking.rank_targets(parameters, config, dataset.log.sequence, test)))
        assert np.abs(again - ranks["test"]).max() <= 1  # rounding may differ from machine to machine
        if job.attn == "softmax":
            mixing = summarise(decompose(parameters, config, histories))["all"]["attn_res_ln"]["mean"]
            assert mixing == pytest.approx(analysis["mixing"]["all"]["attn_res_ln"]["mean"], rel=1e-5)
