"""The decomposition against one that builds every F_ij, and the identity that makes it one."""

import numpy as np
import pytest

from minirec import model, packing
from minirec.attention import known_weightings
from minirec.decompose import RATIOS, RECENT, block_caches, contributions, decompose, head_norms, summarise
from minirec.errors import UserError
from minirec.lesson import gradcheck
from minirec.ops import LAYER_NORM_EPS
from minirec.parameters import parameter_shapes, sub_dict
from minirec.training.parallel import worker_map


def naive_block(x, a, p, n_heads):
    """All parts of one block and sequence by the definition: F and g_i(F_ij + delta_ij x_i), [L, L, D].

    x [L, D] block input, a [H, L, L] weights, p the block's parameters.
    """
    length, d = x.shape
    parts = np.zeros((length, length, d))
    for h in range(n_heads):
        c = slice(h * d // n_heads, (h + 1) * d // n_heads)
        f = (x @ p["attention.w_v"][:, c] + p["attention.b_v"][c]) @ p["attention.w_o"][c]  # [L, D]
        parts += a[h][:, :, None] * f[None]
    with_residual = parts + np.eye(length)[:, :, None] * x[None]
    total = with_residual.sum(axis=1) + p["attention.b_o"]  # the real row before the layer norm
    sigma = np.sqrt(total.var(axis=1) + LAYER_NORM_EPS)[:, None, None]

    def g(z):
        return (z - z.mean(axis=-1, keepdims=True)) / sigma * p["attention_norm.gamma"]

    return parts, with_residual, g(with_residual), g(np.broadcast_to(p["attention.b_o"], parts.shape))[:, 0]


def naive_ratios(parts):
    """|sum of the others| / (|sum of the others| + |own|) for parts [L, L, D]."""
    own = np.einsum("iid->id", parts)
    mix, keep = (np.linalg.norm(z, axis=-1) for z in (parts.sum(axis=1) - own, own))
    return mix / (mix + keep)


@pytest.fixture(params=[*known_weightings(), ("uniform", "softmax")], ids=str)
def example(request):
    return gradcheck.example(request.param)


def naive_model(config, parameters, sequence):
    """naive_block of every block, from the forward caches of one sequence."""
    sequence = sequence[-config.max_length :]
    batch, caches = block_caches(parameters, config, sequence, np.array([0]), np.array([len(sequence)]))
    for i, cache in enumerate(caches):
        a = cache["attention"][0].weights
        a = np.broadcast_to(a, (1, config.n_heads) + a.shape[-2:])[0]
        p = sub_dict(parameters, f"blocks.{i}.")
        normed, _, gamma = cache["attention_norm"]
        yield naive_block(cache["x"], a, p, config.n_heads), normed * gamma + p["attention_norm.beta"], a, p


def test_parts_and_biases_sum_to_the_layer_norm_output(example):
    config, parameters, sequences = example
    for sequence in sequences:
        for (_, _, parts, bias), output, _, p in naive_model(config, parameters, sequence):
            total = parts.sum(axis=1) + bias + p["attention_norm.beta"]
            assert np.abs(total - output).max() < 1e-12


def test_ratios_and_entropy_equal_the_naive_ones(example):
    config, parameters, sequences = example
    result = decompose(parameters, config, sequences)
    for number, sequence in enumerate(sequences):
        rows = result["sequences"] == number
        assert list(result["positions"][rows]) == list(range(min(len(sequence), config.max_length)))
        for block, ((*parts, _), _, a, _) in zip(
            result["blocks"], naive_model(config, parameters, sequence), strict=True
        ):
            for name, part in zip(RATIOS, parts, strict=True):
                np.testing.assert_allclose(block[name][rows], naive_ratios(part), atol=1e-12)
            for i in range(1, a.shape[1]):
                row = a[:, i, : i + 1]
                entropy = -np.where(row > 0, row * np.log(np.maximum(row, 1e-300)), 0).sum(axis=1) / np.log(i + 1)
                np.testing.assert_allclose(block["entropy"][rows][i], entropy, atol=1e-12)


def test_contribution_norms_equal_the_naive_ones(example):
    config, parameters, sequences = example
    for sequence in sequences:
        found = contributions(parameters, config, sequence)
        for norms, ((_, _, parts, _), *_) in zip(found, naive_model(config, parameters, sequence), strict=True):
            np.testing.assert_allclose(norms, np.linalg.norm(parts, axis=-1), atol=1e-12)


def test_contribution_norms_of_linearly_dependent_heads():
    config = model.Config(n_items=12, hidden_size=4, n_heads=4, max_length=7)  # centring leaves rank 3
    rng = np.random.default_rng(0)
    parameters = {n: rng.normal(0, 0.5, s) for n, s in parameter_shapes(config).items()}
    sequence = rng.integers(12, size=7)
    found = contributions(parameters, config, sequence)
    for norms, ((_, _, parts, _), *_) in zip(found, naive_model(config, parameters, sequence), strict=True):
        np.testing.assert_allclose(norms, np.linalg.norm(parts, axis=-1), atol=1e-12)


def test_norms_of_a_single_head_equal_the_naive_ones(example):
    config, parameters, sequences = example
    for sequence in (s[-config.max_length :] for s in sequences):
        batch, caches = block_caches(parameters, config, sequence, np.array([0]), np.array([len(sequence)]))
        for cache, (_, _, a, p) in zip(caches, naive_model(config, parameters, sequence), strict=True):
            found = head_norms(cache, p, batch.buckets[0], cache["attention"][0], len(sequence), len(sequence))[0]
            sigma, gamma = cache["attention_norm"].sigma[:, :, None], p["attention_norm.gamma"]
            width = config.hidden_size // config.n_heads
            for h in range(config.n_heads):
                own_rows = np.arange(config.hidden_size) // width == h  # of W_o: the other heads then give nothing
                alone = p | {"attention.w_o": p["attention.w_o"] * own_rows[:, None]}
                parts = naive_block(cache["x"], a, alone, config.n_heads)[0]  # A_h[i,j] f_h(x_j), [L, L, D]
                parts = (parts - parts.mean(axis=-1, keepdims=True)) / sigma * gamma
                np.testing.assert_allclose(found[h], np.linalg.norm(parts, axis=-1), atol=1e-12)


def test_heatmaps_are_means_aligned_at_the_latest_position(example):
    config, parameters, sequences = example
    result = decompose(parameters, config, sequences)
    for i, block in enumerate(result["blocks"]):
        stacked = {name: np.full((len(sequences), RECENT, RECENT), np.nan) for name in ("attention", "contribution")}
        for number, sequence in enumerate(sequences):
            (_, _, parts, _), _, a, _ = list(naive_model(config, parameters, sequence))[i]
            n = len(parts)
            visible = np.tri(n, dtype=bool)
            stacked["attention"][number, -n:, -n:] = np.where(visible, a.mean(axis=0), np.nan)
            stacked["contribution"][number, -n:, -n:] = np.where(visible, np.linalg.norm(parts, axis=-1), np.nan)
        for name, values in stacked.items():
            expected = np.full((RECENT, RECENT), np.nan)
            reached = ~np.isnan(values).all(axis=0)
            expected[reached] = np.nanmean(values[:, reached], axis=0)
            np.testing.assert_allclose(block[name], expected, atol=1e-12)


@pytest.mark.parametrize("n_workers", [1, 3])
def test_neither_pieces_nor_workers_change_the_result(example, n_workers, monkeypatch):
    config, parameters, sequences = example
    sequences = [sequence[start:] for start in (0, 1, 2) for sequence in sequences if len(sequence) > start]
    whole, done = decompose(parameters, config, sequences), []
    monkeypatch.setattr(packing, "CPU_PLAN", packing.CPU_PLAN._replace(micro_batch_tokens=3))
    with worker_map(n_workers, np) as run:
        found = decompose(parameters, config, sequences, run, done.append)
    assert len(done) > 3 and sum(done) == len(whole["positions"])
    for name in ("sequences", "positions", "latest"):
        np.testing.assert_array_equal(found[name], whole[name])
    for block, expected in zip(found["blocks"], whole["blocks"], strict=True):
        for name, values in expected.items():
            np.testing.assert_allclose(block[name], values, atol=1e-12, err_msg=name)


def test_the_first_position_mixes_nothing_at_all(example):
    config, parameters, sequences = example
    result = decompose(parameters, config, sequences)
    for block in result["blocks"]:
        for name in RATIOS:
            assert (block[name][result["positions"] == 0] == 0).all()


def test_identity_weighting_mixes_nothing_and_uniform_has_full_entropy():
    for attn, ratio, entropy in (("identity", 0, 0), ("uniform", None, 1)):
        config, parameters, sequences = gradcheck.example(attn)
        summary = summarise(decompose(parameters, config, sequences))
        assert summary["all"]["entropy"]["mean"] == pytest.approx(entropy, abs=1e-12)
        assert ratio is None or summary["all"]["attn_res_ln"]["mean"] == ratio


def test_aggregates_choose_the_positions_they_name():
    config, parameters, sequences = gradcheck.example("softmax")
    result = decompose(parameters, config, sequences)
    summary = summarise(result)
    kept = [min(len(sequence), config.max_length) for sequence in sequences]
    positions = np.concatenate([np.arange(n) for n in kept])
    latest = np.cumsum(kept) - 1
    np.testing.assert_array_equal(np.flatnonzero(result["latest"]), latest)
    everywhere, later = np.arange(len(positions)), np.flatnonzero(positions > 0)
    wanted = [("all", result["blocks"], everywhere), ("without_first", result["blocks"], later)]
    wanted += [("latest", result["blocks"], latest)]
    found = [(summary[name], blocks, rows) for name, blocks, rows in wanted]
    found += [(values, [block], everywhere) for values, block in zip(summary["blocks"], result["blocks"], strict=True)]
    for values, blocks, rows in found:
        for name in (*RATIOS, "entropy"):
            counted = rows if name != "entropy" else np.intersect1d(rows, later)
            numbers = np.concatenate([block[name][counted].reshape(-1) for block in blocks])
            expected = {"mean": numbers.mean(), "median": np.median(numbers), "std": numbers.std(), "n": len(numbers)}
            assert values[name] == pytest.approx(expected)


def test_one_item_histories_have_no_entropy_and_no_nan():
    config, parameters, _ = gradcheck.example("softmax")
    summary = summarise(decompose(parameters, config, [np.array([3])]))
    assert summary["all"]["entropy"] == {"mean": None, "median": None, "std": None, "n": 0}
    assert summary["without_first"]["attn"]["n"] == 0


@pytest.mark.parametrize("sequences", [[], [np.array([], int)], [np.array([99])]])
def test_what_cannot_be_decomposed_is_refused(sequences):
    config, parameters, _ = gradcheck.example("softmax")
    with pytest.raises(UserError):
        decompose(parameters, config, sequences)
