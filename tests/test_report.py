"""The page of a run and of a study: its numbers are those of the commands, and names in it are never markup."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest
from helpers import run_cli

from minirec import decompose, files, model
from minirec.attention import FIXED, known_weightings
from minirec.data.log import Log
from minirec.data.planted import N_USERS
from minirec.data.split import leave_one_out
from minirec.errors import UserError
from minirec.report import page as report
from minirec.studies import statistics
from minirec.training import ranking, runs
from minirec.training.fit import Model, load

QUICK = ("--epochs", 1, "--seeds", 2, "--attn", "softmax", "--attn", "uniform")
DEEP = 700 if sys.version_info < (3, 12) else 5000  # lists within lists, which are read and no further walked through
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img/src=x/onerror=alert(2)>",
    "\"'&amp;&",
    "<!--",
    "DATA-HERE",
    "SCRIPT-HASH",
    "a\u202egpj.exe",
    "L\u2028S\u2029P",
    "\u2067x",
    "شاي",
]


class Page(HTMLParser):
    """What a browser would find in a page: tags, attributes, and the text below each id, its children's included."""

    EMPTY = ("meta", "br", "input", "link", "img", "rect", "line", "path", "circle")

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.EMPTY:
            self.open.append((tag, dict(attributes).get("id") or (tag if tag in ("script", "style") else None)))

    def handle_endtag(self, tag):
        while self.open and tag not in self.EMPTY and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        for _, name in self.open:
            if name:
                self.text[name] = self.text.get(name, "") + data


def embedded(page):
    """The JSON in a page; NaN and infinity are none."""
    return json.loads(Page(page.decode()).text["data"], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def decode(row):
    """What the page's script makes of a row."""
    most, levels = row
    return most * np.array(levels) / report.LEVELS


def loaded(folder):
    """Settings, parameters and log of a run."""
    settings = runs.load_settings(folder)
    config = runs.model_config(settings)
    return settings, runs.load_parameters(folder, config), runs.load_run_log(folder, settings)


@pytest.fixture(scope="module")
def found(trained):
    return report.describe_run(load(trained))


def picked(found, log):
    """All that can be picked: (the page's user, its position, the number of the user, the history as it was then)."""
    for user in found["users"]:
        number = log.users.index(user["name"])
        for position in user["positions"]:
            yield user, position, number, log.history(number)[: position["position"] + 1]


def test_a_row_keeps_three_digits_of_its_largest_value(rng):
    for values in (rng.random(200), np.full(7, 1 / 7), np.zeros(3), np.array([1e-9, 3e4])):
        assert np.abs(decode(report.row(values)) - values).max() <= values.max() / (2 * report.LEVELS) * 1.1


def test_weights_and_norms_are_those_of_the_decomposition(trained, found):
    settings, parameters, log = loaded(trained)
    config = runs.model_config(settings)
    for _, position, _, history in list(picked(found, log))[::97]:
        history = history[-config.max_length :]
        result = decompose.decompose(parameters, config, [history])
        together = decompose.contributions(parameters, config, history)
        _, caches = decompose.block_caches(parameters, config, history, np.array([0]), np.array([len(history)]))
        for shown, block, cache, norms in zip(position["blocks"], result["blocks"], caches, together, strict=True):
            np.testing.assert_allclose(decode(shown["contribution"]), norms[-1], atol=5e-3)
            a = cache["attention"][0].weights[0, :, -1]  # [H, L]
            for h in range(config.n_heads):
                weights = decode(shown["attention"][h])
                assert weights.sum() == pytest.approx(1, abs=2e-2) and len(weights) == len(history)
                np.testing.assert_allclose(weights, a[h], atol=6e-4)
            assert len(shown["heads"]) == config.n_heads
            for name in decompose.RATIOS:
                assert shown["ratios"][name] == pytest.approx(block[name][-1], abs=1e-4)


def test_recommendations_are_those_of_evaluate_at_that_time(trained, found):
    settings, parameters, log = loaded(trained)
    config = runs.model_config(settings)
    chosen = list(picked(found, log))[::13]
    assert found["weightings"] == list(known_weightings())
    for w, attn in enumerate(found["weightings"]):
        histories = [history for *_, history in chosen]
        ((items, _),) = ranking.recommend(parameters, replace(config, attn=attn), histories, 10)
        for (_, position, _, _), expected in zip(chosen, items, strict=True):
            assert [found["items"][i] for i in position["tops"][w]] == [log.items[i] for i in expected]
    for _, position, number, history in chosen:
        assert found["items"][position["next"]] == log.items[log.history(number)[len(history)]]


def test_moves_are_told_against_the_trained_weighting(trained, found):
    _, parameters, log = loaded(trained)
    *_, history = chosen = list(picked(found, log))[-1]
    position, config = chosen[1], runs.model_config(runs.load_settings(trained))
    ((order, _),) = ranking.recommend(parameters, config, [history], report.LOOKED_UP)
    order = [log.items[i] for i in order[0]]
    assert position["was"][0] == list(range(1, 11))
    for top, was in zip(position["tops"], position["was"], strict=True):
        names = [found["items"][i] for i in top]
        assert was == [order.index(name) + 1 if name in order else None for name in names]


def test_ranks_and_metrics_are_those_of_the_test_split(trained, found):
    settings, parameters, log = loaded(trained)
    test, config = runs.split_log(log, settings).test, runs.model_config(settings)
    for w, attn in ((0, "softmax"), (2, "identity")):
        changed = replace(config, attn=attn)
        ranks = np.concatenate(list(ranking.rank_targets(parameters, changed, log.sequence, test)))
        assert found["metrics"][w] == report.rounded(ranking.metrics(ranks))
        by_user = dict(zip(test.users, ranks, strict=True))
        for user in found["users"]:
            rank = by_user[log.users.index(user["name"])]
            assert user["positions"][0]["ranks"][w] == (None if rank >= ranking.MISS else rank + 1)


def test_the_history_reaches_back_from_the_latest_position(trained, found):
    _, _, log = loaded(trained)
    assert len(found["users"]) == report.USERS and found["n_test"] == N_USERS
    for user, position, _, history in picked(found, log):
        n = len(decode(position["blocks"][0]["contribution"]))
        end = position["position"] + 1 - user["before"]
        assert [found["items"][i] for i in user["history"][end - n : end]] == [log.items[i] for i in history[-n:]]
    assert all(len(user["positions"]) <= decompose.RECENT for user in found["users"])


def test_mixing_and_curves_are_those_of_the_run(trained, found):
    settings, parameters, log = loaded(trained)
    test = runs.split_log(log, settings).test
    histories = [log.sequence[a:b] for a, b in zip(test.starts, test.stops, strict=True)]
    summary = decompose.summarise(decompose.decompose(parameters, runs.model_config(settings), histories))
    for shown, expected in zip(found["mixing"]["blocks"], summary["blocks"], strict=True):
        assert shown["entropy"]["mean"] == pytest.approx(expected["entropy"]["mean"], rel=1e-4)
    assert found["mixing"]["latest"]["attn"]["median"] == pytest.approx(summary["latest"]["attn"]["median"], rel=1e-4)
    records = files.read_json_lines(trained / "metrics.jsonl")
    assert found["curves"]["loss"] == report.rounded([record["loss"] for record in records])
    assert found["best_epoch"] == max(records, key=lambda r: r["NDCG@10"])["epoch"]


def example(n_users=20, length=9, **sizes):
    """A Model with parameters as drawn, and its test targets."""
    rng = np.random.default_rng(0)
    log = Log(
        users=[f"u{u}" for u in range(n_users)],
        items=[f"a name of some length {i}" for i in range(3000)],
        offsets=np.arange(n_users + 1) * length,
        sequence=rng.integers(3000, size=n_users * length).astype(np.int32),
    )
    config = model.Config(n_items=3000, hidden_size=8, **sizes)
    settings = {"training": {"filter_seen": True}}
    return Model(config, model.init_parameters(config, 0), log.items, settings, [], lambda: log), leave_one_out(
        log
    ).test


@pytest.mark.parametrize("sizes", [{"max_length": 200}, {"max_length": 200, "n_blocks": 4, "n_heads": 4}])
def test_the_page_stays_small_for_long_histories(sizes):
    untrained, test = example(n_users=60, length=220, **sizes)
    users, items = report.explorer([untrained], test)
    assert 5e5 < len(json.dumps([users, items], separators=(",", ":"))) < 2.9e6
    assert users[0]["name"] == "u0" and users[-1]["name"] == "u59"  # evenly spread


def test_the_first_user_is_one_with_the_longest_history_and_the_others_follow_by_length(found):
    lengths = [user["before"] + len(user["history"]) for user in found["users"]]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]


def test_a_run_without_softmax_shows_its_own_weights(tmp_path):
    untrained, test = example(attn="uniform")
    users, _ = report.explorer([untrained], test)
    for position in users[0]["positions"]:
        for block in position["blocks"]:
            np.testing.assert_allclose(decode(block["attention"][1]), 1 / (position["position"] + 1), rtol=1e-4)
    (tmp_path / "log.txt").write_text("u1 a b c d\nu2 b c d a\nu3 c d a b\n")
    assert run_cli("train", "--data", "log.txt", "--epochs", 1, "--attn", "uniform", "--out", "run", cwd=tmp_path)
    found = report.describe_run(load(tmp_path / "run"))
    assert found["weightings"] == list(FIXED)  # softmax was not trained: it is never substituted
    tops = found["users"][0]["positions"][0]["tops"]
    assert [len(top) for top in tops] == [1] * len(FIXED)  # all that is left of four items


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The folder of a run on a log of hostile names, with its page."""
    folder = tmp_path_factory.mktemp("hostile")
    rng = np.random.default_rng(0)
    lines = [[user, *rng.permutation(HOSTILE)[:7]] for user in (*HOSTILE, *map(str, range(20)))]
    (folder / "log.txt").write_text("".join(" ".join(line) + "\n" for line in lines))
    for command in (
        ("train", "--data", "log.txt", "--format", "lines", "--epochs", 2, "--out", "run"),
        ("report", "run"),
    ):
        process = run_cli(*command, cwd=folder)
        assert process.returncode == 0, process.stderr
    return folder / "run"


def test_hostile_names_are_text_in_the_data_and_nothing_else(hostile):
    text = (hostile / "report.html").read_bytes()
    page, harmless = Page(text.decode()), Page(report.page({}).decode())
    assert page.tags == harmless.tags and page.attributes == harmless.attributes
    found = embedded(text)
    assert set(found["items"]) == set(map(report.legible, HOSTILE))
    assert HOSTILE[0] in found["items"] and "a\\u202egpj.exe" in found["items"] and "شاي" in found["items"]
    assert not re.search(rb"[<>&\x80-\xff]", re.search(rb'id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_what_turns_or_breaks_text_is_shown_as_an_escape():
    assert report.legible("a\u202eb\u2028\x00\x1b[2J\ud800\u200f") == "a\\u202eb\\u2028\\x00\\x1b[2J\\ud800\\u200f"
    assert report.legible("ن\u200cن é 👩\u200d🔬 \\") == "ن\u200cن é 👩\u200d🔬 \\"


def test_the_page_loads_nothing_and_runs_one_script(hostile):
    page = Page((hostile / "report.html").read_text())
    assert page.tags.count("script") == 2 and not {"img", "link", "iframe", "object", "base"} & set(page.tags)
    assert not [value for name, value in page.attributes if name in ("src", "href", "action") or name.startswith("on")]
    assert "url(" not in page.text["style"] and "@import" not in page.text["style"]
    script = page.text["script"]
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
        "Function(",
        "fetch",
        "import(",
    ):
        assert word not in script
    assert re.findall(r"\w+://[^\s\"]*", script) == ["http://www.w3.org/2000/svg"]  # a name, not an address
    (policy,) = (value for name, value in page.attributes if name == "content" and "default-src" in value)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_the_page_tells_no_folders(hostile):
    text = (hostile / "report.html").read_text()
    assert "log.txt" in text and str(hostile.parent) not in text


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """The folder of a small study."""
    pytest.importorskip("scipy", reason="the study needs scipy")
    folder = tmp_path_factory.mktemp("studied")
    rng = np.random.default_rng(0)
    lines = [f"u{u} " + " ".join(f"i{i}" for i in rng.integers(30, size=9)) + "\n" for u in range(60)]
    (folder / "small.txt").write_text("".join(lines))
    process = run_cli("study", "--data", "small.txt", *QUICK, "--out", "out", cwd=folder)
    assert process.returncode == 0, process.stderr
    return folder / "out"


def test_the_page_of_a_study_holds_its_results(studied):
    result = json.loads((studied / "study.json").read_text())["datasets"]["small"]
    process = run_cli("report", studied, cwd=studied)
    assert process.returncode == 0 and "report.html" in process.stderr, process.stderr
    found = embedded((studied / "report.html").read_bytes())
    (dataset,) = found["datasets"]
    assert dataset["verdict"] == result["verdict"]
    assert dataset["point"][0] == report.rounded(result["mixing_ratio"]) and dataset["point"][2] == result["regime"]
    rows = dict(dataset["rows"])
    assert rows["softmax"][3] == report.rounded(list(result["metrics"]["softmax"]["NDCG@10"].values()))
    assert rows["softmax, uniform substituted in block 1"][0][0] == report.rounded(
        result["substitution"]["block 1"]["HR@1"]
    )
    assert rows["uniform, history shuffled"][0][0] == report.rounded(result["shuffled"]["uniform"]["HR@1"])
    effects = dict(dataset["effects"])
    assert list(effects) == ["softmax minus uniform"]  # this study has no identity arm
    judged = result["weighting"]["NDCG@10"]
    assert effects["softmax minus uniform"][3] == ["NDCG@10"] + [
        report.rounded(judged[name])
        for name in ("difference", "relative", "hedges_g", "hedges_g_interval", "p")
        + ("interval", "interval_seeds", "interval_users")
    ]
    assert dataset["pictures"][0]["attn_res_ln"] == report.rounded(result["pictures"][0]["attn_res_ln"])
    assert len(found["published"]) == len(statistics.published()["datasets"]) == 14
    assert found["mixes_above"] == statistics.MIXES_ABOVE


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-9],
        lambda text: "[]",
        lambda text: '{"datasets": {}}',
        lambda text: '{"datasets": {"small": {}}}',
        lambda text: text.replace('"users": 60', '"users": "many"'),
        lambda text: re.sub(r'"attention": \[', '"attention": [7, ', text),
        lambda text: re.sub(r'"attention": \[', f'"attention": [{"[" * DEEP}{"]" * DEEP}, ', text, count=1),
        lambda text: re.sub(r'"mean_hedges_g": [^,]+', f'"mean_hedges_g": {10**400}', text),
    ],
)
def test_a_damaged_study_is_named(studied, tmp_path, damage):
    text = (studied / "study.json").read_text()
    assert damage(text) != text
    (tmp_path / "study.json").write_text(damage(text))
    with pytest.raises(UserError, match="study.json"):
        report.describe_study(tmp_path)


def test_numbers_that_are_none_become_null():
    assert report.rounded({"a": [float("nan"), 1 / 3, 2, None]}) == {"a": [None, 0.33333, 2, None]}


def test_the_newest_run_is_taken_and_a_report_makes_none_the_newest(trained, hostile, tmp_path):
    for name, source in (("old", hostile), ("new", trained)):
        shutil.copytree(source, tmp_path / "runs" / name, ignore=shutil.ignore_patterns("report.html"))
        for file in (tmp_path / "runs" / name).iterdir():
            os.utime(file, ns=(0, 10**18 * (2 if name == "new" else 1)))
    assert run_cli("report", "runs/old", "--data", hostile.parent / "log.txt", cwd=tmp_path).returncode == 0
    process = run_cli("report", "--out", "page.html", cwd=tmp_path)
    assert process.returncode == 0 and f"run {Path('runs/new')}" in process.stderr
    assert embedded((tmp_path / "page.html").read_bytes())["title"] == "household, softmax attention"


def test_a_link_is_followed_where_it_is_named_and_nowhere_else(studied, tmp_path):
    shutil.copytree(studied, tmp_path / "theirs", ignore=shutil.ignore_patterns("report.html"))
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "theirs/report.html").symlink_to(tmp_path / "precious")
    process = run_cli("report", "theirs", cwd=tmp_path)
    assert process.returncode == 1 and "report.html: a regular file belongs here" in process.stderr
    assert (tmp_path / "precious").read_text() == "mine"
    assert run_cli("report", "theirs", "--out", "theirs/report.html", cwd=tmp_path).returncode == 0
    assert (tmp_path / "precious").read_bytes().startswith(b"<!DOCTYPE html>")


MISTAKES = {
    "no run": (["report"], 1, "python cli.py train"),
    "missing run": (["report", "nowhere"], 1, "not a run folder"),
    "out in no folder": (["report", "STUDY", "--out", "no/page.html"], 1, "no/page.html"),
    "out is a folder": (["report", "STUDY", "--out", "."], 2, "--out"),
    "a log for a study": (["report", "STUDY", "--data", "log.txt"], 2, "--data"),
    "another log": (["report", "RUN", "--data", "log.txt"], 1, "not the log"),
}


@pytest.mark.parametrize("arguments, status, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_end_in_one_line_and_write_nothing(trained, studied, tmp_path, arguments, status, message):
    (tmp_path / "log.txt").write_text("u1 a b c d\n")
    folders = {"RUN": trained, "STUDY": studied}
    process = run_cli(*(folders.get(argument, argument) for argument in arguments), cwd=tmp_path)
    assert process.returncode == status and message in process.stderr and "Traceback" not in process.stderr
    assert "Error: " in process.stderr.splitlines()[-1]
    assert [f.name for f in tmp_path.iterdir()] == ["log.txt"]


def shown_by_browser(path, folder, **state):
    """The page as headless Chromium shows it for an address; a skip where there is none."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium")
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    options += " --disable-component-update --disable-sync --enable-logging=stderr --dump-dom"
    command = [browser, *options.split(), f"--user-data-dir={folder}", f"{path.as_uri()}#{urlencode(state)}"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert "CONSOLE" not in process.stderr, process.stderr
    return Page(process.stdout)


def test_a_browser_shows_the_view_of_the_address_and_names_as_text(hostile, tmp_path):
    page = shown_by_browser(hostile / "report.html", tmp_path, user=HOSTILE[0], position=4, block=1, head=0)
    (user,) = (u for u in embedded((hostile / "report.html").read_bytes())["users"] if u["name"] == HOSTILE[0])
    assert [p["position"] for p in user["positions"]] == [5, 4, 3, 2, 1, 0]
    status = page.text["status"]
    assert status.startswith(f"User {HOSTILE[0]}, after 5 items") and "block 1, head 0" in status
    assert page.text["title"] == "log.txt, softmax attention"
    assert "attention weight" in page.text["readout"] and "%" in page.text["contrast"]
    for name in HOSTILE[:6]:
        assert name in page.text["user"]
    assert HOSTILE[0] in page.text["tops"] + page.text["most-weight"] + page.text["position"]
    assert page.tags.count("script") == 2 and "img" not in page.tags
    assert page.tags.count("option") == len(HOSTILE) + 20 + 6 and page.tags.count("svg") == 5


def test_a_browser_shows_a_study(studied, tmp_path):
    results = json.loads((studied / "study.json").read_text())
    results["datasets"] = {HOSTILE[0]: results["datasets"]["small"], HOSTILE[1]: results["datasets"]["small"]}
    (tmp_path / "study.json").write_text(json.dumps(results))
    (tmp_path / "page.html").write_bytes(report.page(report.describe_study(tmp_path)))
    page = shown_by_browser(tmp_path / "page.html", tmp_path / "browser")
    assert HOSTILE[0] in page.text["sentences"] and "ML-20M" in page.text["points"]
    assert page.text["dataset-1"] == HOSTILE[1]
    assert page.tags.count("script") == 2 and "img" not in page.tags
