"""Exercises: their files are made from the source, our solution passes, and what is wrong with another one is named."""

import os
import sys

import numpy as np
import pytest
from helpers import call_cli

from minirec.lesson import exercises

NAMES = tuple(exercises.CASES)
SLIPS = [(name, *slip) for name, words in exercises.exercises().items() for slip in words.slips]


def judged(name, source, folder):
    path = folder / "mine.py"
    path.write_text(source)
    return exercises.judge(name, str(path))


def write(name, body, first="import numpy as np"):
    """A student's file: this body under the signature that is asked for."""
    signature = next(line for line in exercises.text_of(name).splitlines() if line.startswith(f"def {name}("))
    return f"{first}\n\n{signature}\n" + "".join(f"    {line}\n" for line in body.split("\n"))


@pytest.mark.parametrize("name", NAMES)
def test_our_solution_passes_and_the_empty_file_asks_for_work(name, tmp_path):
    assert judged(name, exercises.source_of(name), tmp_path)[0]
    text = exercises.text_of(name)
    right, says = judged(name, text, tmp_path)
    line = next(n for n, line in enumerate(text.splitlines(), 1) if "raise NotImplementedError" in line)
    assert not right and f"line {line}: NotImplementedError: not written yet" in says and "hint: " in says
    assert exercises.source_of(name).splitlines()[-1] not in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name, says, old, new", SLIPS, ids=[f"{slip[0]}-{n}" for n, slip in enumerate(SLIPS)])
def test_each_typical_mistake_is_named(name, says, old, new, tmp_path):
    assert old in exercises.source_of(name)
    right, found = judged(name, exercises.source_of(name).replace(old, new), tmp_path)
    assert not right and f"off: {says}" in found


def test_a_mistake_that_our_source_no_longer_allows_is_seen():
    with pytest.raises(AssertionError, match="relu_backward has no nothing like that"):
        exercises.ours(exercises.exercises()["relu_backward"], "nothing like that", "")


BROKEN = {
    "no return": ("relu_backward", "d_out * (out > 0)", "it returns nothing, where d_x should come back"),
    "wrong shape": ("relu_backward", "return (d_out * (out > 0))[:2]", "its shape is [2, 4], where [5, 4] belongs"),
    "transposed": ("relu_backward", "return (d_out * (out > 0)).T", "transposed: its shape is [4, 5]"),
    "summed": ("relu_backward", "return (d_out * (out > 0)).sum(axis=0)", "summed over axis 0: its shape is [4]"),
    "nan": ("relu_backward", "return d_out * (out / out)", "NaN or infinity in "),
    "no array": ("relu_backward", "return 'd_x'", "d_x is of type str, where an array of numbers belongs"),
    "factor": ("relu_backward", "return -2 * d_out * (out > 0)", "everywhere -2 times what it should be"),
    "known factor": ("linear_backward", "d_x = d_out @ cache.w.T / len(d_out)\nreturn d_x", "which is 1/(N)"),
    "zero": ("relu_backward", "return 0 * d_out", "0 everywhere"),
    "no pattern": ("relu_backward", "return d_out * (out > 0) + out**2 * d_out", "wrong by no pattern"),
    "rebound": ("linear_backward", "d_w = cache.x.T @ d_out\nreturn d_out @ cache.w.T", "d_w  off: unchanged"),
    "overwritten": ("linear_backward", "d_b[:] = d_out.sum(axis=0)\nreturn d_out @ cache.w.T", "d_b  off: overwritten"),
    "square transposed": ("linear_backward", "d_w += d_out.T @ cache.x\nreturn d_out", "d_w  off: transposed"),
    "all axes": ("linear_backward", "d_b += d_out.sum()\nreturn d_out", "d_b  off: one number everywhere"),
    "its own argument": ("relu_backward", "d_out *= out > 0\nreturn d_out", "it changes d_out, which others may still"),
    "its cache": ("linear_backward", "cache.w[:] = 0\nreturn d_out", "it changes cache.w"),
    "row factor": ("layer_norm_backward", "return 0 * d_out", "d_beta"),
    "count": ("cross_entropy", "return 1.0", "it should return 2 values: loss, d_x"),
    "a key": ("user_values", "return {'HR@1': ranks < 1}", "what it returns has no NDCG@1"),
    "an exception": ("relu_backward", "a = 1\nreturn d_out @ out", "line 5: ValueError: matmul: Input operand 1 has a"),
    "syntax": ("relu_backward", "return (", "SyntaxError"),
    "shapes": (
        "layer_norm_backward",
        "return d_out @ cache.sigma.T @ d_out.T",
        "it was called with d_out [5, 4], cache.n",
    ),
    "leaves": ("relu_backward", "raise SystemExit(0)", "line 4: SystemExit: 0"),
    "another name": ("softmax", "pass\ndef other(): pass\n" + "del globals()['softmax']", "it returns nothing"),
}


@pytest.mark.parametrize("name, body, says", BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_is_named(name, body, says, tmp_path):
    right, found = judged(name, write(name, body), tmp_path)
    assert not right and says in found and "hint: " in found


ROWS = "s = {}\ne = np.exp(s)\nreturn e / e.sum(axis={}, keepdims=True)"
TOKENS = """z = x @ items.T
z = z - z.max(axis=1, keepdims=True)
p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
row = np.arange(len(x))
loss = -np.log(p[row, targets]).sum()
p[row, targets] -= 1
d_items += p.T @ x * {0}
return loss * {0}, p @ items * {0}"""
LATER = {  # right on one small example, wrong in the model
    "a maximum of the future": ("softmax", ROWS.format("scores - scores.max(-1, keepdims=True) + mask", -1), "large"),
    "a sum over sequences": ("softmax", ROWS.format("scores - scores.max() + mask", "(0, -1)"), "two sequences"),
    "1/N for scale": ("cross_entropy", TOKENS.format("(1 / len(x))"), "random"),
    "log of 0": ("cross_entropy", TOKENS.format("scale"), "large"),
    "no mask": ("dropout_backward", "return d_out * mask", "no dropout: mask is None"),
}


@pytest.mark.parametrize("name, body, says", LATER.values(), ids=LATER)
def test_what_is_wrong_in_one_case_alone_is_refused_and_the_case_is_named(name, body, says, tmp_path):
    right, found = judged(name, write(name, body), tmp_path)
    assert not right and [line for line in found.splitlines() if line.endswith(":")][-1].startswith(says)


def test_a_file_without_the_function_is_told_so(tmp_path):
    right, says = judged("softmax", "def soft_max(scores): pass", tmp_path)
    assert not right and says.startswith("off: it defines no function softmax\nhint: ")


def test_a_row_and_a_column_with_something_of_its_own_are_told_apart(rng):
    wanted, row, column = rng.normal(size=(5, 4)), rng.normal(size=(5, 1)), rng.normal(size=(1, 4))
    for got, says in (
        (wanted + row, "wrong by one number along each row"),
        (wanted + column, "wrong by one number down each column"),
        (wanted * row, "wrong by one factor along each row"),
        (wanted * column, "wrong by one factor down each column"),
        (wanted * 2, "everywhere 2 times what it should be, which is K"),
        (wanted / 2**0.5, "everywhere 0.70711 times what it should be, which is 1/sqrt(K)"),
        (wanted * row + column, "wrong by no pattern"),
    ):
        assert exercises.pattern(got, wanted, None, {"K": 2}).startswith(says)


def test_what_depends_on_the_size_of_numbers_is_judged_by_it():
    tiny = np.full(3, 1e-19)
    assert exercises.close(tiny, tiny * (1 + 1e-9)) and not exercises.close(tiny, 2 * tiny)
    assert exercises.close(np.full(3, 1e-9), np.zeros(3)) and not exercises.close(np.full(3, 1e-3), np.zeros(3))


def test_a_students_file_runs_in_a_process_of_its_own(tmp_path, capfd):
    path, more = tmp_path / "mine.py", "import os\nprint('so far')\nos.environ['MINE'] = '1'\n"
    path.write_text(more + exercises.source_of("relu_backward"))
    assert exercises.judge_apart("relu_backward", path)[0]
    assert "so far" in capfd.readouterr().err and "MINE" not in os.environ
    path.write_text("import os\nos._exit(7)")
    right, says = exercises.judge_apart("relu_backward", path)
    assert not right and says == "off: its process ended without an answer (exit status 7)"


def test_a_loop_without_an_end_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(exercises, "TIME_LIMIT", 1)
    (tmp_path / "mine.py").write_text("while True: pass")
    right, says = exercises.judge_apart("relu_backward", tmp_path / "mine.py")
    assert not right and says == "off: not done after 1 seconds: is there a loop without an end?"


def test_the_command_lists_writes_checks_and_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [line.split()[0] for line in call_cli("exercise").stdout.splitlines()] == list(NAMES)
    process = call_cli("exercise", "layer_norm_backward")
    assert process.exit_code == 0 and "wrote layer_norm_backward.py" in process.stderr
    text = (tmp_path / "layer_norm_backward.py").read_text()
    assert "class LayerNormCache" in text and "def layer_norm(x, gamma, beta):" in text and "mean(e n)" not in text
    process = call_cli("exercise", "layer_norm_backward")
    assert process.exit_code == 1 and "is not overwritten" in process.stderr
    assert (tmp_path / "layer_norm_backward.py").read_text() == text
    process = call_cli("exercise", "layer_norm_backward", "--check", "layer_norm_backward.py")
    assert process.exit_code == 1 and "NotImplementedError" in process.stdout
    process = call_cli("exercise", "layer_norm_backward", "--solution")
    (tmp_path / "mine.py").write_text(process.stdout)
    process = call_cli("exercise", "layer_norm_backward", "--check", "mine.py")
    assert process.exit_code == 0 and process.stdout.splitlines()[-1] == "right: layer_norm_backward is solved"


@pytest.mark.parametrize(
    "arguments, status, says",
    [
        (["nothing"], 2, "'nothing' is not one of 'relu_backward', "),
        (["softmax", "--check", "nowhere.py"], 1, "nowhere.py: cannot be read"),
        (["softmax", "--check", "."], 1, "a regular file belongs here"),
        (["--solution"], 2, "which exercise?"),
        (["softmax", "--solution", "--check", "a.py"], 2, "choose one of them"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, status, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process = call_cli("exercise", *arguments)
    assert process.exit_code == status and says in process.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir()) and sys.exc_info() == (None, None, None)
