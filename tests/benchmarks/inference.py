"""How long does a trained model take: to decompose, to serve a user, to evaluate a log?

    python tests/benchmarks/inference.py [--part serving] ... [--data FILE] [--max-length 200]

    decomposition   Given the forward caches of 128 sequences: the mixing ratios and the norms of all
                    pairwise contributions of both blocks, by minirec.decompose and by PyTorch from
                    the same caches, which builds F [B, L, L, D]: line by line as defined, in place, and in
                    place for a few sequences at a time.
                    First both are checked to give the same numbers. Left out without PyTorch.
    serving         Representing a history by its last position, and with scoring of all items and the
                    10 best: for one user at a time on one core, and for many at a time on all cores.
    evaluation      Ranking the test target of every user of a log among all items.

Models have the paper's sizes and are not trained, since that changes no time. Every program runs in a
process of its own, one at a time; those that are compared take turns, so that whatever else the
machine does falls on all of them alike. Everything runs in float32 on the CPU.

PyTorch is not a dependency of minirec: pip install torch --index-url https://download.pytorch.org/whl/cpu

Symbols: B sequences, L positions, N tokens, D hidden size, H heads, K = D/H, V items.
"""

import importlib.util
import multiprocessing
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training import (
    KEEP_MEMORY,
    SEED,
    Contender,
    aligned,
    allocated_mb,
    race,
    say,
    synthetic_log,
    thread_counts,
)

from minirec.attention import known_weightings
from minirec.data.read import read_log
from minirec.data.split import leave_one_out
from minirec.decompose import RATIOS, RECENT, block_caches, contribution_norms, mixing_ratios, work_chunks
from minirec.errors import UserError
from minirec.parameters import Config, init_parameters, sub_dict
from minirec.training.parallel import usable_cores, worker_map
from minirec.training.ranking import TARGETS_AT_A_TIME, chunks, last_representations, metrics, rank_targets, recommend

N_ITEMS = 12_101  # of Beauty (Amazon, 5-core)
LENGTHS = (50, 200)
SEQUENCES = 128  # B, to decompose
TOLERANCE = 1e-5  # of the check, absolute, in float32
TRIES = 2  # steps with each choice of threads and sequences at a time, before the timing
CALLS = {50: 3, 200: 1}  # decompositions in a turn: waking up from the pause before it must count for little
TOP = 10  # items to recommend
ALONE = 50  # users that are served one after the other in one measurement


# Decomposition


class Example(NamedTuple):
    """What is decomposed: the same in every process."""

    config: Config
    parameters: dict
    sequence: np.ndarray  # [B * L] items, all sequences end to end
    starts: np.ndarray  # [B]
    lengths: np.ndarray  # [B], all L


def example(length):
    """Return an Example of random items and parameters.

    To the initial parameters, biases and norms too, noise is added, so that every part is large
    enough to compare: initial weights are almost uniform, and what attention adds is then next to nothing.
    """
    rng = np.random.default_rng(SEED)
    config = Config(N_ITEMS, max_length=length)
    parameters = init_parameters(config, SEED)
    for value in parameters.values():
        value += rng.normal(0, 0.1, value.shape)
    starts = np.arange(SEQUENCES) * length
    return Example(
        config, parameters, rng.integers(N_ITEMS, size=SEQUENCES * length), starts, np.full_like(starts, length)
    )


def decompose_minirec(length):
    """Yield decompose(run) -> results of minirec for an example, its caches filled already.

    As minirec.decompose does, it takes one chunk of work at a time. Results are a list with, for each
    chunk and block, ({ratio: [N]}, [contribution norms [B, RECENT, RECENT], a bucket each]).
    """
    e = example(length)
    p = [sub_dict(e.parameters, f"blocks.{i}.") for i in range(e.config.n_blocks)]
    caches = [
        block_caches(e.parameters, e.config, e.sequence, e.starts[chunk], e.lengths[chunk])
        for chunk in work_chunks(e.lengths, np)
    ]

    def of_chunk(chunk):
        batch, caches = chunk
        found = []
        for parameters, cache in zip(p, caches, strict=True):
            ratios = mixing_ratios(cache, parameters, batch.buckets)
            norms = [
                contribution_norms(cache, parameters, bucket, attention, RECENT, RECENT)
                for bucket, attention in zip(batch.buckets, cache["attention"], strict=True)
            ]
            found.append((ratios, norms))
        return found

    return lambda run: list(run(of_chunk, caches))


class TorchCache(NamedTuple):
    """What PyTorch gets of one block: all tensors in float32, contiguous."""

    x: object  # [B, L, D] the block's input
    a: object  # [B, H, L, L] attention weights
    v: object  # [B, H, L, K] values, with their bias
    w_o: object  # [H, K, D]
    sigma: object  # [B, L, 1] of the layer norm after attention
    gamma: object  # [D]


def torch_caches(length):
    """Return a TorchCache a block of an example."""
    import torch

    e = example(length)
    batch, caches = block_caches(e.parameters, e.config, e.sequence, e.starts, e.lengths)
    assert len(batch.buckets) == 1 and (batch.order == np.arange(SEQUENCES)).all()
    h, d = e.config.n_heads, e.config.hidden_size
    found = []
    for i, cache in enumerate(caches):
        attention, norm = cache["attention"][0], cache["attention_norm"]
        arrays = (
            cache["x"].reshape(SEQUENCES, length, d),
            attention.weights,
            attention.v,
            e.parameters[f"blocks.{i}.attention.w_o"].reshape(h, -1, d),
            norm.sigma.reshape(SEQUENCES, length, 1),
            norm.gamma,
        )
        found.append(TorchCache(*(torch.from_numpy(np.ascontiguousarray(x)) for x in arrays)))
    return found


def decompose_as_defined(c, _):
    """The decomposition of one block by its definition, a line for each of its formulas.

    c: TorchCache. Returns {ratio: [B, L]} and contribution norms [B, RECENT, RECENT], of the last positions.
    """
    import torch

    attn = torch.einsum("bhij,bhjd->bijd", c.a, c.v @ c.w_o)  # F_ij
    attn_res = attn + torch.eye(c.x.shape[1])[:, :, None] * c.x[:, None]  # F_ij + delta_ij x_i
    centred = attn_res - attn_res.mean(dim=-1, keepdim=True)
    attn_res_ln = centred / c.sigma[:, :, None] * c.gamma  # g_i(F_ij + delta_ij x_i)
    ratios = {}
    for name, parts in zip(RATIOS, (attn, attn_res, attn_res_ln), strict=True):
        keep = parts.diagonal(dim1=1, dim2=2).mT
        mix = torch.linalg.vector_norm(parts.sum(dim=2) - keep, dim=-1)
        ratios[name] = mix / (mix + torch.linalg.vector_norm(keep, dim=-1))
    return ratios, torch.linalg.vector_norm(attn_res_ln[:, -RECENT:, -RECENT:], dim=-1)


def decompose_in_place(c, at_a_time):
    """The same with one array F [b, L, L, D] for b sequences at a time, which all steps overwrite."""
    import torch

    ratios = {name: torch.empty(c.x.shape[:2]) for name in RATIOS}
    norms = torch.empty(len(c.x), RECENT, RECENT)

    def ratio(keep, mix):
        """[b, L, D] each -> [b, L]"""
        keep, mix = torch.linalg.vector_norm(keep, dim=-1), torch.linalg.vector_norm(mix, dim=-1)
        return mix / (mix + keep)

    def totals(parts):
        """[b, L, L, D] -> what is kept and what is mixed, [b, L, D] each"""
        keep = parts.diagonal(dim1=1, dim2=2).mT
        return keep, parts.sum(dim=2) - keep

    for rows in chunks(len(c.x), at_a_time):
        f = c.v[rows] @ c.w_o  # f_h(x_j), [b, H, L, D]
        a = c.a[rows, :, :, :, None]  # [b, H, L, L, 1]
        parts = a[:, 0] * f[:, 0, None]  # F_ij, [b, L, L, D]
        for h in range(1, f.shape[1]):
            parts.addcmul_(a[:, h], f[:, h, None])
        ratios["attn"][rows] = ratio(*totals(parts))
        parts.diagonal(dim1=1, dim2=2).add_(c.x[rows].mT)  # F_ij + delta_ij x_i
        ratios["attn_res"][rows] = ratio(*totals(parts))
        parts -= parts.mean(dim=-1, keepdim=True)
        parts *= (c.gamma / c.sigma[rows])[:, :, None]  # g_i(F_ij + delta_ij x_i)
        ratios["attn_res_ln"][rows] = ratio(*totals(parts))
        norms[rows] = torch.linalg.vector_norm(parts[:, -RECENT:, -RECENT:], dim=-1)
    return ratios, norms


def largest_difference(length):
    """Return the largest absolute difference between both, and in what. Run in a process of its own."""
    import torch

    with worker_map(1, np) as run:
        ours = decompose_minirec(length)(run)
    found = []
    with torch.no_grad():
        for i, cache in enumerate(torch_caches(length)):
            few = TorchCache(*(x[:1] if len(x) == SEQUENCES else x for x in cache))
            for ratios, norms in (decompose_in_place(cache, 1), decompose_as_defined(few, None)):
                n = len(norms)
                for name in RATIOS:
                    own = np.concatenate([blocks[i][0][name] for blocks in ours])[: n * length]
                    found.append((np.abs(own - ratios[name].numpy().reshape(-1)).max(), f"{name} of block {i}"))
                own = np.concatenate([norm for blocks in ours for norm in blocks[i][1]])[:n]
                found.append((np.abs(own - norms.numpy()).max(), f"contribution norms of block {i}"))
    # NaN hides from max.
    return max((np.inf if np.isnan(difference) else float(difference), what) for difference, what in found)


def check(length):
    """Stop where minirec and PyTorch differ; return by how much they do."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        difference, what = pool.submit(largest_difference, length).result()
    if not difference <= TOLERANCE:
        raise click.ClickException(f"PyTorch differs from minirec at L = {length} in {what}: {difference:.1e}")
    say(f"check at L = {length}: largest absolute difference {difference:.1e}, in {what}")
    return difference


# What training.py calls trainers; these decompose: step(number, (threads, at_a_time)) -> a mean ratio.


@contextmanager
def run_minirec(length):
    decompose = decompose_minirec(length)
    with worker_map(usable_cores(), np) as together:

        def step(number, choice):
            for _ in range(CALLS[length]):
                results = decompose(together)
            return np.mean([ratios["attn_res_ln"].mean() for blocks in results for ratios, _ in blocks])

        yield step


@contextmanager
def run_torch(decompose, length):
    import torch

    caches = torch_caches(length)
    with torch.no_grad():

        def step(number, choice):
            threads, at_a_time = choice
            torch.set_num_threads(threads)
            for _ in range(CALLS[length]):
                results = [decompose(cache, at_a_time) for cache in caches]
            return np.mean([float(ratios["attn_res_ln"].mean()) for ratios, _ in results])

        yield step


def decomposition(repeats):
    """Return the lines of a table: minirec's decomposition and PyTorch's, at each length."""
    counts = thread_counts(usable_cores())
    heads = "|L|cores|at a time|ms|minirec ms|/ minirec|peak MB|minirec MB|largest difference"
    rows = [heads.split("|")]
    for length in LENGTHS:
        difference = check(length)
        rivals = {
            "as defined": (decompose_as_defined, {}, [(usable_cores(), SEQUENCES)]),
            "in place": (decompose_in_place, {}, [(n, SEQUENCES) for n in counts]),
            "in chunks": (decompose_in_place, KEEP_MEMORY, [(n, size) for n in counts for size in (1, 4, 16)]),
        }
        for name, (decompose, settings, choices) in rivals.items():
            own = Contender("minirec", run_minirec, thread_counts=[(usable_cores(), None)])
            rival = Contender(f"PyTorch, {name}", partial(run_torch, decompose), settings, thread_counts=choices)
            try:
                race([own, rival], length, TRIES * len(choices), repeats)
            finally:
                own.stop()
                rival.stop()
            ms, own_ms = (1e3 * statistics.median(c.seconds) / CALLS[length] for c in (rival, own))
            mb, own_mb = (max(c.allocated) for c in (rival, own))
            cores, at_a_time = rival.threads
            row = [rival.name, length, cores, at_a_time, f"{ms:.1f}", f"{own_ms:.1f}", f"{ms / own_ms:.1f}"]
            rows.append([*map(str, row), f"{mb:.0f}", f"{own_mb:.0f}", f"{difference:.1e}"])
    return aligned(rows)


# Serving


class Users(NamedTuple):
    """Whom to serve, and how attention is weighted."""

    weighting: str
    length: int
    count: int


class Request(NamedTuple):
    """What a server is asked to do for its users."""

    whole: bool  # recommend; else encode only
    many: bool  # many at a time, on all cores; else the first ALONE of them, one at a time, on one


REQUESTS = [Request(whole, many) for many in (False, True) for whole in (False, True)]


@contextmanager
def serve_users(users):
    """A trainer, asked for a Request; what it returns says nothing."""
    config = Config(N_ITEMS, max_length=users.length, attn=users.weighting)
    parameters = init_parameters(config, SEED)
    sequence = np.random.default_rng(SEED).integers(N_ITEMS, size=users.count * users.length)
    starts = np.arange(users.count) * users.length
    histories = list(sequence.reshape(users.count, users.length))

    def encode(chunk):
        return last_representations(parameters, config, sequence, starts[chunk], starts[chunk] + users.length)

    with worker_map(1, np) as alone, worker_map(usable_cores(), np) as together:

        def step(number, request):
            if request.many and request.whole:
                results = recommend(parameters, config, histories, TOP, run=together)
            elif request.many:
                results = together(encode, chunks(len(histories), TARGETS_AT_A_TIME))
            elif request.whole:
                results = (list(recommend(parameters, config, [h], TOP, run=alone)) for h in histories[:ALONE])
            else:
                results = map(encode, chunks(ALONE, 1))
            return float(len(list(results)))

        yield step


def serving(repeats):
    """Return the lines of a table: time per user, for each weighting and length."""
    count = TARGETS_AT_A_TIME * usable_cores()  # a chunk of evaluate for each core
    heads = [f"{many}: {what}" for many in ("one", "many") for what in ("encode ms", "all ms", "users/s")]
    rows = [["", "L", *heads]]
    for length in LENGTHS:
        servers = [Contender(weighting, serve_users) for weighting in known_weightings()]
        seconds = {(server.name, request): [] for server in servers for request in REQUESTS}
        say(f"serving {count} users with histories of {length} items, {repeats} times")
        try:
            for server in servers:
                server.start(Users(server.name, length, count))
            for number in range(1 + repeats):
                for request in REQUESTS:
                    for server in servers:
                        seconds[server.name, request].append(server.step(number, request))
        finally:
            for server in servers:
                server.stop()
        for server in servers:
            row = [server.name, str(length)]
            for request in REQUESTS:
                users = count if request.many else ALONE
                each = statistics.median(seconds[server.name, request][1:]) / users
                row.append(f"{1e3 * each:.3f}")
                if request.whole:
                    row.append(f"{1 / each:.0f}")
            rows.append(row)
    return aligned(rows)


# Evaluation


def load(path):
    """Return the Log of a file, or the synthetic one."""
    return read_log(path) if path else synthetic_log()


@contextmanager
def evaluate_log(problem):
    """A trainer that ranks all test targets; problem: (path or None, max_length). Returns HR@10."""
    path, max_length = problem
    log = load(path)
    test = leave_one_out(log).test
    config = Config(len(log.items), max_length=max_length)
    parameters = init_parameters(config, SEED)
    with worker_map(usable_cores(), np) as run:

        def step(number, threads):
            ranks = rank_targets(parameters, config, log.sequence, test, run=run)
            return metrics(np.concatenate(list(ranks)))["HR@10"]

        yield step


def evaluation(path, max_length, repeats):
    """Return the lines of a table of one row: ranking the test targets of all users of a log."""
    log = load(path)
    n_users = len(leave_one_out(log).test.users)
    name = Path(path).name if path else "synthetic log of the shape of Beauty"
    child = Contender(name, evaluate_log)
    say(f"evaluating {n_users} users of {name}, {repeats} times")
    try:
        child.start((path, max_length))
        before = sum(map(allocated_mb, child.pids))
        child.watch(0)  # also warms up
        child.seconds = [child.step(number, None) for number in range(1, 1 + repeats)]
    finally:
        child.stop()
    median = statistics.median(child.seconds)
    heads = ["", "users", "items", "L", "seconds", "min", "users/s", "before MB", "peak MB", "VmHWM MB"]
    row = [name, n_users, len(log.items), max_length, f"{median:.2f}", f"{min(child.seconds):.2f}"]
    row += [f"{n_users / median:.0f}", f"{before:.0f}", f"{max(child.allocated):.0f}", f"{child.resident:.0f}"]
    return aligned([heads, list(map(str, row))])


PARTS = {
    "decomposition": f"decomposing {SEQUENCES} sequences of L items, given the forward caches",
    "serving": f"time per user, {N_ITEMS:,} items: a history of L items -> its representation; -> the {TOP} best items",
    "evaluation": "ranking every user's test target among all items (softmax)",
}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--part", "parts", type=click.Choice(list(PARTS)), multiple=True, help="This alone.  [default: all]")
@click.option("--data", type=click.Path(exists=True, dir_okay=False), help="A log to evaluate  [default: synthetic]")
@click.option("--max-length", type=click.IntRange(min=1), default=50, help="Latest items kept when it is evaluated.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, help="How often each is timed.")
def main(parts, data, max_length, repeats):
    """Time decomposing, serving and evaluating."""
    click.echo(f"{usable_cores()} cores; medians of {repeats}")
    try:
        for part in parts or PARTS:
            if part == "serving":
                lines = serving(repeats)
            elif part == "evaluation":
                lines = evaluation(data, max_length, repeats)
            elif importlib.util.find_spec("torch") is None:
                say("decomposition: left out, since PyTorch is not installed")
                continue
            else:
                lines = decomposition(repeats)
            click.echo("\n".join(["", PARTS[part], "", *lines]))
    except UserError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
