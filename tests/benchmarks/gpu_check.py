"""Does everything run on this GPU, is it right, and how fast is it? One command, some minutes, no network:

    python tests/benchmarks/gpu_check.py [--data beauty.txt --ml-1m ml-1m.txt] [--only speed]

One line a check; after a failure the rest goes on, and the exit code is 1. Needs CuPy and pytest; PyTorch with CUDA for
the comparison (`device.py` says how it is timed). Without a file, synthetic logs of the two shapes serve.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from minirec import backend
from minirec.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CLOSE, SAME = 1e-4, 1e-3  # of losses, of metrics: the GPU's against NumPy's, as gap says
TRAJECTORY = 200  # steps
GROUPS = ("right", "speed", "profile")
BATCH_SIZES = (128, 512, 2048)
CLI, DEVICE = [sys.executable, "cli.py"], [sys.executable, "tests/benchmarks/device.py"]
VERSIONS = """
import sys, numpy, cupy
runtime = cupy.cuda.runtime
print(runtime.getDeviceProperties(0)["name"].decode(), "| driver CUDA", runtime.driverGetVersion(), "| CuPy",
      cupy.__version__, "for CUDA", runtime.runtimeGetVersion(), "| NumPy", numpy.__version__, "| Python",
      sys.version.split()[0], end="")
try:
    import torch
    print(" | PyTorch", torch.__version__)
except ImportError:
    print(" | no PyTorch")
"""


class Checks:
    """Runs the checks, prints a line for each, and counts those that failed."""

    def __init__(self, folder):
        self.folder, self.failed = folder, 0

    def report(self, name, error, says, began):
        self.failed += bool(error)
        click.echo(f"{'FAILED' if error else 'ok':<7} {name} ({time.monotonic() - began:.0f} s): {error or says}")

    def command(self, name, seconds, arguments, show=False):
        """Run a command within a time limit; return what it printed, None where it failed."""
        began = time.monotonic()
        try:
            done = subprocess.run(
                [str(a) for a in arguments], cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
            )
            out, error = done.stdout.strip(), done.returncode and f"exit {done.returncode}"
            tail = (done.stderr.strip() or out)[-1500:]
        except subprocess.TimeoutExpired as ran_out:
            out, error, tail = "", f"longer than {seconds} s", str(ran_out.stderr or "")[-500:]
        (self.folder / f"{name}.log".replace(" ", "-")).write_text(out)
        lines = out.splitlines() or [""]
        self.report(name, error, lines[0] if show else lines[-1][:140], began)
        if show or error:
            click.echo("\n".join(f"    {line}" for line in (tail.splitlines() if error else lines[1:])))
        return None if error else out

    def holds(self, name, check):
        """Call check(): it returns what to say, or raises."""
        began = time.monotonic()
        try:
            self.report(name, None, check(), began)
        except Exception as error:
            self.report(name, f"{type(error).__name__}: {error}", None, began)


def gap(ours, theirs):
    """Return the largest gap between two lists of numbers, relative where they are larger than 1."""
    ours, theirs = np.array(ours), np.array(theirs)
    return float((np.abs(ours - theirs) / np.maximum(np.abs(theirs), 1)).max())


def within(value, limit):
    """Return a text that says a gap; raises where it is not below the limit."""
    if not value < limit:
        raise ValueError(f"gap {value:.1e}, where {limit:.0e} would do")
    return f"largest gap {value:.1e} ({limit:.0e} would do)"


def trajectory(log, attn):
    """Return the largest gap of the losses of TRAJECTORY steps on both backends, without dropout."""
    from device import schedule, train_minirec

    from minirec.model import Config

    config, losses = Config(len(log.items), dropout=0, attn=attn), []
    for xp in (backend.load("cupy"), np):
        with train_minirec(xp, log, config) as step:
            inputs = schedule(log, config, 128, TRAJECTORY)
            losses.append([float(step(number, *pair)) for number, pair in enumerate(inputs)])
    return gap(*losses)


def numbers(text):
    """Return all numbers of a command's last line of JSON, in order."""

    def walk(x):
        if isinstance(x, dict):
            return [n for value in x.values() for n in walk(value)]
        return [float(x)] if isinstance(x, (int, float)) else []

    return walk(json.loads(text.splitlines()[-1]))


def right(checks, log, data):
    """Tests, gradients, and every command against NumPy's results."""
    from minirec.loss import LOSSES

    folder = checks.folder
    checks.command(
        "tests", 120, [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/test_device.py"]
    )
    checks.command("gradcheck", 60, [*CLI, "gradcheck", "--backend", "cupy"])
    for attn in ("softmax", "uniform"):
        checks.holds(f"{TRAJECTORY} steps, {attn}", lambda attn=attn: within(trajectory(log, attn), CLOSE))
    run, other = folder / "run", folder / "run-numpy"
    train = [*CLI, "train", "--data", data, "--epochs", 1, "--json"]
    checks.command("train on the GPU", 60, [*train, "--backend", "cupy", "--out", run])
    checks.command("train on the CPU", 60, [*train, "--backend", "numpy", "--out", other])
    for command, options, trained in (
        ("evaluate", [], run),
        ("evaluate", [], other),  # a checkpoint of one backend, read by the other
        ("evaluate", ["--attn", "uniform"], run),
        ("decompose", [], run),
    ):
        name, texts = " ".join([command, *options[1:], "of", trained.name]), []
        for where in ("cupy", "numpy"):
            arguments = [*CLI, command, trained, "--backend", where, *options, "--json"]
            texts.append(checks.command(f"{name}, {where}", 60, arguments))
        if all(texts):
            checks.holds(f"{name}, both", lambda t=texts: within(gap(*map(numbers, t)), SAME))
    out = folder / "recommendations.csv"
    checks.command("recommend", 60, [*CLI, "recommend", run, "--backend", "cupy", "--all", "--out", out])
    checks.command("report", 60, [*CLI, "report", run, "--out", folder / "report.html"])
    for loss in LOSSES[1:]:
        arguments = ["--backend", "cupy", "--loss", loss, "--out", folder / loss]
        checks.command(f"train, loss {loss}", 60, [*train, *arguments])


def shapes(data, ml_1m):
    """Return {name: options of device.py}, in the paper's settings for sparse data and for MovieLens-1M."""
    return {
        "Beauty": ["--data", data] if data else ["--shape", "beauty"],
        "ML-1M": [*(["--data", ml_1m] if ml_1m else ["--shape", "ml-1m"]), "--max-length", 200, "--dropout", 0.2],
    }


def speed(checks, data, ml_1m):
    """The table: a step beside PyTorch's, and the analyses beside the CPU's."""
    contenders = ["cupy", *(["torch"] if importlib.util.find_spec("torch") else [])]
    for name, options in shapes(data, ml_1m).items():
        for size in BATCH_SIZES:
            names = [*contenders, *(["numpy"] if size == min(BATCH_SIZES) else [])]
            arguments = [a for x in names for a in ("--contender", x)] + ["--attn", "softmax", "--attn", "uniform"]
            steps = 30 if size < max(BATCH_SIZES) else 10
            arguments += ["--batch-size", size, "--steps", steps]
            checks.command(f"{name}, batch {size}", 90, [*DEVICE, *options, *arguments], show=True)
        checks.command(f"{name}, analyses", 60, [*DEVICE, *options, "--analysis", "--attn", "softmax"], show=True)


def profile(checks, data, ml_1m):
    """Where the time of one step goes, on the device and on the host; and what a compiler makes of PyTorch's."""
    for name, options in shapes(data, ml_1m).items():
        checks.command(f"profile of {name}", 60, [*DEVICE, *options, "--profile", "--attn", "softmax"], show=True)
    if importlib.util.find_spec("torch"):
        compiled = ["--contender", "compiled", "--attn", "softmax"]
        checks.command("torch.compile", 90, [*DEVICE, *shapes(data, ml_1m)["Beauty"], *compiled], show=True)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--data", type=click.Path(exists=True, dir_okay=False, resolve_path=True), help="Beauty's log.")
@click.option("--ml-1m", type=click.Path(exists=True, dir_okay=False, resolve_path=True), help="MovieLens-1M's log.")
@click.option("--only", multiple=True, type=click.Choice(GROUPS), default=GROUPS)
def main(data, ml_1m, only):
    """Check minirec on a GPU."""
    from training import synthetic_log

    from minirec.data.log import read_log

    try:
        backend.load("cupy")
    except UserError as error:
        raise click.ClickException(str(error)) from None
    with tempfile.TemporaryDirectory() as folder:
        checks = Checks(Path(folder))
        checks.command("versions", 60, [sys.executable, "-c", VERSIONS])
        if "right" in only:
            log = read_log(data) if data else synthetic_log()
            right(checks, log, data or "household")
        if "speed" in only:
            speed(checks, data, ml_1m)
        if "profile" in only:
            profile(checks, data, ml_1m)
    click.echo(f"{checks.failed} failed")
    sys.exit(checks.failed > 0)


if __name__ == "__main__":
    main()
