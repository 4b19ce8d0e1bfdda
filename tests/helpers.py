"""What many tests use: small logs, the command line, results computed by hand, real logs where they lie."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from minirec import model
from minirec.cli import main
from minirec.data.log import Log
from minirec.training.ranking import MISS

ROOT = Path(__file__).resolve().parent.parent
DATASETS = Path(os.environ.get("MINIREC_DATASETS", ROOT.parent / "shared" / "datasets"))


def assert_gradient(analytic, numeric, tolerance=1e-7):
    """max |difference| / max |gradient| is below the tolerance, and the gradient is not all zero."""
    assert np.abs(numeric).max() > 1e-6
    assert np.abs(analytic - numeric).max() / np.abs(numeric).max() < tolerance


def run_cli(*arguments, cwd, environment=None):
    """Run `python cli.py ...`; return the finished process with stdout and stderr as text."""
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=300, env=os.environ | (environment or {})
    )


def call_cli(*arguments):
    """Call the command line in this process; return click's result, with exit_code, stdout and stderr."""
    return CliRunner().invoke(main, list(map(str, arguments)))


def last_json(process):
    """The JSON object that a successful command printed, alone, on stdout."""
    assert (process.exit_code if hasattr(process, "exit_code") else process.returncode) == 0, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) == 1, "--json prints one line and nothing else"
    return json.loads(lines[0], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def log_of(sequences):
    """The Log of these sequences of item numbers; users and items are called by their numbers."""
    names = [str(i) for i in range(1 + max(map(max, sequences)))]
    offsets = np.cumsum([0] + [len(s) for s in sequences])
    return Log([str(u) for u in range(len(sequences))], names, offsets, np.concatenate(sequences).astype(np.int32))


def ranked_by_hand(parameters, config, log, cases, filter_seen, sequence=None):
    """The rank of each case's target by a sort of all scores; sequence: histories to read instead of the log's."""
    ranks = []
    for start, stop in zip(cases.starts, cases.stops, strict=True):
        (x,) = model.encode(parameters, config, [(log.sequence if sequence is None else sequence)[start:stop]])
        scores, seen, target = parameters["item_embedding"] @ x[-1], log.sequence[start:stop], log.sequence[stop]
        candidates = [i for i in np.argsort(-scores) if not (filter_seen and i in seen)]
        ranks.append(candidates.index(target) if target in candidates else MISS)
    return np.array(ranks)


def counted_by_hand(log, split, cases, filter_seen):
    """What baselines.rank_baselines returns, as it is defined: scores of all items, one case at a time."""
    histories = [log.history(u).tolist() for u in range(len(log.users))]
    trained = [history[:n] for history, n in zip(histories, split.train_lengths, strict=True)]
    items = range(len(log.items))
    popularity = [sum(history.count(i) for history in trained) for i in items]
    ranks = {"popularity": [], "transitions": []}
    for start, stop in zip(cases.starts, cases.stops, strict=True):
        history, target = log.sequence[start:stop].tolist(), log.sequence[stop]
        follows = [sum(pair == (history[-1], i) for h in trained for pair in itertools.pairwise(h)) for i in items]
        for name, score in (("popularity", popularity), ("transitions", list(zip(follows, popularity, strict=True)))):
            candidates = [i for i in items if not (filter_seen and i in history)]
            ahead = sum(score[i] >= score[target] for i in candidates if i != target)
            ranks[name].append(ahead if target in candidates else MISS)
    return {name: np.array(values) for name, values in ranks.items()}


def real_log(name):
    """The path of a real log, or a skip where it is not at hand."""
    if not (DATASETS / name).exists():
        pytest.skip(f"{name} is not in {DATASETS}")
    return DATASETS / name
