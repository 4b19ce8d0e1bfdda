"""The lesson: its text is the source, its numbers are those of the model, and no assignment that runs is left out."""

import ast
import base64
import hashlib
import html
import inspect
import json
import re
import sys

import numpy as np
import pytest
from browser import Browser
from helpers import call_cli

import minirec
from minirec import model, plain
from minirec.attention import known_weightings
from minirec.lesson import exercises, recording
from minirec.lesson import page as lesson

ASSIGNMENTS = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.For, ast.NamedExpr)


@pytest.fixture(scope="module")
def page():
    return lesson.page().decode()


@pytest.fixture(scope="module")
def data(page):
    text = re.search('id="data">(.*?)</script>', page)[1]
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.fixture(scope="module")
def lines(page):
    """{module: {line: its code}} as the page shows it."""
    found = {module.__name__.split(".")[-1]: {} for module in lesson.CHAPTERS}
    for module, number, code in re.findall(r'id="(\w+)-(\d+)" style=.*?<code>(.*?)</code>', page):
        found[module][int(number)] = html.unescape(re.sub("<[^>]*>", "", code))
    return found


def entries(data, function, name):
    """The recorded values of a name, call by call, each an index or one a weighting."""
    for called, _, _, _, written in data["calls"]:
        for names in written.values():
            for title, *times in names:
                if (called, title) == (function, name):
                    yield times


def array(data, entry, w=0):
    sizes, numbers = data["values"][entry[w] if isinstance(entry, list) else entry]
    return np.array([float(str(x).replace("\u2212", "-")) for x in numbers]).reshape(sizes)


def test_every_assignment_that_runs_has_its_numbers_on_the_page(data, lines):
    """Which lines run is counted by a second tracer, which knows nothing of the recorder."""
    ran, files = set(), {module.__file__: module.__name__.split(".")[-1] for module in recording.CORE}

    def watch(frame, event, _):
        if frame.f_code.co_filename not in files or frame.f_code.co_name.startswith("<"):
            return None
        ran.add((files[frame.f_code.co_filename], frame.f_lineno))
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    for attn in known_weightings():
        lesson.scenes(attn)
    sys.settrace(before)
    shown = {}
    for function, *_, written in data["calls"]:
        for number, names in written.items():
            shown.setdefault((function.split(".")[0], int(number)), set()).update(name for name, *_ in names)
    counted = 0
    for module in recording.CORE:
        title, tree = module.__name__.split(".")[-1], ast.parse(inspect.getsource(module))
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            for node in ast.walk(function):
                if isinstance(node, ASSIGNMENTS) and (title, node.lineno) in ran:
                    targets = getattr(node, "targets", [getattr(node, "target", None)])
                    written = {name.split("[")[0] for name in shown.get((title, node.lineno), ())}
                    first = {re.match(r"\w+", ast.unparse(t).lstrip("("))[0] for t in targets}
                    assert first <= written, f"{title}, line {node.lineno}: {ast.unparse(node)}"
                    assert node.lineno in lines[title]
                    counted += 1
    assert counted > 300


@pytest.mark.parametrize("module", lesson.CHAPTERS, ids=lambda module: module.__name__.split(".")[-1])
def test_the_code_and_the_words_are_those_of_the_source(module, page, lines):
    source, shown = inspect.getsource(module), lines[module.__name__.split(".")[-1]]
    docstrings = set()
    text = re.sub("<[^>]*>", " ", re.sub(r"</?(a|code)\b[^>]*>", "", page))
    words = " ".join(html.unescape(text).split())
    told = lambda line: " ".join(line.replace("`", "").split()) in words
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
            for line in ast.get_docstring(node).splitlines():
                assert told(line)
    for number, line in enumerate(source.splitlines(), 1):
        if number in docstrings or not line.strip():
            assert number not in shown
        elif line.strip().startswith("#"):
            assert told(line.strip("# "))
        else:
            assert shown[number] == line


def test_the_numbers_are_those_of_the_model(data):
    for w, attn in enumerate(known_weightings()):
        config, p = recording.example(attn)
        loss, gradients = model.loss_and_gradients(p, config, recording.SEQUENCES)
        (times,) = entries(data, "model.loss_and_gradients", "loss")
        assert array(data, times[0], w) == pytest.approx(loss, rel=1e-3)
        *_, times = entries(data, "plain.loss_and_gradients", "loss")
        assert array(data, times[-1], w) == pytest.approx(loss, rel=1e-3)  # the third user's share is in
        for (name, hand, numeric, off), gradient in zip(data["gradients"], gradients.values(), strict=True):
            np.testing.assert_allclose(array(data, hand[w]), gradient, rtol=1e-3, atol=1e-12, err_msg=name)
            assert off[w] < 1e-8
            np.testing.assert_allclose(array(data, numeric[w]), gradient, rtol=1e-3, atol=1e-8)


def test_a_line_that_writes_in_place_is_shown_before_and_after(data):
    out = [array(data, times[0]) for times in entries(data, "ops.linear", "out")]
    x, w, b = (np.array([0]) for _ in range(3))
    for call in data["calls"]:
        if call[0] == "ops.linear":
            named = {name: times for names in call[4].values() for name, *times in names if name in "xwb"}
            x, w, b = (array(data, named[name][0]) for name in "xwb")
            break
    np.testing.assert_allclose(out[0], x @ w, atol=5e-3)
    np.testing.assert_allclose(out[1], x @ w + b, atol=5e-3)


def test_what_comes_before_the_weights_is_the_same_under_all_weightings_and_what_follows_is_not(data):
    """Of the forward: -1 where a fixed weighting needs no query."""
    for function, name, same in (
        ("plain.block", "q", True),
        ("plain.block", "x", True),
        ("plain.block", "o", False),
        ("plain.block", "out", False),
        ("model.block", "v", True),
        ("model.block", "y", False),
        ("plain.attention_weights", "i", True),
    ):
        times = next(entries(data, function, name))
        assert (not isinstance(times[-1], list)) is same, name
    *_, learned = (times for times in entries(data, "attention.attention", "k_heads") if isinstance(times[0], list))
    assert learned[0][1:] == [-1, -1, -1]


def test_a_backward_knows_the_call_that_it_goes_back_through(data):
    counted = 0
    for function, *_, forward, written in data["calls"]:
        if function in ("ops.linear_backward", "ops.layer_norm_backward", "ops.relu_backward"):
            named = lambda lines: {name: times[0] for names in lines.values() for name, *times in names}
            there = named(data["calls"][forward][4])
            first = lambda entry: entry[0] if isinstance(entry, list) else entry
            passed = "out" if function == "ops.relu_backward" else "cache"
            came = data["values"][first(there["return"])]["parts"][1][1]
            assert first(named(written)[passed]) == came
            counted += 1
    assert counted > 8


def test_a_step_is_recorded_with_every_name_in_its_order():
    config, p = recording.example()
    events = recording.record(lambda: plain.layer_norm(np.ones((2, 4)), p, "embedding_norm"))
    assert [event.name for event in events] == ["x", "p", "name", "centred", "sigma", "normed", "return"]
    assert events[3].value.shape == (2, 4) and events[-1].value[1][1] is not events[4].value


def test_arrays_that_are_not_written_yet_hold_nothing(data):
    out = next(entries(data, "attention.attention", "out"))[0]
    assert np.isnan(array(data, out)).all()


def test_the_tracer_and_numpy_are_put_back():
    def tracer(frame, event, argument):
        return None

    before, empty = sys.gettrace(), np.empty
    for run in (lambda: None, lambda: 1 / 0):
        sys.settrace(tracer)
        try:
            recording.record(run)
        except ZeroDivisionError:
            pass
        found = sys.gettrace()
        sys.settrace(before)
        assert found is tracer and np.empty is empty


def test_the_page_is_the_same_again_and_small(page):
    assert lesson.page().decode() == page and 5e5 < len(page) < 2e6


def test_the_page_loads_nothing_and_runs_one_script(page):
    script = page.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page
    assert not re.search(r"<(img|link|iframe|object|base|form)\b|\ssrc=|url\(|@import|https?://", page)
    assert not re.search(r'href="[^#]', page) and page.count("<script") == 2
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "Function(", "fetch("):
        assert word not in script


def test_every_exercise_stands_on_the_page_and_beside_its_function(page, data):
    assert [name for name, *_ in data["exercises"]] == list(exercises.CASES)
    for name in ("layer_norm_backward", "attention_backward", "attention_backward_dropout"):  # two of one function
        assert f"python cli.py exercise {name}</code>" in page


def test_the_chapters_stand_in_the_reading_order():
    course = minirec.__doc__.split("in this order:")[1].replace("\n", " ").strip(" .").split(", ")
    assert lesson.NAMES == [name for name in course if name in lesson.NAMES]


def test_the_command_writes_the_page(page, tmp_path):
    process = call_cli("lesson", "--out", tmp_path / "a.html")
    assert process.exit_code == 0 and "open it in a browser" in process.stderr
    assert (tmp_path / "a.html").read_text() == page
    process = call_cli("lesson", "--out", tmp_path / "no" / "a.html")
    assert process.exit_code == 1 and len(process.stderr.splitlines()) == 1


def values(function, name):
    """Script that finds the values beside a function's lines whose text begins with a name."""
    chips = f"""document.querySelectorAll('[data-function="{function}"] .values > *')"""
    return f'[...{chips}].filter((node) => node.textContent.startsWith("{name}"))'


def test_a_browser_opens_a_chapter_a_value_and_another_weighting(page, tmp_path):
    (tmp_path / "lesson.html").write_text(page)
    browser = Browser(tmp_path / "profile")
    try:
        browser.size(1280, 900)
        browser.open(tmp_path / "lesson.html")
        assert browser.run("document.querySelectorAll('nav a').length") == len(lesson.CHAPTERS) + 2
        browser.run("document.querySelector('nav a[href=\"#attention\"]').click()")
        assert browser.run("location.hash") == "#attention"
        weights, d_x = values("attention.attention", "weights "), values("ops.layer_norm_backward", "d_x")
        assert browser.run(f"{weights}.map((n) => n.textContent)") == ["weights [1, 2, 2, 2] ×3"]
        browser.run(f"{weights}[0].click()")
        assert browser.run("document.querySelectorAll('.panel table').length") == 6  # three buckets, two heads
        assert browser.run("document.querySelector('.panel td').textContent") == "1"
        assert browser.run("document.querySelectorAll('.marked').length") > 5
        browser.run(f"{d_x}[1].click()")
        assert "of which it is the gradient" in browser.run(f"{d_x}[1].closest('.line').textContent")
        browser.run("document.querySelectorAll('#switch input')[1].click()")
        assert browser.run(f"{weights}.map((n) => n.textContent)") == ["weights [2, 2] ×3 ≠"]
        browser.run("document.querySelectorAll('#switch input')[4].click()")
        browser.run(f"{values('plain.block', 'o ')}[0].click()")
        assert browser.run("[...document.querySelectorAll('.panel .title')].map((n) => n.textContent)") == list(
            known_weightings()
        )
        browser.run("document.querySelector('#gradient-list summary').click()")
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        browser.size(390, 844, phone=True)
        assert browser.run("document.documentElement.scrollWidth") == 390
        assert browser.complaints == []
    finally:
        browser.close()


def test_a_loop_writes_its_target_as_often_as_it_runs(data):
    assert [len(times) for times in entries(data, "attention.attention", "bucket")] == [3, 3, 1, 3, 1]
