"""The command line as a person or a script meets it: outputs, contracts, and one line for every mistake."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import ROOT, last_json, run_cli

from minirec import files, packing
from minirec.cli import main
from minirec.data.planted import N_USERS
from minirec.decompose import RATIOS, contributions, decompose
from minirec.model import encode
from minirec.training import runs
from minirec.training.progress import Progress
from minirec.training.ranking import CUTOFFS

METRICS = {f"{name}@{k}" for name in ("HR", "NDCG", "MRR") for k in CUTOFFS}


def log_file(folder, text="u1 a b c d\nu2 b c d a\nu3 c d a b\nu4 x y\n"):
    path = folder / "log.txt"
    path.write_text(text)
    return path


def test_without_a_command_the_way_is_shown_in_three_lines(tmp_path):
    process = run_cli(cwd=tmp_path)
    assert process.returncode == 0 and process.stderr == ""
    lines = process.stdout.splitlines()
    assert len(lines) == 3 and all(line.startswith("python cli.py ") for line in lines)


def test_every_command_says_what_it_is_for_in_a_line_and_gives_an_example(monkeypatch):
    overview = CliRunner().invoke(main, ["--help"]).output
    assert "..." not in overview.split("Commands:")[1], "a first sentence is cut off"
    for name in main.commands:
        assert f"python cli.py {name}" in CliRunner().invoke(main, [name, "--help"]).output
    near = CliRunner().invoke(main, ["evalute"])
    assert near.exit_code == 2 and "Did you mean 'evaluate'?" in near.output


def test_the_shell_completes_commands_and_options(tmp_path):
    environment = {"_MINIREC_COMPLETE": "bash_complete", "COMP_WORDS": "minirec train --ep", "COMP_CWORD": "2"}
    assert run_cli(cwd=tmp_path, environment=environment).stdout == "plain,--epochs\n"


def test_train_json_holds_the_test_metrics_and_nothing_else_is_on_stdout(tmp_path):
    process = run_cli("train", "--data", log_file(tmp_path), "--epochs", 2, "--json", cwd=tmp_path)
    result = last_json(process)
    assert result["epochs"] == 2 and METRICS <= set(result["test"]) and result["test"]["split"] == "test"
    assert (tmp_path / result["run"] / "checkpoint.npz").exists()
    assert "of the users, 4 are trained on, 3 have a validation target, 3 a test target" in process.stderr
    settings = json.loads((tmp_path / result["run"] / "config.json").read_text())
    assert settings["model"]["n_items"] == 6 and settings["training"]["seed"] == 0


def test_train_counts_the_users_that_the_temporal_split_trains_on_validates_and_tests(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spans = {
        "a": range(0, 30),
        "b": range(30, 60),
        "c": range(60, 83),
        "d": range(83, 90),
        "e": [70, 95, 96],
        "f": [97],
    }
    rows = [f"{user},{user}{t % 7},{t}" for user, times in spans.items() for t in times]
    (tmp_path / "log.csv").write_text("\n".join(["user,item,time", *rows]))
    arguments = ["train", "--data", "log.csv", "--split", "temporal", "--epochs", "1"]
    words = CliRunner().invoke(main, arguments).stderr
    assert "of the users, 3 are trained on, 1 have a validation target, 2 a test target" in words
    assert "training only" not in words


@pytest.mark.parametrize("epoch, status", [(1, 130), (2, 0)])
def test_ctrl_c_in_the_last_epoch_leaves_only_the_test_in_an_earlier_one_the_rest(tmp_path, monkeypatch, epoch, status):
    monkeypatch.chdir(tmp_path)
    log_file(tmp_path)
    close_epoch = Progress.close_epoch

    def interrupted(self, *arguments):
        if len(self.records) == epoch - 1:
            os.kill(os.getpid(), signal.SIGINT)
        close_epoch(self, *arguments)

    monkeypatch.setattr(Progress, "close_epoch", interrupted)
    arguments = ["train", "--data", "log.txt", "--epochs", "2", "--out", "run"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == status
    assert ("go on with: python cli.py train --resume" in result.stderr) == (epoch == 1)
    assert ("come to its end; only the test is left" in result.stderr) == ("@10" in result.stdout) == (epoch == 2)


@pytest.mark.parametrize(
    "command",
    [
        ("train", "--data", "log.csv", "--epochs", 1),
        ("study", "--data", "log.csv", "--epochs", 1),
        ("describe", "log.csv"),
    ],
)
def test_a_table_without_times_is_remarked_on(tmp_path, command):
    rows = [f"u{u},i{(u + i) % 5},{i}" for u in range(4) for i in range(4)]
    (tmp_path / "log.csv").write_text("\n".join(["user,item,clicked", *rows]))
    assert "log.csv: no column of times" in run_cli(*command, cwd=tmp_path).stderr
    assert "no column of times" not in run_cli(*command, "--columns", "user,item,clicked", cwd=tmp_path).stderr


def test_commands_without_a_run_take_the_newest(tmp_path):
    for attn in ("softmax", "identity"):
        run_cli("train", "--data", log_file(tmp_path), "--epochs", 1, "--attn", attn, cwd=tmp_path)
    result = last_json(run_cli("evaluate", "--json", cwd=tmp_path))
    assert result["attn"] == ["identity", "identity"]


@pytest.mark.parametrize("command", ["evaluate", "decompose", "recommend"])
def test_without_any_run_the_command_to_make_one_is_named(tmp_path, command):
    process = run_cli(command, cwd=tmp_path)
    assert process.returncode == 1 and "python cli.py train" in process.stderr


def test_evaluate_json(trained):
    result = last_json(run_cli("evaluate", trained, "--json", cwd=trained))
    assert METRICS <= set(result) and result["split"] == "test" and result["users"] == N_USERS
    other = last_json(run_cli("evaluate", trained, "--no-filter-seen", "--split", "valid", "--json", cwd=trained))
    assert other["split"] == "valid" and other["unreachable"] == 0


def test_evaluate_with_substituted_weights(trained):
    found = {
        blocks: last_json(run_cli("evaluate", trained, "--attn", "identity", *blocks, "--json", cwd=trained))
        for blocks in ((), ("--attn-blocks", "0,1"), ("--attn-blocks", "1"))
    }
    assert found[()] == found["--attn-blocks", "0,1"]
    assert found["--attn-blocks", "1"]["attn"] == ["softmax", "identity"]
    assert found["--attn-blocks", "1"]["NDCG@100"] != found[()]["NDCG@100"]


def test_decompose_json_and_files(trained, tmp_path):
    process = run_cli("decompose", trained, "--json", "--out", tmp_path / "d", cwd=tmp_path)
    result = last_json(process)
    assert set(result) == {"blocks", "all", "without_first", "latest"} and len(result["blocks"]) == 2
    for values in (*result["blocks"], result["all"], result["without_first"], result["latest"]):
        assert set(values) == {*RATIOS, "entropy"}
        assert all(set(v) == {"mean", "median", "std", "n"} for v in values.values())
    with np.load(tmp_path / "d/decomposition.npz", allow_pickle=False) as arrays:
        assert arrays["users"][0] == "account 0" and arrays["positions"][0] == 0
        for i in (0, 1):
            for name in RATIOS:
                assert len(arrays[f"blocks.{i}.{name}"]) == len(arrays["users"]) == len(arrays["positions"])
            mean = arrays[f"blocks.{i}.attn_res_ln"].mean()
            assert mean == pytest.approx(result["blocks"][i]["attn_res_ln"]["mean"], rel=1e-5)
    pictures = [f.name for f in (tmp_path / "d").glob("*.png")]
    assert pictures == ["heatmaps.png"] or "matplotlib" in process.stderr


def test_decompose_without_matplotlib_writes_the_numbers(trained, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    environment = {"PYTHONPATH": str(tmp_path)}
    process = run_cli("decompose", trained, "--out", tmp_path / "d", cwd=tmp_path, environment=environment)
    assert process.returncode == 0 and "pip install matplotlib" in process.stderr
    assert [f.name for f in (tmp_path / "d").iterdir()] == ["decomposition.npz"]


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "qtagg", "svg"])
def test_a_picture_needs_no_display_and_no_backend_of_the_environment(tmp_path, backend):
    pytest.importorskip("matplotlib")
    code = (
        "import os, sys; from minirec.studies import plots\n"
        "figure = plots.learning_curves('log', {'softmax': [[0.1, 0.2]]})\n"
        "plots.write(figure, 'picture.png')\n"
        "assert not any('pyplot' in name for name in sys.modules)\n"
        "import matplotlib; print(os.environ['MPLBACKEND'], dict.get(matplotlib.rcParams, 'backend'))"
    )
    environment = os.environ | {"MPLBACKEND": backend, "PYTHONPATH": str(ROOT)}
    environment.pop("DISPLAY", None)
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
    variable, used_elsewhere = process.stdout.split(maxsplit=1)
    assert variable == backend and ("module" in backend or used_elsewhere.strip() == backend)


def test_recommend_names_unseen_items(trained, tmp_path):
    process = run_cli("recommend", trained, "--history", "item 3, item 7, atlantis", "--top", 5, cwd=tmp_path)
    lines = process.stdout.splitlines()
    assert len(lines) == 5 and "atlantis" in process.stderr
    assert not any(f" {seen} " in line for line in lines for seen in ("item 3", "item 7"))
    process = run_cli("recommend", trained, "--user", "account 5", "--explain", cwd=tmp_path)
    assert "(latest)" in process.stdout and "%" in process.stdout


def test_recommend_for_everyone(trained, tmp_path):
    process = run_cli("recommend", trained, "--all", "--out", "all.csv", "--top", 3, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    with open(tmp_path / "all.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * N_USERS and rows[0]["user"] == "account 0" and rows[0]["rank"] == "1"


def invoke(*arguments):
    """Run a command in this process; return what click tells of it."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """A run folder, and what `train --json` said of it, on a log in which nothing is even.

    33 users of 12 items: every fifth one, the first among them, is too short for a target; most histories are longer
    than max_length; user 32 has had all items, user 31 all but one. The last epoch is not the best one.
    """
    folder, rng = tmp_path_factory.mktemp("ragged"), np.random.default_rng(0)
    histories = [rng.integers(12, size=rng.integers(3, 9) if u % 5 else 2) for u in range(31)]
    histories += [rng.permutation(11), rng.permutation(12)]
    lines = [" ".join([f"u{u}", *(f"i{item}" for item in items)]) for u, items in enumerate(histories)]
    options = ("--max-length", 4, "--hidden", 8, "--lr", 0.05, "--epochs", 7, "--workers", 1)
    path = log_file(folder, "\n".join(lines))
    result = invoke("train", "--data", path, *options, "--out", folder / "run", "--json")
    return folder / "run", json.loads(result.stdout)


def opened(folder):
    """The parameters, config and log of a run folder."""
    settings = runs.load_settings(folder)
    config = runs.model_config(settings)
    return runs.load_parameters(folder, config), config, runs.load_run_log(folder, settings)


def cells(text):
    """Read a table whose columns two blanks or more set apart: {title of the row: {heading: cell}}."""
    (_, *headings), *rows = (re.split(" {2,}", line.strip()) for line in text.splitlines())
    return {title: dict(zip(headings, values, strict=True)) for title, *values in rows}


def test_train_tells_of_the_epoch_that_it_kept(ragged):
    folder, result = ragged
    records = files.read_json_lines(folder / "metrics.jsonl")
    kept = max(records, key=lambda record: record["NDCG@10"])
    assert kept["epoch"] < len(records) and kept["NDCG@10"] > records[-1]["NDCG@10"]
    assert (result["epochs"], result["best_epoch"], result["loss"]) == (len(records), kept["epoch"], kept["loss"])
    assert result["valid"] == {name: kept[name] for name in METRICS}
    assert result["steps"] == sum(record["steps"] for record in records)
    assert result["train_seconds"] == pytest.approx(sum(record["train_seconds"] for record in records))
    for part in ("valid", "test"):
        evaluated = json.loads(invoke("evaluate", folder, "--split", part, "--json").stdout)
        assert {name: result[part][name] for name in METRICS} == {name: evaluated[name] for name in METRICS}


@pytest.mark.parametrize("part, back", [("test", 1), ("valid", 2)])
@pytest.mark.parametrize("filter_seen", [True, False])
@pytest.mark.parametrize(
    "attn, blocks, weightings",
    [
        (None, None, ("softmax", "softmax")),
        ("uniform", None, ("uniform", "uniform")),
        ("uniform", "1", ("softmax", "uniform")),
    ],
)
def test_an_evaluation_ranks_what_its_options_say(ragged, part, back, filter_seen, attn, blocks, weightings):
    folder, _ = ragged
    parameters, config, log = opened(folder)
    options = ["--split", part, "--filter-seen" if filter_seen else "--no-filter-seen"]
    options += ["--attn", attn] if attn else []
    options += ["--attn-blocks", blocks] if blocks else []
    result = invoke("evaluate", folder, *options, "--json")
    values, ranks = json.loads(result.stdout), []
    for history in filter(lambda history: len(history) >= 3, map(log.history, range(len(log.users)))):
        before, target = history[:-back], history[-back]
        (x,) = encode(parameters, replace(config, attn=weightings), [before])
        scores = parameters["item_embedding"] @ x[-1]
        if filter_seen:
            scores[before] = -np.inf
        ranks.append(np.inf if np.isneginf(scores[target]) else (scores > scores[target]).sum())
    ranks = np.array(ranks)
    for k in CUTOFFS:
        gains = {"HR": np.ones(len(ranks)), "NDCG": 1 / np.log2(ranks + 2), "MRR": 1 / (ranks + 1)}
        for name, gain in gains.items():
            assert values.pop(f"{name}@{k}") == pytest.approx(np.where(ranks < k, gain, 0).mean())
    missed = int(np.isinf(ranks).sum())
    assert set(values.pop("baselines")) == {"popularity", "transitions"}
    assert values == {
        "split": part, "attn": list(weightings), "filter_seen": filter_seen, "users": 26, "unreachable": missed,
    }  # fmt: skip
    assert (missed > 0) == filter_seen == (f"{missed} of 26 targets are items the user had before" in result.stderr)


def test_a_table_of_metrics_holds_under_each_heading_what_json_does(ragged, tmp_path):
    folder, _ = ragged
    for part in ("test", "valid"):
        values = json.loads(invoke("evaluate", folder, "--split", part, "--json").stdout)
        first, second, *rows = invoke("evaluate", folder, "--split", part).stdout.splitlines()
        assert first.split() == [part, "softmax", "popularity", "transitions"]
        assert second.split() == ["HR", "NDCG", "MRR"] * 3
        assert len({values[f"{name}@10"] for name in ("HR", "NDCG", "MRR")}) == 3
        ranked = [values, values["baselines"]["popularity"], values["baselines"]["transitions"]]
        assert [row.split() for row in rows] == [
            [f"@{k}", *(f"{found[f'{name}@{k}']:.4f}" for found in ranked for name in ("HR", "NDCG", "MRR"))]
            for k in CUTOFFS
        ]


def test_a_table_of_mixing_ratios_holds_under_each_heading_what_json_does(ragged):
    folder, _ = ragged
    summary = json.loads(invoke("decompose", folder, "--json").stdout)
    rows = {f"block {i}": block for i, block in enumerate(summary["blocks"])}
    rows |= {title: summary[title.replace(" ", "_")] for title in ("all", "without first", "latest")}
    names = dict(zip(("Attn", "AttnRes", "AttnResLN", "entropy of A"), (*RATIOS, "entropy"), strict=True))
    assert cells(invoke("decompose", folder).stdout) == {
        title: {heading: "{mean:.3f} ({median:.3f})".format(**row[name]) for heading, name in names.items()}
        for title, row in rows.items()
    }


def test_a_decomposition_holds_under_each_users_name_that_of_the_users_history(ragged, tmp_path):
    folder, _ = ragged
    parameters, config, log = opened(folder)
    invoke("decompose", folder, "--out", tmp_path)
    arrays = files.read_arrays(tmp_path / "decomposition.npz")
    evaluated = [user for user in range(len(log.users)) if len(log.history(user)) >= 3]
    assert list(dict.fromkeys(arrays["users"])) == [log.users[user] for user in evaluated] and evaluated[0] == 1
    for user in evaluated:
        rows = arrays["users"] == log.users[user]
        alone = decompose(parameters, config, [log.history(user)[:-1]])
        np.testing.assert_array_equal(arrays["positions"][rows], alone["positions"])
        for i, block in enumerate(alone["blocks"]):
            for name in (*RATIOS, "entropy"):
                np.testing.assert_allclose(arrays[f"blocks.{i}.{name}"][rows], block[name], atol=1e-5)


@pytest.mark.parametrize("backs", [4, 7, 11])  # as long as max_length, and longer
def test_an_explanation_names_the_items_that_the_model_sees(ragged, backs):
    folder, _ = ragged
    parameters, config, log = opened(folder)
    history = log.history(32)[:backs]
    names = ",".join(log.items[item] for item in history)
    printed = invoke("recommend", folder, "--history", names, "--explain").stdout
    shares = [norms[-1] / norms[-1].sum() for norms in contributions(parameters, config, history[-4:])]  # [4] a block
    expected = {}
    for place in sorted(range(4), key=lambda place: -sum(share[place] for share in shares)):
        when = "latest" if place == 3 else f"{3 - place} back"
        share = {f"block {i}": f"{share[place]:.1%}" for i, share in enumerate(shares)}
        expected[f"{log.items[history[place - 4]]} ({when})"] = share
    found = cells(printed[printed.index("share of the last position") :])
    assert found == expected and list(found) == list(expected)


def test_an_explanation_shows_the_ten_largest_shares_however_small_the_norms(ragged, tmp_path):
    folder, _ = ragged
    invoke("train", "--data", folder.parent / "log.txt", "--max-length", 20, "--epochs", 1, "--out", tmp_path / "run")
    parameters, config, log = opened(tmp_path / "run")
    for block in (0, 1):
        parameters[f"blocks.{block}.attention_norm.gamma"] *= 1e-3
    files.write_arrays(tmp_path / "run/checkpoint.npz", parameters)
    printed = invoke("recommend", tmp_path / "run", "--user", "u32", "--explain").stdout
    found = cells(printed[printed.index("share of the last position") :])
    shares = [norms[-1] / norms[-1].sum() for norms in contributions(parameters, config, log.history(32))]
    order = np.argsort(-sum(shares), kind="stable")[:10]
    assert [[values[f"block {i}"] for i in (0, 1)] for values in found.values()] == [
        [f"{share[place]:.1%}" for share in shares] for place in order
    ]


def plain_recommendations(parameters, config, log, user):
    """The (item, score) of all items that a user has not had, best first."""
    (x,) = encode(parameters, config, [log.history(user)])
    scores = parameters["item_embedding"] @ x[-1]
    unseen = set(range(len(log.items))) - set(log.history(user).tolist())
    return [(log.items[item], scores[item]) for item in sorted(unseen, key=lambda item: -scores[item])]


def test_an_export_holds_each_users_best_unseen_items_and_no_others(ragged, tmp_path, monkeypatch):
    folder, _ = ragged
    monkeypatch.setattr(packing, "CPU_PLAN", packing.CPU_PLAN._replace(loss_bytes=1, loss_rows=1))  # 16, 16 and 1 users
    said = invoke("recommend", folder, "--all", "--top", 5, "--out", tmp_path / "all.csv").stderr
    assert said.endswith("all.csv: 32 users\n") and b"\r" not in (tmp_path / "all.csv").read_bytes()
    parameters, config, log = opened(folder)
    expected = []
    for user, name in enumerate(log.users):
        best = enumerate(plain_recommendations(parameters, config, log, user)[:5], 1)
        expected += [(name, str(rank), item, score) for rank, (item, score) in best]
    with open(tmp_path / "all.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["user", "rank", "item", "score"]
    assert [row[:3] for row in rows] == [list(row[:3]) for row in expected]
    assert [float(row[3]) for row in rows] == pytest.approx([row[3] for row in expected], abs=1e-4)
    assert [sum(row[0] == f"u{user}" for row in rows) for user in (0, 31, 32)] == [5, 1, 0]


@pytest.mark.parametrize("user", [0, 7, 31, 32])
def test_one_users_recommendations_are_the_best_unseen_items_and_no_others(ragged, user):
    folder, _ = ragged
    result = invoke("recommend", folder, "--user", f"u{user}", "--top", 5)
    expected = plain_recommendations(*opened(folder), user)[:5]
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [row[:2] for row in rows] == [[str(rank), item] for rank, (item, _) in enumerate(expected, 1)]
    assert [float(row[2]) for row in rows] == pytest.approx([score for _, score in expected], abs=1e-3)
    assert ("nothing to recommend" in result.stderr) == (user == 32)


def test_a_description_fits_a_screen_and_names_the_next_command(tmp_path):
    log_file(tmp_path, "who,what,when\n" + "".join(f"u{i % 7},i{i % 5},2014-05-{10 + i % 21}\n" for i in range(100)))
    process = run_cli("describe", "log.txt", "--columns", "who,what,when", "--k-core", 2, cwd=tmp_path)
    assert process.returncode == 0 and len(process.stdout.splitlines()) < 30, process.stderr
    assert "7 users, 5 items, 100 interactions" in process.stdout and "2014-05-30 00:00:00" in process.stdout
    remark, next_command = process.stderr.splitlines()
    assert remark.startswith("log.txt: ties: 79 of 93 neighbouring interactions (84.9%) share a time")
    assert next_command == "next: python cli.py study --data log.txt --columns who,what,when --k-core 2"
    process = run_cli("describe", "household", cwd=tmp_path)
    assert process.stderr == "next: python cli.py study --data household\n"


@pytest.fixture(scope="module")
def run_with_names_in_many_scripts(tmp_path_factory):
    """The folder of a log whose names no narrow encoding holds, `log.csv`, and of a run on it, `run`."""
    folder = tmp_path_factory.mktemp("scripts")
    rows = [f"ü{u},{'日本' if i % 2 else 'café'} {i},{i}" for u in range(6) for i in range(u % 3, 7)]
    (folder / "log.csv").write_text("\n".join(["user,item,time", *rows]), encoding="utf-8")
    assert run_cli("train", "--data", "log.csv", "--epochs", 1, "--out", "run", cwd=folder).returncode == 0
    return folder


@pytest.mark.parametrize(
    "encoding, coffee", [("utf-8", "café"), ("cp1252", "café"), ("cp437", "café"), ("cp1251", "caf\\xe9")]
)
def test_what_a_console_cannot_show_is_escaped_and_stops_no_command(
    run_with_names_in_many_scripts, monkeypatch, encoding, coffee
):
    monkeypatch.chdir(run_with_names_in_many_scripts)

    def printed(*arguments, status=0):
        result = CliRunner(charset=encoding).invoke(main, arguments)
        assert result.exit_code == status and not isinstance(result.exception, UnicodeError)
        return (result.stdout_bytes + (result.stderr_bytes or b"")).decode(encoding)  # strictly

    for arguments in (
        ("describe", "log.csv"),
        ("trace",),
        ("evaluate", "run"),
        ("decompose", "run"),
        ("report", "run"),
    ):
        assert printed(*arguments)
    japanese = "日本" if encoding == "utf-8" else "\\u65e5\\u672c"
    shown = printed("recommend", "run", "--explain")
    assert shown.count("back)") + shown.count("latest)") > 2 and japanese in shown and coffee in shown
    assert japanese in printed("recommend", "run", "--user", "日本", status=1)  # our own message
    assert japanese in printed("recommend", "run", "--日本", status=2)  # click's


def test_a_description_holds_in_each_line_the_numbers_of_json(tmp_path):
    rng = np.random.default_rng(1)
    rows = [(rng.geometric(0.03), rng.geometric(0.1), 1_400_000_000 + 600 * rng.integers(300)) for _ in range(2000)]
    rows += [(user, item, time + extra) for user, item, time in rows[:40] for extra in (0, 1)]
    log_file(tmp_path, "user,item,time\n" + "".join(f"u{u},i{i},{t}\n" for u, i, t in rows))
    command = ("describe", tmp_path / "log.txt", "--split", "temporal")
    found, lines = json.loads(invoke(*command, "--json").stdout), invoke(*command).stdout.splitlines()
    understood, lines = lines[2:5], [*lines[:2], *lines[5:]]
    first = [(time, item) for user, item, time in sorted(rows, key=lambda row: row[2]) if user == rows[0][0]][:3]
    dates = [f"{datetime.fromtimestamp(int(time), UTC):%Y-%m-%d %H:%M:%S}" for time, _ in first]
    assert [line[15:] for line in understood] == [
        f"user 'u{rows[0][0]}', item 'i{item}', time {date}" for (_, item), date in zip(first, dates, strict=True)
    ]

    def size(part):
        return [f"{part[name]:,}" for name in ("users", "items", "interactions")]

    def share(number, of):
        assert number > 0
        return [f"{number:,}", f"{100 * number / of:.1f}"]

    n, repeats, held = map(found.get, ("interactions", "repeats", "split"))
    *lengths, mean = found["history_lengths"].values()
    study = [f"{found['study'][name]}" for name in ("max_length", "dropout")]
    assert [re.findall(r"\d+(?:[,.]\d+)*", line) for line in lines[2:]] == [
        [*size(found), f"{100 * found['density']:.3g}"],
        ["10", "25", "75", "90"],  # percent
        [*(f"{length:,}" for length in lengths), f"{mean:,.1f}"],
        share(repeats["seen_before"], n),
        share(repeats["immediate"], n),
        share(found["time"]["ties"], n),
        [f"{held['train_users']:,}", f"{held['valid_users']:,}", f"{held['test_users']:,}"],
        [f"{held['cold']:,}", f"{held['test_users']:,}"],
        [f"{held['unreachable']:,}", f"{held['test_users']:,}"],
        ["5", *size(found["k_core"]["5"])],
        ["10", *size(found["k_core"]["10"])],
        study,
    ]
    titles = ["log", "histories", "", "repeats", "", "time", "temporal", "", ""]
    assert [line[:15].strip() for line in lines[2:]] == [*titles, "5-core", "10-core", "study"]
    assert re.split(" {2,}", lines[3])[1:] == ["min", "10 %", "25 %", "median", "75 %", "90 %", "max", "mean"]
    assert lines[-4].endswith("where people buy again, use --no-filter-seen")  # more than a fifth are repeats
    assert f"{found['time']['first']} to {found['time']['last']} UTC" in lines[0]
    trained = invoke("train", "--data", *command[1:], "--epochs", 1, "--out", tmp_path / "run")
    assert f"{held['valid_users']} have a validation target, {held['test_users']} a test target" in trained.stderr


def test_a_description_says_what_a_log_lacks(tmp_path):
    log_file(tmp_path, "user,item,time\n" + "".join(f"u{n % 3},i{n},{n}\n" for n in range(12)))
    lines = invoke("describe", tmp_path / "log.txt").stdout.splitlines()
    assert "times 0 to 11" in lines[0]
    lacks = ["of an item", "directly after", "at the same time"]
    assert all(any(line[15:].startswith(f"none {words}") for line in lines) for words in lacks)
    assert not any("cannot be hit" in line for line in lines)
    log_file(tmp_path)
    assert "time           no timestamps: each user's" in invoke("describe", tmp_path / "log.txt").stdout


def test_data_sends_nobody_to_a_study_that_refuses_the_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log_file(tmp_path, "u1 a b c\nu2 b c a\nu3 c a b\n")
    described, studied = (
        CliRunner().invoke(main, words) for words in (["describe", "log.txt"], ["study", "--data", "log.txt"])
    )
    assert "0 users to train on, 3 users for validation, 3 users for the test" in described.stdout
    assert "too small to study: no user to train on" in described.stderr and "next" not in described.stderr
    assert studied.exit_code == 1 and "log.txt: nothing to train on: besides what is held out" in studied.stderr


def test_gradcheck_prints_every_tensor(tmp_path):
    process = run_cli("gradcheck", "--attn", "softmax", cwd=tmp_path)
    assert process.returncode == 0 and "all below 1e-06" in process.stdout
    first = [line.strip().split("  ")[0] for line in process.stdout.splitlines()]
    assert first.index("cross_entropy") < first.index("attention_backward, softmax") < first.index("block 1")
    assert first.index("block 1") < first.index("block 0") < first.index("item_embedding")
    assert first.count("attention.w_q") == 2 and "position_embedding" in first


def start_training(folder, *arguments):
    """A process that trains, with two workers, in a session of its own; returned after its first epoch."""
    command = [sys.executable, str(ROOT / "cli.py"), "train", *arguments, "--out", "run", "--workers", "2"]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while "epoch   1" not in process.stderr.readline():
        assert process.poll() is None
    return process


def test_ctrl_c_keeps_what_was_reached_and_resume_goes_on(tmp_path):
    whole = run_cli("train", "--epochs", 4, "--out", "whole", cwd=tmp_path)
    assert whole.returncode == 0
    process = start_training(tmp_path, "--epochs", "4")
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 130, rest
    assert "--resume" in rest and "Traceback" not in rest
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == sorted(set(runs.FILES) - {runs.LOG})
    resumed = run_cli("train", "--resume", "--out", "run", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    for name in ("checkpoint.npz", "state.npz"):
        first, second = (files.read_arrays(tmp_path / folder / name) for folder in ("whole", "run"))
        for key in set(first) - {"seconds"}:
            np.testing.assert_array_equal(first[key], second[key])


def test_sigterm_to_a_whole_session_is_a_stop_too(tmp_path):
    process = start_training(tmp_path)
    os.killpg(process.pid, signal.SIGTERM)  # as a batch system does
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "train --resume --out run" in rest.splitlines()[-1]
    records = files.read_json_lines(tmp_path / "run/metrics.jsonl")
    assert len(records) == files.read_arrays(tmp_path / "run/state.npz")["step"] // records[0]["steps"]


def test_runs_killed_at_random_moments_end_in_the_same_bits():
    command = [sys.executable, str(ROOT / "tests/benchmarks/kills.py"), "--kills", "3", "--study-kills", "0"]
    process = subprocess.run([*command, "--seed", "0"], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert "3 of 3 ended in the bits of the one that was not killed" in process.stdout


def test_a_run_in_use_is_left_alone_by_a_second_process(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    with runs.opened(tmp_path / "run", resume=True):
        process = run_cli("train", "--resume", "--epochs", 9, "--out", "run", cwd=tmp_path)
    assert process.returncode == 1 and "run: in use by another process" in process.stderr.splitlines()[-1]


def test_a_damaged_state_is_named_in_one_line_and_the_one_before_is_used(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    os.truncate(tmp_path / "run/state.npz", 1000)
    process = run_cli("train", "--resume", "--epochs", 2, "--out", "run", "--json", cwd=tmp_path)
    assert last_json(process)["epochs"] == 2
    (line,) = (line for line in process.stderr.splitlines() if "state.npz" in line)
    assert line.startswith("run/state.npz: not a readable npz") and line.endswith("going on from state.previous.npz")
    for name in runs.STATES:
        (tmp_path / "run" / name).write_bytes(b"x")
    process = run_cli("train", "--resume", "--epochs", 2, "--out", "run", cwd=tmp_path)
    assert process.returncode == 1 and "state.previous.npz" in process.stderr.splitlines()[-1]


def test_a_killed_run_leaves_no_worker_and_no_lock(tmp_path):
    process = start_training(tmp_path)
    process.kill()
    process.communicate(timeout=30)  # returns once the workers, too, have closed stderr
    resumed = run_cli("train", "--resume", "--epochs", 3, "--out", "run", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr


MISTAKES = {
    "missing log": (["train", "--data", "nowhere.txt"], 1, "nowhere.txt"),
    "misspelt dataset": (["train", "--data", "chian"], 1, "did you mean 'chain'?"),
    "misspelt file": (["train", "--data", "lgo.txt"], 1, "did you mean 'log.txt'?"),
    "public log": (["train", "--data", "ml-1M"], 1, "; for the public log: python cli.py fetch ml-1m"),
    "nothing to resume": (["train", "--resume", "--out", "nowhere"], 1, "no run to go on with"),
    "nothing to describe": (["describe", "--json"], 2, "Missing argument 'FILE'"),
    "missing log to describe": (["describe", "nowhere.txt"], 1, "nowhere.txt"),
    "unknown option of describe": (["describe", "log.txt", "--colour"], 2, "--colour"),
    "missing run": (["evaluate", "nowhere"], 1, "not a run folder"),
    "folder without a run": (["decompose", "."], 1, "not a run folder"),
    "heads": (["train", "--heads", 3], 2, "3 heads do not divide"),
    "no epochs": (["train", "--epochs", 0], 2, "--epochs"),
    "negative batch": (["train", "--batch-size", -1], 2, "--batch-size"),
    "NaN rate": (["train", "--lr", "nan"], 2, "--lr"),
    "infinite rate": (["train", "--lr", "inf"], 2, "--lr"),
    "NaN dropout": (["train", "--dropout", "nan"], 2, "--dropout"),
    "all dropped": (["train", "--dropout", 1], 2, "--dropout"),
    "unknown weighting": (["train", "--attn", "linear"], 2, "softmax"),
    "negative seed": (["train", "--seed", -1], 2, "--seed"),
    "no GPU": (["train", "--backend", "cupy"], 1, "--backend numpy"),
    "a model beyond memory": (["train", "--max-length", 1 << 24, "--hidden", 1 << 10], 1, "--max-length"),
    "sizes beyond numbers": (["train", "--hidden", 10**400], 2, "--hidden"),
    "one column": (["train", "--data", "log.txt", "--columns", "user"], 1, "2 to 4 different"),
    "no block named": (["evaluate", "RUN", "--attn", "uniform", "--attn-blocks", ""], 2, "--attn-blocks"),
    "an endless log": (["train", "--data", "/dev/zero"], 1, "not a regular file"),
    "unknown columns": (["train", "--data", "log.txt", "--columns", "a,b"], 1, "no columns a, b"),
    "out is a file": (["train", "--data", "log.txt", "--out", "log.txt"], 1, "log.txt"),
    "attn-blocks without attn": (["evaluate", "RUN", "--attn-blocks", "0"], 2, "--attn"),
    "no such block": (["evaluate", "RUN", "--attn", "uniform", "--attn-blocks", "2"], 2, "0 to 1"),
    "another log": (["decompose", "RUN", "--data", "log.txt"], 1, "not the log"),
    "unknown user": (["recommend", "RUN", "--user", "account 9999"], 1, "did you mean 'account"),
    "unknown history": (["recommend", "RUN", "--history", "a,b"], 1, "items look like"),
    "empty history": (["recommend", "RUN", "--history", ""], 1, "history: it is empty"),
    "two selections": (["recommend", "RUN", "--user", "a", "--all", "--out", "x.csv"], 2, "choose one"),
    "all without out": (["recommend", "RUN", "--all"], 2, "--out"),
    "out in no folder": (["recommend", "RUN", "--all", "--out", "no/x.csv"], 1, "no/x.csv"),
}


@pytest.mark.parametrize("arguments, status, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_end_in_one_line_and_write_nothing(tmp_path, trained, arguments, status, message):
    log_file(tmp_path)
    if arguments[-1] == "cupy" and shutil.which("nvidia-smi"):
        pytest.skip("this machine may have a GPU")
    process = run_cli(*(trained if a == "RUN" else a for a in arguments), cwd=tmp_path)
    assert process.returncode == status, process.stderr
    assert message in process.stderr and "Traceback" not in process.stderr
    assert process.stdout == ""
    assert "Error: " in process.stderr.splitlines()[-1]
    assert [f.name for f in tmp_path.iterdir()] == ["log.txt"]


def test_a_loss_that_is_not_finite_ends_in_one_line(tmp_path):
    process = run_cli("train", "--lr", 1e30, "--epochs", 2, "--out", "run", cwd=tmp_path)
    assert process.returncode == 1 and "try a smaller --lr" in process.stderr
    assert "Warning" not in process.stderr and "Traceback" not in process.stderr
    process = run_cli("evaluate", "run", cwd=tmp_path)
    assert process.returncode == 1 and "--resume" in process.stderr


@pytest.mark.parametrize("command", [("evaluate", "run"), ("train", "--resume", "--out", "run")])
def test_a_path_in_a_run_is_not_looked_into_unless_its_fingerprint_matches(trained, tmp_path, command):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "secret").write_text("xyzzy:x:0:0\n")
    settings = json.loads((tmp_path / "run/config.json").read_text())
    settings["data"]["path"] = str(tmp_path / "secret\x1b[2J\n")
    (tmp_path / "secret").rename(settings["data"]["path"])
    (tmp_path / "run/config.json").write_text(json.dumps(settings))
    process = run_cli(*command, cwd=tmp_path)
    assert process.returncode == 1 and "--data" in process.stderr and "xyzzy" not in process.stderr
    assert "\x1b" not in process.stderr


def test_a_folder_named_like_the_embedded_dataset_does_no_harm(tmp_path):
    assert run_cli("train", "--epochs", 1, "--out", "household", cwd=tmp_path).returncode == 0
    assert run_cli("evaluate", "household", cwd=tmp_path).returncode == 0


def test_an_id_with_a_comma_can_be_quoted_in_a_history(tmp_path):
    log_file(tmp_path, "u1 a,1 b c d\nu2 b c d a,1\nu3 c d a,1 b\n")
    run_cli("train", "--data", "log.txt", "--format", "lines", "--epochs", 1, "--out", "run", cwd=tmp_path)
    process = run_cli("recommend", "run", "--history", '"a,1", b', cwd=tmp_path)
    assert process.returncode == 0 and len(process.stdout.splitlines()) == 2


def test_what_is_no_regular_file_is_written_into(trained, tmp_path):
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    run_cli("recommend", trained, "--all", "--top", 1, "--out", "link.csv", cwd=tmp_path)
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "real.csv").exists()
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", "pipe"], cwd=tmp_path, stdout=subprocess.PIPE) as reader:
        run_cli("recommend", trained, "--all", "--top", 1, "--out", "pipe", cwd=tmp_path)
        assert len(reader.communicate(timeout=30)[0].splitlines()) == 1 + N_USERS


def test_a_moved_log_is_asked_for_and_found_again(tmp_path):
    path = log_file(tmp_path)
    run_cli("train", "--data", path, "--epochs", 1, "--out", "run", cwd=tmp_path)
    path.rename(tmp_path / "moved.txt")
    process = run_cli("evaluate", "run", cwd=tmp_path)
    assert process.returncode == 1 and "--data" in process.stderr
    assert last_json(run_cli("evaluate", "run", "--data", "moved.txt", "--json", cwd=tmp_path))["users"] == 3
    (tmp_path / "moved.txt").write_text("u1 a b c d\nu2 b c d x\nu3 c d a b\nu4 x y\n")
    assert run_cli("decompose", "run", "--data", "moved.txt", cwd=tmp_path).returncode == 1


DAMAGED = [
    ("config.json", lambda text: text[:-9]),
    ("config.json", lambda text: "[]"),
    ("config.json", lambda text: text.replace('"hidden_size": 64', '"hidden_size": 64.0')),
    ("config.json", lambda text: text.replace('"columns": null', '"columns": 5')),
    ("config.json", lambda text: text.replace('"batch_size": 128', '"batch_size": 0')),
    ("config.json", lambda text: text.replace('"n_blocks": 2', '"n_blocks": 1000000000')),
    ("config.json", lambda text: text.replace('"n_items": 200', '"n_items": 1' + "0" * 15)),
    ("config.json", lambda text: text.replace('"path": "', '"path": "\\u0000')),
    ("config.json", lambda text: text + " " * (1 << 20)),
    ("items.json", lambda text: text.replace("item 3", "\\u001b[2J")),
    ("items.json", lambda text: '["' + "x" * (1 << 22) + '"]'),
    ("items.json", lambda text: '["a"]'),
    ("items.json", lambda text: "[" * 100_000),
]


@pytest.mark.parametrize("name, damage", DAMAGED)
def test_damaged_run_files_are_named(trained, tmp_path, name, damage):
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / name
    damaged = damage(path.read_text())
    assert damaged != path.read_text()
    path.write_text(damaged)
    process = run_cli("evaluate", "run", cwd=tmp_path)
    assert process.returncode == 1 and name in process.stderr and "Traceback" not in process.stderr
    assert "\x1b" not in process.stderr and len(process.stderr) < 1000


def test_out_of_memory_names_a_batch_size_to_try(tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("minirec.cli.train.train_model", fail)
    result = CliRunner().invoke(main, ["train", "--batch-size", "96", "--out", str(tmp_path / "run")])
    assert result.exit_code == 1 and "start a new run with --batch-size 48" in result.output
