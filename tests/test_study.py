"""The study: its grid, what it measures of a run, what it concludes, and the regimes of the planted datasets."""

import csv
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
from conftest import ROOT, last_json, run_cli

from minirec import data, evaluate, files, planted, runs, statistics, study
from minirec.decompose import decompose, summarise
from minirec.errors import UserError

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
        study.grid([other], ["softmax"], 1, tmp_path / "out")
    with pytest.warns(UserWarning, match="going on from state.previous.npz"):
        study.execute(job_of(tmp_path / "out", epochs=3), stop=lambda: True)
    assert not (job.folder / "analysis.json").exists()


@pytest.mark.parametrize("found", ["[]", '{"datasets": 3}', '{"datasets": [1]}'])
def test_damaged_results_of_earlier_studies_are_named(tmp_path, found):
    (tmp_path / "study.json").write_text(found)
    (tmp_path / "study.csv").write_text("dataset,arm\n")
    with pytest.raises(UserError, match="study.json or study.csv is damaged"):
        study.write_results(tmp_path, {"small": {}}, [("small", "softmax", 0, {"HR@1": 0.5})])
    assert (tmp_path / "study.json").read_text() == found


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

    assert study.sensible(log([9] * 20, 1000)) == (9, 0.5)
    assert study.sensible(log([90] * 20, 1000)) == (50, 0.2)
    assert study.sensible(log([150, 300], 10_000)) == (200, 0.2)


def test_shuffling_moves_only_what_the_model_sees_before_the_target():
    sequence = np.arange(20)
    cases = data.Cases(np.array([0, 1]), np.array([0, 10]), np.array([7, 19]))
    shuffled = study.shuffle_histories(sequence, cases, 5, seed=0)
    assert sorted(shuffled[2:7]) == list(range(2, 7)) and sorted(shuffled[14:19]) == list(range(14, 19))
    unmoved = [*range(2), *range(7, 14), 19]
    assert list(shuffled[unmoved]) == unmoved and (shuffled != sequence).any()


def test_a_verdict_is_no_stronger_than_its_seeds():
    test = {"hedges_g": 0.1, "relative": -0.01, "p": 0.6}
    result = {"weighting": {"NDCG@10": test}, "seeds": [0, 1, 2, 3, 4], "mean_g": 0.1, "mixing_ratio": 0.12}
    result |= {"regime": "preserving", "doubts": [], "judgements": {"weighting": "equal"}}
    assert study.verdict("beauty", result) == (
        "beauty: a causal average does as well as learned attention (NDCG@10 -1%, p = 0.6, mean g = +0.1, 5 seeds); "
        "blocks keep 88% of each position: regime preserving."
    )
    doubt = result | {"doubts": ["too few"], "judgements": {"weighting": "unclear"}}
    assert "cannot tell learned attention" in study.verdict("beauty", doubt)
    assert study.verdict("beauty", doubt).endswith("regime preserving, not confident (too few).")
    alone = doubt | {"seeds": [0], "mean_g": None, "weighting": {"NDCG@10": test | {"p": None}}}
    assert "one seed cannot say" in study.verdict("beauty", alone) and "(NDCG@10 -1%, 1 seed)" in study.verdict(
        "beauty", alone
    )


def job_of(folder, epochs=2):
    """A finished run of the small study, as a Job of a study with so many epochs at most."""
    settings = runs.load_settings(folder / "small/softmax-0")
    log = runs.load_log(settings["data"])
    settings["training"]["epochs"] = epochs
    return study.Job(study.Dataset("small", log, settings), "softmax", 0, folder / "small/softmax-0")


def test_a_run_counts_for_the_epochs_that_it_was_to_have(finished):
    folder, _ = finished
    assert study.load_analysis(job_of(folder)) is not None
    assert study.load_analysis(job_of(folder, epochs=3)) is None  # it goes on
    with pytest.raises(UserError, match="ran for 2 epochs, longer than --epochs"):
        study.grid([job_of(folder, epochs=1).dataset], ["softmax"], 1, folder)


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
    assert study.load_analysis(job) is None
    study.execute(job)
    results, _ = study.collect([job, job._replace(attn="uniform", folder=tmp_path / "out/small/uniform-0")])
    assert results["small"]["metrics"]["softmax"]["HR@10"]["mean"] <= 1
    assert (
        study.load_analysis(job)[0]["mixing"]["all"]
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
    lines = (tmp_path / "out/study.csv").read_text().splitlines()
    assert lines[: -(3 * 2 + 3 + 2)] == (folder / "study.csv").read_text().splitlines()


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
    dataset = study.Dataset("log", runs.load_log(settings["data"]), settings)
    jobs = study.grid([dataset], ("softmax", "uniform", "identity", "recency"), 2, folder / "study")
    results, _ = study.collect(jobs)
    kept = json.loads((folder / "study/study.json").read_text())["datasets"]["log"]
    assert results["log"]["metrics"] == kept["metrics"] and results["log"]["mixing_ratio"] == kept["mixing_ratio"]
    test = runs.split_log(dataset.log, settings).test
    histories = [dataset.log.sequence[a:b] for a, b in zip(test.starts, test.stops, strict=True)]
    for job in jobs:
        analysis, ranks = study.load_analysis(job)
        config = runs.model_config(job.settings())
        parameters = runs.load_parameters(job.folder, config)
        again = np.concatenate(list(evaluate.rank_targets(parameters, config, dataset.log.sequence, test)))
        assert np.abs(again - ranks["test"]).max() <= 1  # rounding may differ from machine to machine
        if job.attn == "softmax":
            mixing = summarise(decompose(parameters, config, histories))["all"]["attn_res_ln"]["mean"]
            assert mixing == pytest.approx(analysis["mixing"]["all"]["attn_res_ln"]["mean"], rel=1e-5)
