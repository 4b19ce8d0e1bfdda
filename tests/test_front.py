"""The front of the library: a notebook's twelve lines, in a folder that is not the clone, from an installed wheel."""

import inspect
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
from helpers import ROOT, last_json, log_of, run_cli

import minirec
from minirec import files
from minirec.errors import UserError
from minirec.training import fit as fitting
from minirec.training import runs
from minirec.training.ranking import MISS

QUIET = {"on_epoch": None, "workers": 1, "epochs": 2, "hidden": 8, "blocks": 2}
NOTEBOOK = """
import minirec, numpy, pandas
rng = numpy.random.default_rng(0)
frame = pandas.DataFrame({"user": rng.integers(40, size=900), "item": rng.integers(20, size=900), "time": range(900)})
log = minirec.Log.from_columns(frame["user"], frame["item"], frame["time"])
options = dict(epochs=2, hidden=8, workers=1)
learned = [minirec.fit(log, "softmax", seed, **options) for seed in range(2)]
averaged = [minirec.fit(log, "uniform", seed, **options) for seed in range(2)]
comparison = minirec.compare(learned, averaged)
model = learned[0]
substituted = model.with_attention("uniform").evaluate()["NDCG@10"]
figure = minirec.plots.heatmaps(model.decompose())
model.save("kept"); assert minirec.load("kept").evaluate() == model.evaluate()
"""


@pytest.fixture(scope="module")
def log():
    rng = np.random.default_rng(0)
    return log_of([rng.integers(15, size=n).tolist() for n in rng.integers(2, 12, size=30)])


@pytest.fixture(scope="module")
def model(log):
    return minirec.fit(log, **QUIET)


def test_every_name_of_the_front_is_there_after_every_submodule_was_imported():
    for path in (ROOT / "minirec").rglob("*.py"):
        if path.stem not in ("__main__", "__init__"):
            __import__(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for name in minirec.FRONT:
        assert getattr(minirec, name) is getattr(minirec, name)
        assert callable(getattr(minirec, name)) or name == "plots"
        assert not (ROOT / "minirec" / name).exists() and not (ROOT / "minirec" / f"{name}.py").exists()
    assert set(minirec.FRONT) <= set(dir(minirec))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = minirec.nothing


def test_a_log_and_a_model_show_themselves_in_a_line_however_large_they_are(log, model):
    assert repr(minirec.Log.from_columns([*"aaab"], [*"xyzx"])) == (
        "<Log: 2 users, 3 items, 4 interactions; columns users, items; 4 rows>"
    )
    assert "1 of 5 rows (20.0%) have no users: left out" in repr(minirec.Log.from_columns([*"aaab", ""], [*"xyzxx"]))
    assert repr(log).startswith("<Log: 30 users, 15 items, ") and "\n" not in repr(log)
    assert repr(model) == f"Model(config={model.config!r}, folder=None)"


def test_importing_the_core_imports_numpy_alone():
    code = "import sys; from minirec import model, decompose; print({'click', 'threadpoolctl'} & set(sys.modules))"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout.strip() == "set()", process.stderr


def test_without_a_folder_the_bits_are_those_of_a_run_in_one(log, model, tmp_path):
    kept = minirec.fit(log, folder=tmp_path / "run", **QUIET)
    for name, value in model.parameters.items():
        np.testing.assert_array_equal(value, kept.parameters[name])
    assert [r | {"train_seconds": 0} for r in model.records] == [r | {"train_seconds": 0} for r in kept.records]
    assert minirec.load(tmp_path / "run").evaluate() == model.evaluate() == kept.evaluate()


def test_a_model_that_was_saved_gives_the_same_numbers_in_python_and_on_the_command_line(model, tmp_path):
    model.with_attention("uniform", [1]).save(tmp_path / "kept")
    again = minirec.load(tmp_path / "kept")
    assert again.evaluate(part="valid") == model.with_attention("uniform", [1]).evaluate(part="valid")
    assert again.log.sha256() == model.log.sha256() and again.items == model.items
    assert last_json(run_cli("evaluate", "kept", "--json", cwd=tmp_path)) == again.evaluate()
    with pytest.raises(UserError, match="holds"):
        model.save(tmp_path)
    minirec.fit(model.log, folder=tmp_path / "run", **QUIET)
    with pytest.raises(UserError, match="holds a run already; choose another folder"):
        model.save(tmp_path / "run")


def test_a_run_that_was_begun_in_python_goes_on_on_the_command_line(log, tmp_path):
    whole = minirec.fit(log, **QUIET | {"epochs": 3})
    minirec.fit(log, folder=tmp_path / "run", **QUIET)
    process = run_cli("train", "--resume", "--out", "run", "--epochs", 3, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    again = minirec.load(tmp_path / "run")
    assert [r["loss"] for r in again.records] == [r["loss"] for r in whole.records]


def test_a_log_with_times_is_kept_with_them(tmp_path):
    rng = np.random.default_rng(1)
    log = log_of([rng.integers(9, size=8).tolist() for _ in range(40)])
    log.times = np.sort(rng.integers(10**9, size=(40, 8)), axis=1).ravel()
    model = minirec.fit(log, folder=tmp_path / "run", split="temporal", **QUIET)
    assert minirec.load(tmp_path / "run").evaluate() == model.evaluate()
    np.testing.assert_array_equal(minirec.load(tmp_path / "run").log.times, log.times)
    later = replace(log, times=log.times + np.arange(len(log.times)))  # in the same order, but split elsewhere
    with pytest.raises(UserError, match="was trained with log"):
        minirec.fit(later, folder=tmp_path / "run", split="temporal", resume=True, **QUIET)


def test_a_log_that_was_made_by_hand_is_kept_too(log, tmp_path):
    wide = replace(log, sequence=log.sequence.astype(np.int64))
    model = minirec.fit(wide, folder=tmp_path / "run", **QUIET)
    assert minirec.load(tmp_path / "run").evaluate() == model.evaluate()


@pytest.mark.parametrize("damage", ["sequence", "offsets", "users"])
def test_a_kept_log_that_is_damaged_is_refused(log, tmp_path, damage):
    model = minirec.fit(log, folder=tmp_path / "run", **QUIET)
    arrays = files.read_arrays(tmp_path / "run" / runs.LOG)
    arrays["sequence"][0] = 99 if damage == "sequence" else arrays["sequence"][0]
    arrays["offsets"][1] = 10**9 if damage == "offsets" else arrays["offsets"][1]
    arrays["users"] = arrays["users"][1:] if damage == "users" else arrays["users"]
    files.write_arrays(tmp_path / "run" / runs.LOG, arrays)
    with pytest.raises(UserError, match="log.npz: damaged"):
        minirec.load(tmp_path / "run").evaluate()
    assert model.evaluate()["users"] > 0


def test_a_history_of_another_log_is_taken_by_names_whatever_its_numbers_are(log, model, tmp_path):
    order = np.random.default_rng(0).permutation(len(log.items))
    place = np.argsort(order)  # item i of the log is item place[i] of the other one
    other = replace(log, items=[log.items[i] for i in order], sequence=place[log.sequence].astype(np.int32))
    model.save(tmp_path / "kept")
    for m in (model, minirec.load(tmp_path / "kept")):
        for user in range(5):
            assert m.recommend(other.history(user)) == m.recommend(log.history(user))
            assert m.recommend(other.history(user)[:-1]) == m.recommend(log.history(user)[:-1])
        many = [list(m.recommend_many(map(of.history, range(5)), workers=1)) for of in (other, log)]
        assert many[0] == many[1]


def test_what_a_model_says_is_what_its_parts_say(log, model):
    history = log.history(3)
    names = [log.items[i] for i in history]
    assert model.recommend(names, 3) == model.recommend(history, 3)
    best = model.recommend(history, 100)
    assert not {name for name, _ in best} & set(names) and len(best) == len(log.items) - len(set(names))
    assert [score for _, score in best] == sorted((score for _, score in best), reverse=True)
    assert [a.shape for a in model.attention(names)] == [(2, len(names), len(names))] * 2
    ranks = model.ranks()
    assert model.evaluate()["HR@5"] == np.mean(ranks < 5) and model.evaluate()["unreachable"] == (ranks == MISS).sum()
    result = model.decompose()
    assert len(result["users"]) == len(result["positions"]) and 0 < result["summary"]["all"]["attn_res_ln"]["mean"] < 1


def test_another_log_is_ranked_as_the_same_log_where_it_is_the_same(log, model):
    same = model.evaluate(log)
    assert same | {"baselines": {}} == model.evaluate() | {
        "baselines": {},
        "unknown_targets": 0,
        "unknown_histories": 0,
    }


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m: m.with_attention("uniform", [2]), "blocks 0 to 1"),
        (lambda m: m.with_attention("linear"), "choose from"),
        (lambda m: m.recommend(["nobody's"]), "knows none of its items: .nobody"),
        (lambda m: m.recommend([99]), "0 to 14"),
        (lambda m: m.recommend([]), "history: it is empty"),
        (lambda m: minirec.fit(m.log, epoch=3), "fit takes no epoch; did you mean .epochs"),
        (lambda m: minirec.fit(m.log, lr=-1.0), "lr"),
        (lambda m: minirec.fit(m.log, loss="hinge"), "loss"),
        (lambda m: minirec.fit(m.log, split="random"), "split"),
        (lambda m: minirec.fit(m.log, epochs=0), "epochs"),
        (lambda m: minirec.fit(m.log, hidden=7), "heads"),
        (lambda m: minirec.fit("ratings.csv"), "read_log"),
        (lambda m: m.evaluate(part="train"), "valid or test"),
        (lambda m: m.recommend([1], k=0), "at least 1"),
        (lambda m: m.recommend([-2]), "0 to 14"),
        (lambda m: minirec.fit(m.log, split="temporal"), "^the log has no timestamps"),
        (lambda m: minirec.compare([m], [minirec.fit(m.log, seed=1, **QUIET)]), "same seeds"),
        (lambda m: minirec.study({"l": m.log}, colour=1), "takes no colour"),
        (lambda m: minirec.study({"study.json": m.log}), "becomes a folder.s"),
        (lambda m: minirec.load("nowhere"), "not a run folder"),
        (lambda m: minirec.Log.from_columns([b"u"] * 3, [1, 2, 3]), "texts, numbers or dates, one a row, not bytes"),
    ],
)
def test_a_mistake_in_python_is_one_line(model, call, words):
    with pytest.raises(UserError, match=words) as error:
        call(model)
    assert "\n" not in str(error.value)


def test_the_signature_of_fit_names_every_option_with_its_default(log):
    parameters = inspect.signature(minirec.fit).parameters
    assert list(parameters)[:4] == ["log", "attn", "seed", "folder"]
    chosen = {"hidden": 64, "max_length": 50, "k_core": 1, "split": "leave-one-out", "epochs": 200, "workers": None}
    assert {name: parameters[name].default for name in chosen} == chosen
    told = minirec.fit.__doc__.split("attn:")[1]
    for name, parameter in list(parameters.items())[1:]:
        assert re.search(rf"\b{name}\b", "attn " + told), name
        assert parameter.kind is not inspect.Parameter.VAR_KEYWORD
    defaults = {name: parameters[name].default for name in list(parameters)[4:]}
    assert minirec.fit(log, **defaults | QUIET).config.hidden_size == QUIET["hidden"]  # it takes what it names


def test_an_item_that_the_model_does_not_know_is_left_out_aloud(model):
    with pytest.warns(UserWarning, match="left out, unknown to the model: 'nobody'"):
        model.recommend([model.items[0], "nobody"])


def test_the_epochs_are_printed_unless_nobody_wants_them(log, capsys):
    minirec.fit(log, **QUIET | {"on_epoch": fitting.print_epoch})
    assert [line.split()[:2] for line in capsys.readouterr().err.splitlines()] == [["epoch", "1"], ["epoch", "2"]]
    minirec.fit(log, **QUIET)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_the_wheel_holds_all_that_a_notebook_and_the_command_need(tmp_path):
    pytest.importorskip("pandas")
    pytest.importorskip("setuptools", minversion="70.1")
    site, pip = tmp_path / "site", [sys.executable, "-m", "pip", "-q"]
    build = [*pip, "install", "--no-deps", "--no-build-isolation", "--target", str(site), str(ROOT)]
    subprocess.run(build, cwd=tmp_path, check=True)
    environment = os.environ | {"PYTHONPATH": str(site)}

    def run(*command):
        process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        return process.stdout

    where = run(sys.executable, "-c", "import minirec; print(minirec.__file__)").strip()
    assert where == str(site / "minirec" / "__init__.py")
    run(sys.executable, "-c", NOTEBOOK)
    helps = [
        run(sys.executable, site / "bin" / "minirec", "--help"),
        run(sys.executable, "-m", "minirec", "--help").replace("python -m minirec", "minirec"),
        run(sys.executable, ROOT / "cli.py", "--help").replace("python cli.py", "minirec"),
    ]
    assert len({" ".join(text.split()) for text in helps}) == 1
    run(sys.executable, "-m", "minirec", "train", "--epochs", "1", "--out", "run")
    run(sys.executable, "-m", "minirec", "report", "run")
    assert "ml-100k" in run(sys.executable, "-m", "minirec", "fetch")


def test_a_studys_folder_in_the_place_of_a_runs_is_called_what_it_is(model, tmp_path):
    model.save(tmp_path / "log" / "softmax-0")
    with pytest.raises(UserError, match="a study.s folder .not summed up yet.; .* such as .*softmax-0"):
        minirec.load(tmp_path)
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(UserError, match="report makes its page"):
        minirec.load(tmp_path)


def test_a_history_that_is_no_list_of_items_is_refused_and_never_taken_apart(model):
    for history in ("12", 7, [7.5], [None], [["1", "2"]]):
        with pytest.raises(UserError, match="a history is a list of item names or numbers, oldest first, not "):
            model.recommend(history)


def test_a_number_that_is_another_items_name_is_remarked_on(log, model):
    model = replace(model, items=model.items[::-1])  # number 2 is called 12, as 2 is another's name
    with pytest.warns(UserWarning, match="history: 2 is taken as a number, that of item '12'; a name is a text: '2'"):
        by_number = model.recommend([2])
    assert by_number == model.recommend(["12"]) != model.recommend(["2"])
    with pytest.warns(UserWarning, match="history: 2 is taken as a number"):
        assert model.recommend(iter([2])) == by_number
    with warnings.catch_warnings(action="error"):
        model.recommend(log.history(0))  # these are numbers for sure


def test_single_models_are_compared_as_lists_of_one_are(model):
    uniform = model.with_attention("uniform", blocks=0)
    assert uniform.config.weightings == ("uniform", "softmax")
    assert minirec.compare(model, uniform) == minirec.compare([model], [uniform])


def test_models_of_one_seed_or_of_two_logs_are_not_compared(log, model):
    with pytest.raises(UserError, match="two models of an arm have the same seed"):
        minirec.compare([model, model], [model, model])
    other = log_of([list(log.history(user)[::-1]) for user in range(len(log.users))])
    for different in (minirec.fit(other, **QUIET), minirec.fit(log, filter_seen=False, **QUIET)):
        with pytest.raises(UserError, match="tested on different logs, parts of one, or candidates"):
            minirec.compare(model, different)
    mixed = [model, minirec.fit(log, "uniform", 1, **QUIET)]
    with pytest.raises(UserError, match="the models of an arm differ in their weighting"):
        minirec.compare(mixed, mixed)


def test_a_study_says_what_it_does_and_takes_a_single_log(log, tmp_path, capsys):
    pytest.importorskip("scipy")
    options = {"seeds": 1, "weightings": ["softmax", "uniform"], "epochs": 1, "hidden": 8, "workers": 1}
    assert list(minirec.study(log, folder=tmp_path, **options)) == ["log"]
    assert "log: 30 users, 15 items" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"study, for mine, takes a Log, not str: read_log\(path\)"):
        minirec.study({"mine": "ratings.csv"}, **options)


def test_training_never_overwrites_a_saved_model_nor_a_folder_with_anothers_config(log, model, tmp_path):
    model.save(tmp_path / "saved")
    model.save(tmp_path / "saved")  # saving again is what was asked for
    with pytest.raises(UserError, match="holds a saved model; choose another folder"):
        minirec.fit(log, seed=1, folder=tmp_path / "saved", **QUIET)
    assert minirec.load(tmp_path / "saved").evaluate() == model.evaluate()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"architectures": ["Other"]}')
    for write in (model.save, lambda folder: minirec.fit(log, folder=folder, **QUIET)):
        with pytest.raises(UserError, match="not a run's settings"):
            write(tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["config.json"]


def test_a_lost_checkpoint_is_named_before_training_goes_on(log, tmp_path):
    minirec.fit(log, folder=tmp_path / "run", **QUIET)
    (tmp_path / "run/checkpoint.npz").unlink()
    epochs = []
    with pytest.raises(UserError, match="checkpoint.npz: removed, or no epoch"):
        minirec.fit(log, folder=tmp_path / "run", resume=True, **QUIET | {"epochs": 3, "on_epoch": epochs.append})
    assert epochs == []


def test_a_history_of_the_log_before_the_k_core_is_taken_by_names(rng):
    log = log_of([[0, *rng.integers(1, 6, size=8)]] + [rng.integers(1, 6, size=8).tolist() for _ in range(20)])
    model = minirec.fit(log, k_core=2, **QUIET)
    assert model.items == log.items[1:]  # so its numbers are others
    with pytest.warns(UserWarning, match="left out, unknown to the model: '0'"):
        assert list(model.history(log.history(0))) == list(model.log.history(0))
    assert list(model.history(log.history(1))) == list(model.log.history(1))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"workers": -1}, "workers is -1: a whole number of 1 or more"),
        ({"seeds": [0, 1]}, r"seeds is \[0, 1\]: a whole number"),
        ({"logs": []}, "a study takes {name: Log}"),
        ({"ties": "shuffle"}, "ties: a Log is read already; give this to read_log"),
        ({"logs": None}, "a study takes {name: Log}"),
        ({"logs": "list of Logs"}, "a study takes {name: Log}"),
        ({"logs": "../x"}, "the log's name '../x' becomes a folder's"),
        ({"logs": iter(())}, "a study takes {name: Log}"),
        ({"logs": iter(["nowhere.txt"])}, "nowhere.txt: cannot be read"),
    ],
)
def test_a_study_refuses_what_it_cannot_study(log, arguments, words):
    pytest.importorskip("scipy")
    logs = arguments.pop("logs", log)
    with pytest.raises(UserError, match=words):
        minirec.study({"list of Logs": [log, log], "../x": {"../x": log}}.get(str(logs), logs), **arguments)


def test_the_wrong_kind_of_thing_is_named(log, model):
    for call, words in (
        (lambda: model.evaluate("ratings.csv"), "evaluate takes a Log, not str"),
        (lambda: minirec.fit(log, resume=True), "resume goes on with the run in a folder, and none is given"),
        (lambda: minirec.read_log(__file__, ties="shuffled"), "ties is 'shuffled': choose from file, shuffle"),
        (lambda: minirec.read_log(__file__, format="tsv"), "format is 'tsv': choose from lines, pairs"),
        (lambda: list(model.recommend_many([np.array([-1, 3])])), "integers in 0..14"),
        (lambda: list(model.recommend_many([np.array([], int)])), "integers in 0..14"),
        (lambda: model.recommend([10**19]), "item numbers go from 0 to 14"),
        (lambda: model.recommend([1], k="3"), "k is '3'"),
        (lambda: log.history("7"), "no user number '7'"),
        (lambda: log.history(-1), "no user number -1: 0 to 29"),
        (lambda: minirec.Log.from_columns(np.zeros((3, 2)), [1, 2, 3]), "a list, or an array of one dimension"),
        (lambda: minirec.Log.from_columns("abc", [1, 2, 3]), "a list, or an array of one dimension, not str"),
    ):
        with pytest.raises(UserError, match=words):
            call()


def test_large_numbers_beside_a_missing_one_keep_all_their_digits():
    pandas = pytest.importorskip("pandas")
    ids = [None, *(10**18 + i % 4 for i in range(19))]
    columns = [ids, pandas.Series(ids, dtype="Int64")]
    logs = [minirec.Log.from_columns(np.arange(20) % 3, column, np.arange(20)) for column in columns]
    assert [len(log.items) for log in logs] == [4, 4] and logs[0].items == logs[1].items


def test_a_date_beyond_what_nanoseconds_reach_is_refused():
    days = np.array(["2020-01-01", "2020-01-02", "NaT", "9999-12-31"], "M8[s]")
    with pytest.raises(UserError, match="row 4: 9999-12-31T00:00:00 lies outside the years"):
        minirec.Log.from_columns([*"abab"], [*"xyxy"], days)
