"""Is a run that is killed at any instant, and resumed, the run that nobody killed?

    python tests/benchmarks/kills.py [--kills 50] [--study-kills 5] [--seed N]

One run goes through unharmed. Others are given the same command and killed (SIGKILL): half of them at a random moment
between start and end, half while a file is being written, for which the run folder is watched. Each is resumed, a
third of them killed once more on the way, until it ends. Then every array of its npz files must hold the same bits,
metrics.jsonl the same numbers but for the seconds, the folder no other file, and no process may be left. Last, a
study is killed and continued, and must end in the same study.json and study.csv.

Exits with 1 on any difference. The kills are drawn from --seed; where they fall also depends on the machine.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from minirec import files
from minirec.data.planted import household
from minirec.training import runs

ROOT = Path(__file__).resolve().parents[2]
N_USERS = 120  # of the planted dataset: an epoch then takes some 50 ms, and much of a run is writing
OPTIONS = "--data log.txt --epochs 25 --hidden 16 --max-length 12 --batch-size 32".split()
STUDY = "study --data log.txt --seeds 1 --epochs 4 --max-length 8 --workers 2 --out".split()
RESULTS = ("study.json", "study.csv")
TIMES = ("train_seconds", "seconds")
PATIENCE = 60  # seconds until a process that should end is taken for one that hangs


def say(text):
    click.echo(text, err=True)


def start(folder, *arguments):
    """Start `python cli.py ...` in a session of its own, so that whatever it leaves behind can be found."""
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process):
    """Wait for a process and all that it started; return an error, or None."""
    try:
        words = process.communicate(timeout=PATIENCE)[1]  # stderr ends when the last of its workers does
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return f"it, or a worker, still ran after {PATIENCE} s: {process.args}"
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return None if process.returncode in (0, -signal.SIGKILL) else words.strip().splitlines()[-1]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    return f"a process was left behind by {process.args}"


def kill_after(process, seconds):
    """Kill a process after so many seconds; return whether it lived that long."""
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        return True


def kill_in_write(process, folder, rng):
    """Kill a process around a write of a file drawn at random; return whether there was such a write."""
    name = rng.choice(runs.FILES[:-1])
    temporary, writes = folder / f".{name}.tmp", 1 if name.endswith(".json") else rng.randint(1, 12)
    delay, seen = rng.choice((0, rng.random() * 0.005)), False
    while process.poll() is None:
        before, seen = seen, temporary.exists()
        writes -= seen and not before
        if writes == 0:
            time.sleep(delay)
            process.kill()
            return True
        time.sleep(0.0001)
    return False


def place_of(folder):
    """Return where, by what it left, a kill fell."""
    if not (folder / "config.json").exists():
        return "before the run had begun"
    if any(folder.glob(".*.tmp")):
        return "inside a write"
    return "between writes"


def content(folder):
    """Return {what: its bits} of all that a run folder holds, times and the number of workers left out."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".npz":
            for name, array in files.read_arrays(path).items():
                if name not in TIMES:
                    found[f"{path.name} {name}"] = array.dtype, array.shape, array.tobytes()
        elif path.name == "metrics.jsonl":
            lines = files.read_json_lines(path)
            found[path.name] = [{name: x for name, x in line.items() if name not in TIMES} for line in lines]
        elif path.name == "config.json":
            settings = files.read_json(path)
            del settings["training"]["workers"]
            found[path.name] = json.dumps(settings)
        else:
            found[path.name] = path.read_bytes()
    return found


def differences(found, expected):
    """Return what is in one only, or differs."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def resume(scratch, folder, rng):
    """Start a run again, as a person would who has seen how far it came."""
    arguments = ["train", "--resume", "--out", folder, "--workers", rng.choice((1, 2))]
    return start(scratch, *arguments, *(() if (folder / "config.json").exists() else OPTIONS))


def kill_and_resume(scratch, folder, lasts, rng):
    """Kill one run, once or twice, and resume it until it ends; return where the kills fell, and an error or None."""
    places, chances = [], [1.0, 1 / 3]
    process = start(scratch, "train", *OPTIONS, "--workers", rng.choice((1, 2)), "--out", folder)
    while True:
        killed = False
        if chances and rng.random() < chances[0]:
            aim = rng.random() < 0.5
            killed = kill_in_write(process, folder, rng) if aim else kill_after(process, rng.random() * lasts)
        if error := finish(process):
            return places, error
        if killed:
            places.append(place_of(folder))
            chances.pop(0)
        elif places:
            return places, None
        else:  # it ended first: draw another moment
            for path in folder.iterdir():
                path.unlink()
        process = resume(scratch, folder, rng)


def kill_runs(scratch, n, rng):
    """Compare n runs that are killed with one that is not; return how many differ."""
    began = time.perf_counter()
    if error := finish(start(scratch, "train", *OPTIONS, "--workers", 2, "--out", scratch / "whole")):
        raise click.ClickException(error)
    lasts = time.perf_counter() - began
    expected, places, wrong = content(scratch / "whole"), Counter(), 0
    epochs = len(expected["metrics.jsonl"])
    say(f"unharmed: {epochs} epochs, {lasts:.1f} s from start to end; {len(expected)} arrays and files to compare")
    for number in range(1, n + 1):
        folder = scratch / f"run-{number}"
        found, error = kill_and_resume(scratch, folder, lasts, rng)
        places.update(found)
        differ = [] if error else differences(content(folder), expected)
        if error or differ:
            wrong += 1
            say(f"run {number}, killed {', '.join(found)}: {error or 'differs in ' + ', '.join(differ)}")
        elif number % 10 == 0:
            say(f"{number} of {n} runs")
    where = ", ".join(f"{count} {place}" for place, count in places.most_common())
    same = f"{n - wrong} of {n} ended in the bits of the one that was not killed"
    click.echo(f"{n} runs, {places.total()} kills ({where}): {same}")
    return wrong


def kill_study(scratch, n, rng):
    """Compare a study that is killed n times with one that is not; return 1 where they differ, else 0."""
    began = time.perf_counter()
    if error := finish(start(scratch, *STUDY, "whole-study")):
        raise click.ClickException(error)
    lasts = time.perf_counter() - began
    say(f"unharmed: a study of {lasts:.1f} s")
    kills, error, process = 0, None, None
    while kills < n and not error:
        process = start(scratch, *STUDY, "study")
        killed = kill_after(process, rng.uniform(0.1, 0.5) * lasts)
        kills += killed
        error = finish(process)
        if not killed:
            break
    error = error or finish(start(scratch, *STUDY, "study"))
    whole, found = (
        {path.relative_to(folder): path for path in folder.rglob("*")}
        for folder in (scratch / "whole-study", scratch / "study")
    )
    differ = sorted(map(str, whole.keys() ^ found.keys()))
    if not error and not differ:
        differ = [name for name in RESULTS if whole[Path(name)].read_bytes() != found[Path(name)].read_bytes()]
    outcome = f"differs in {', '.join(differ)}" if differ else f"the same {' and '.join(RESULTS)}, to the byte"
    click.echo(f"a study, killed {kills} times and continued: {error or outcome}")
    return int(bool(error or differ))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--kills", type=click.IntRange(min=0), default=50, help="Runs that are killed.")
@click.option("--study-kills", type=click.IntRange(min=0), default=5, help="How often a study is killed.")
@click.option("--seed", type=click.IntRange(min=0), help="Of the kills  [default: a random one, which is printed]")
def main(kills, study_kills, seed):
    """Kill runs and a study at random instants, resume them, compare them with unharmed ones."""
    seed = random.randrange(1 << 32) if seed is None else seed
    rng = random.Random(seed)
    say(f"--seed {seed}")
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        log = household()
        histories = (log.history(u) for u in range(N_USERS))
        lines = (f"{u} " + " ".join(map(str, history)) + "\n" for u, history in enumerate(histories))
        (scratch / "log.txt").write_text("".join(lines))
        wrong = kill_runs(scratch, kills, rng) if kills else 0
        wrong += kill_study(scratch, study_kills, rng) if study_kills else 0
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
