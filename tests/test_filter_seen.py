"""Logs in which people buy again: seen items are candidates or not, the same in every command; and counts beside it."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from helpers import ROOT, call_cli, counted_by_hand, last_json, ranked_by_hand, run_cli

from minirec import files, model
from minirec.errors import UserError
from minirec.report import page
from minirec.studies import grid, results
from minirec.training import ranking, runs
from minirec.training.fit import load
from minirec.training.progress import best
from minirec.training.settings import settings_fingerprint

OPTIONS = {True: "--filter-seen", False: "--no-filter-seen"}
SMALL = ("--hidden", 8, "--heads", 1, "--dropout", 0.1, "--lr", 0.01)


def write_log(path, sequences):
    path.write_text("".join(f"u{u} " + " ".join(f"i{i}" for i in s) + "\n" for u, s in enumerate(sequences)))
    return path


@pytest.fixture(scope="module")
def bought_again(tmp_path_factory):
    """The path of a log of 41 users who had most test targets before."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("logs") / "again.txt"
    return write_log(path, [rng.integers(14, size=rng.integers(5, 20)) for _ in range(41)])


@pytest.fixture(scope="module")
def trained_runs(bought_again, tmp_path_factory):
    """{filter_seen: (folder, what train printed as JSON)} of two runs on it."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for filter_seen, option in OPTIONS.items():
        out = folder / option.strip("-")
        arguments = ("--data", bought_again, "--epochs", 3, "--max-length", 8, *SMALL, "--out", out, "--json")
        found[filter_seen] = out, last_json(call_cli("train", *arguments, option))
    return found


def opened(folder):
    """Parameters, configuration, log and split of a run."""
    settings = runs.load_settings(folder)
    config, log = runs.model_config(settings), runs.load_run_log(folder, settings)
    return runs.load_parameters(folder, config), config, log, runs.split_log(log, settings)


def close(found, expected):
    """The metrics are equal; `found` may hold other keys."""
    return all(found[name] == pytest.approx(value, abs=1e-12) for name, value in expected.items())


@pytest.mark.parametrize("filter_seen", [True, False])
def test_training_validates_and_tests_as_ranked_by_hand(trained_runs, filter_seen):
    folder, printed = trained_runs[filter_seen]
    assert json.loads((folder / "config.json").read_text())["training"]["filter_seen"] is filter_seen
    parameters, config, log, split = opened(folder)
    chosen = best(files.read_json_lines(folder / "metrics.jsonl"))
    for part, found in (("valid", chosen), ("test", printed["test"])):
        ranks = {f: ranked_by_hand(parameters, config, log, getattr(split, part), f) for f in (True, False)}
        assert (ranks[True] != ranks[False]).mean() > 0.5
        assert close(found, ranking.metrics(ranks[filter_seen]))
    assert printed["test"]["unreachable"] == int((ranks[filter_seen] == ranking.MISS).sum())
    counted = counted_by_hand(log, split, split.test, filter_seen)
    assert set(printed["baselines"]) == {"popularity", "transitions"}
    for name, ranks in counted.items():
        assert close(printed["baselines"][name], ranking.metrics(ranks))


@pytest.mark.parametrize("filter_seen", [True, False])
@pytest.mark.parametrize("part", ["valid", "test"])
@pytest.mark.parametrize("option", [None, True, False])
def test_evaluate_is_as_trained_unless_it_is_told_otherwise(trained_runs, filter_seen, part, option):
    folder, _ = trained_runs[filter_seen]
    parameters, config, log, split = opened(folder)
    wanted = filter_seen if option is None else option
    options = [] if option is None else [OPTIONS[option]]
    result = call_cli("evaluate", folder, "--split", part, "--json", *options)
    found = last_json(result)
    assert found["split"] == part and found["filter_seen"] is wanted
    assert close(found, ranking.metrics(ranked_by_hand(parameters, config, log, getattr(split, part), wanted)))
    for name, ranks in counted_by_hand(log, split, getattr(split, part), wanted).items():
        assert close(found["baselines"][name], ranking.metrics(ranks))
    assert ("as the run was trained" in result.stderr) == (option is None and not filter_seen)


@pytest.mark.parametrize("filter_seen", [True, False])
@pytest.mark.parametrize("option", [None, True, False])
def test_recommend_is_as_trained_unless_it_is_told_otherwise(trained_runs, tmp_path, filter_seen, option):
    folder, _ = trained_runs[filter_seen]
    parameters, config, log, _ = opened(folder)
    wanted = filter_seen if option is None else option
    options = [] if option is None else [OPTIONS[option]]
    history = log.history(3)
    (x,) = model.encode(parameters, config, [history])
    order = np.argsort(-(parameters["item_embedding"] @ x[-1]))
    expected = [log.items[i] for i in order if not (wanted and i in history)]
    assert (len(expected) == 14) == (not wanted)
    result = call_cli("recommend", folder, "--user", "u3", "--top", 14, *options)
    assert [line.split()[1] for line in result.stdout.splitlines()] == expected
    call_cli("recommend", folder, "--all", "--top", 14, "--out", tmp_path / "all.csv", *options)
    rows = [line.split(",") for line in (tmp_path / "all.csv").read_text().splitlines()]
    assert [item for user, _, item, _ in rows if user == "u3"] == expected


@pytest.fixture(scope="module", params=[True, False])
def studied(request, bought_again, tmp_path_factory):
    """filter_seen, the folder of a study on the log, and what it printed as JSON."""
    pytest.importorskip("scipy", reason="the study needs scipy")
    folder = tmp_path_factory.mktemp("study")
    arguments = ("--epochs", 2, "--seeds", 1, "--max-length", 8, OPTIONS[request.param], "--out", "out", "--json")
    return request.param, folder / "out", last_json(run_cli("study", "--data", bought_again, *arguments, cwd=folder))


def test_a_study_ranks_runs_substitutions_shuffled_histories_and_counts_as_by_hand(studied):
    filter_seen, folder, printed = studied
    result = printed["datasets"]["again"]
    assert result["filter_seen"] is filter_seen
    for attn in ("softmax", "uniform", "identity"):
        parameters, config, log, split = opened(folder / f"again/{attn}-0")
        ranks = ranked_by_hand(parameters, config, log, split.test, filter_seen)
        assert close({m: v["mean"] for m, v in result["metrics"][attn].items()}, results.mean_metrics([ranks]))
        shuffled = grid.shuffle_histories(log.sequence, split.test, 8, seed=0)
        ranks = ranked_by_hand(parameters, config, log, split.test, filter_seen, shuffled)
        assert close(result["shuffled"][attn], results.mean_metrics([ranks]))
    parameters, config, log, split = opened(folder / "again/softmax-0")
    for name, weightings in (("all", "uniform"), ("block 1", ("softmax", "uniform"))):
        ranks = ranked_by_hand(parameters, replace(config, attn=weightings), log, split.test, filter_seen)
        assert close(result["substitution"][name], results.mean_metrics([ranks]))
    for name, ranks in counted_by_hand(log, split, split.test, filter_seen).items():
        assert close(result["baselines"][name], results.mean_metrics([ranks]))
    assert (result["unreachable"] > 0) == filter_seen


def test_the_page_of_a_study_says_whether_seen_items_are_candidates(studied):
    filter_seen, folder, _ = studied
    (found,) = page.describe_study(folder)["datasets"]
    assert found["facts"]["Candidates"].startswith("all items") == (not filter_seen)
    with pytest.raises(UserError, match="run the study again"):  # from before there was a choice
        page.describe_study(ROOT / "tests/older_study/study")


def test_a_study_of_runs_with_another_choice_is_refused(studied, bought_again):
    filter_seen, folder, _ = studied
    arguments = ("--epochs", 2, "--seeds", 1, "--max-length", 8, OPTIONS[not filter_seen], "--out", folder)
    result = call_cli("study", "--data", bought_again, *arguments)
    assert result.exit_code == 1 and f"was trained with filter_seen {filter_seen}, not" in result.stderr


@pytest.mark.parametrize("filter_seen", [True, False])
def test_the_page_of_a_run_ranks_and_recommends_as_trained(trained_runs, filter_seen):
    folder, printed = trained_runs[filter_seen]
    parameters, config, log, split = opened(folder)
    found = page.describe_run(load(folder))
    assert found["filter_seen"] is filter_seen
    assert ("all items" in found["facts"].get("Candidates", "")) == (not filter_seen)
    assert found["metrics"][0]["HR@1"] == pytest.approx(printed["test"]["HR@1"], abs=1e-4)
    ranks = dict(zip(split.test.users, ranked_by_hand(parameters, config, log, split.test, filter_seen), strict=True))
    for user in found["users"]:
        number, position = log.users.index(user["name"]), user["positions"][0]
        rank = ranks[number]
        assert position["ranks"][0] == (None if rank == ranking.MISS else rank + 1)
        seen = {log.items[i] for i in log.history(number)[:-1]}
        shown = {found["items"][i] for i in position["tops"][0]}
        assert len(shown) == min(10, 14 - len(seen) * filter_seen)
        assert not (filter_seen and shown & seen)


def test_the_choice_is_fixed_for_a_run_and_a_resumed_one_takes_it_over(trained_runs, tmp_path):
    for filter_seen, (folder, _) in trained_runs.items():
        shutil.copytree(folder, tmp_path / "run")
        result = call_cli("train", "--resume", "--out", tmp_path / "run", "--epochs", 4, OPTIONS[not filter_seen])
        assert result.exit_code == 1
        assert f"was trained with filter_seen {filter_seen}, not {not filter_seen}; resume it" in result.stderr
        assert last_json(call_cli("train", "--resume", "--out", tmp_path / "run", "--epochs", 4, "--json"))
        assert runs.load_settings(tmp_path / "run")["training"]["filter_seen"] is filter_seen
        parameters, config, log, split = opened(tmp_path / "run")
        chosen = best(files.read_json_lines(tmp_path / "run/metrics.jsonl"))
        assert close(chosen, ranking.metrics(ranked_by_hand(parameters, config, log, split.valid, filter_seen)))
        shutil.rmtree(tmp_path / "run")


def rewrite(folder, **training):
    """Write a run's config.json with other training settings, or without filter_seen."""
    settings = json.loads((folder / "config.json").read_text())
    del settings["training"]["filter_seen"]
    settings["training"] |= training
    (folder / "config.json").write_text(json.dumps(settings))


def test_a_run_that_says_nothing_of_it_filters_and_goes_on(trained_runs, tmp_path):
    shutil.copytree(trained_runs[True][0], tmp_path / "run")
    rewrite(tmp_path / "run")
    assert "filter_seen" not in (tmp_path / "run/config.json").read_text()
    found = last_json(call_cli("evaluate", tmp_path / "run", "--json"))
    assert found["filter_seen"] is True and close(trained_runs[True][1]["test"], {"HR@10": found["HR@10"]})
    result = call_cli("train", "--resume", "--out", tmp_path / "run", "--epochs", 4, "--no-filter-seen")
    assert "was trained with filter_seen True, not False" in result.stderr
    assert last_json(call_cli("train", "--resume", "--out", tmp_path / "run", "--epochs", 4, "--json"))["epochs"] == 4
    assert json.loads((tmp_path / "run/config.json").read_text())["training"]["filter_seen"] is True


def test_states_of_runs_that_say_nothing_of_it_keep_their_fingerprint():
    model = {"n_items": 20, "hidden_size": 64, "n_blocks": 2, "n_heads": 2, "max_length": 50, "dropout": 0.5}
    source = {"path": "?", "sha256": "0" * 64, "format": None, "columns": None}
    source |= {"split": "leave-one-out", "k_core": 1, "drop_repeats": False}
    training = {"loss": "ce", "negatives": 7, "batch_size": 16, "lr": 0.01, "seed": 1}
    settings = {"data": source, "model": model | {"attn": "softmax"}, "training": training}
    written_before = "5cafdebbef2185fa187f1d31f313207b5830153f5fb92e00ab9d65671ff7502c"
    training["filter_seen"] = True
    assert settings_fingerprint(settings) == written_before
    training["filter_seen"] = False
    assert settings_fingerprint(settings) != written_before


@pytest.mark.parametrize("value", [None, 0, "no"])
def test_a_choice_that_is_none_is_refused(trained_runs, tmp_path, value):
    shutil.copytree(trained_runs[True][0], tmp_path / "run")
    rewrite(tmp_path / "run", filter_seen=value)
    with pytest.raises(UserError, match="not a run's settings .filter_seen cannot be"):
        runs.load_settings(tmp_path / "run")


NAMED = "targets are items the user had before"


@pytest.mark.parametrize("n_repeats, many", [(0, False), (4, False), (5, True)])
def test_the_option_is_named_where_more_than_a_fifth_of_the_targets_are_repeats(tmp_path, n_repeats, many):
    """Of 20 users; a user's last two items are targets, and here the very last one is a repeat."""
    rng = np.random.default_rng(0)
    histories = [rng.permutation(12)[:6].tolist() for _ in range(20)]
    path = write_log(
        tmp_path / "log.txt", [h[:-1] + [h[0] if u < n_repeats else h[-1]] for u, h in enumerate(histories)]
    )
    train = ("train", "--data", path, "--epochs", 1, *SMALL, "--out")
    study_of_one = ("study", "--data", path, "--epochs", 1, "--seeds", 1, "--attn", "softmax", "--attn", "uniform")
    study_of_one += ("--workers", 1, "--out")
    for command in ((*train, tmp_path / "run"), ("evaluate", tmp_path / "run"), (*study_of_one, tmp_path / "study")):
        if command[0] == "study":
            pytest.importorskip("scipy", reason="the study needs scipy")
        result = call_cli(*command)
        assert result.exit_code == 0, result.stderr
        lines = [line for line in result.stderr.splitlines() if NAMED in line]
        assert [line.startswith(f"{n_repeats} of 20 ") for line in lines] == [True] * (n_repeats > 0)
        assert ["--no-filter-seen" in line for line in lines] == [many] * (n_repeats > 0)
        assert result.stderr.count("--no-filter-seen") == many
    assert NAMED not in call_cli("evaluate", tmp_path / "run", "--split", "valid").stderr
    for command in (
        (*train, tmp_path / "all"),
        ("evaluate", tmp_path / "run"),
        (*study_of_one, tmp_path / "study-all"),
    ):
        result = call_cli(*command, "--no-filter-seen")
        assert result.exit_code == 0 and NAMED not in result.stderr


def test_the_description_of_a_log_names_the_option_too(bought_again):
    assert "where people buy again, use --no-filter-seen" in call_cli("describe", bought_again).stdout
    assert "--no-filter-seen" not in call_cli("describe", "household").stdout


def test_counts_stand_beside_the_model_and_one_line_says_where_they_beat_it(trained_runs, bought_again, monkeypatch):
    folder, _ = trained_runs[True]
    found = last_json(call_cli("evaluate", folder, "--json"))
    shown = call_cli("evaluate", folder).stdout.splitlines()
    assert shown[0].split() == ["test", "softmax", "popularity", "transitions"] and max(map(len, shown)) < 80
    assert shown[1].split() == ["HR", "NDCG", "MRR"] * 3
    values = [found, *found["baselines"].values()]
    for k, line in zip(ranking.CUTOFFS, shown[2:], strict=True):
        assert line.split() == [f"@{k}", *(f"{v[f'{name}@{k}']:.4f}" for v in values for name in ("HR", "NDCG", "MRR"))]

    never, always = np.full(found["users"], ranking.MISS), np.zeros(found["users"], int)
    for popularity, transitions, words in (
        (never, never, None),
        (always, never, f"model: popularity (1.0000); the model reaches test NDCG@10 {found['NDCG@10']:.4f}"),
        (always, always, f"(1.0000) and transitions (1.0000); the model reaches test NDCG@10 {found['NDCG@10']:.4f}"),
    ):
        counted = {"popularity": popularity, "transitions": transitions}
        monkeypatch.setattr("minirec.training.fit.rank_baselines", lambda *_, counted=counted: counted)
        lines = [line for line in call_cli("evaluate", folder).stderr.splitlines() if "simple count beats" in line]
        assert len(lines) == (words is not None) and all(line.endswith(words) for line in lines)


def test_beside_another_log_than_the_one_trained_on_there_are_no_counts(trained_runs, tmp_path):
    folder, _ = trained_runs[False]
    path = write_log(tmp_path / "today.txt", [range(u % 5, u % 5 + 7) for u in range(20)])
    result = call_cli("evaluate", folder, "--data", path, "--json")
    found = last_json(result)
    assert found["baselines"] == {} and found["filter_seen"] is False and "counting" not in result.stderr
    assert call_cli("evaluate", folder, "--data", path).stdout.splitlines()[0].split() == ["test", "softmax"]


def test_baselines_count_the_training_part_of_a_temporal_split_too(tmp_path):
    rng = np.random.default_rng(0)
    rows = [f"u{rng.integers(25)},i{rng.integers(9)},{t}" for t in range(400)]
    (tmp_path / "log.csv").write_text("\n".join(["user,item,timestamp", *rows]))
    result = call_cli(
        "train", "--data", tmp_path / "log.csv", "--split", "temporal", "--epochs", 1, *SMALL, "--out", tmp_path / "run"
    )
    assert result.exit_code == 0, result.stderr
    _, _, log, split = opened(tmp_path / "run")
    for part in ("valid", "test"):
        found = last_json(call_cli("evaluate", tmp_path / "run", "--split", part, "--json"))
        for name, ranks in counted_by_hand(log, split, getattr(split, part), True).items():
            assert close(found["baselines"][name], ranking.metrics(ranks))
