"""Ranks and metrics against a sort of the whole catalogue, and the traps of this field."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minirec import model, packing
from minirec.data.planted import household
from minirec.data.split import Targets, leave_one_out
from minirec.errors import UserError
from minirec.training import ranking
from minirec.training.parallel import worker_map

CONFIG = model.Config(n_items=200, hidden_size=8, max_length=10)


@pytest.fixture(scope="module")
def log():
    return household()


@pytest.fixture(scope="module")
def parameters():
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 0.3, v.shape) for name, v in model.init_parameters(CONFIG, 0, np.float64).items()}


def ranks_of(parameters, log, part="test", config=CONFIG, **options):
    wanted = getattr(leave_one_out(log), part)
    return np.concatenate(list(ranking.rank_targets(parameters, config, log.sequence, wanted, **options)))


@pytest.mark.parametrize("part, back", [("test", 1), ("valid", 2)])
@pytest.mark.parametrize("filter_seen", [True, False])
def test_ranks_equal_those_of_a_sort(log, parameters, part, back, filter_seen):
    found = ranks_of(parameters, log, part, filter_seen=filter_seen)
    for user in range(0, len(log.users), 50):
        history = log.history(user)
        before, target = history[:-back], history[-back]
        (x,) = model.encode(parameters, CONFIG, [before])
        scores = parameters["item_embedding"] @ x[-1]
        candidates = np.array([i for i in np.argsort(-scores) if not (filter_seen and i in before)])
        if target in candidates:
            assert found[user] == np.flatnonzero(candidates == target)[0]
        else:
            assert found[user] == ranking.MISS


def plain_scores(parameters, history):
    """The score of every item after a history [L], by the definition: [V]."""
    (x,) = model.encode(parameters, CONFIG, [history])
    return parameters["item_embedding"] @ x[-1]


@pytest.fixture
def small_chunks(monkeypatch):
    """Rank 33 cases at a time, in chunks of 16, 16 and 1; recommend to 16 users at a time; encode a few together."""
    monkeypatch.setattr(ranking, "TARGETS_AT_A_TIME", 33)
    small = packing.CPU_PLAN._replace(loss_bytes=1, loss_rows=1, micro_batch_tokens=30)
    monkeypatch.setattr(packing, "CPU_PLAN", small)
    assert packing.chunk_rows(np, CONFIG.n_items, 8) == 16


@pytest.mark.parametrize("filter_seen", [True, False])
@pytest.mark.parametrize("n", [1, 17, 33, 34, 67])  # the last chunk, of either size, may hold one case
def test_ranks_do_not_depend_on_the_chunks(log, parameters, small_chunks, n, filter_seen):
    expected = []
    for user in range(n):
        *history, target = log.history(user)
        scores = plain_scores(parameters, history)
        if filter_seen:
            scores[history] = -np.inf
        expected.append(ranking.MISS if np.isneginf(scores[target]) else (scores > scores[target]).sum())
    cases = Targets(*(column[:n] for column in leave_one_out(log).test))
    for n_workers in (1, 3):
        with worker_map(n_workers, np) as run:
            ranks = ranking.rank_targets(parameters, CONFIG, log.sequence, cases, filter_seen, run)
            np.testing.assert_array_equal(np.concatenate(list(ranks)), expected)


def test_a_seen_target_is_a_miss_at_every_cutoff(log, parameters):
    wanted = leave_one_out(log).test
    sequence = log.sequence.copy()
    sequence[wanted.stops[::3]] = sequence[wanted.starts[::3]]  # every third user ends with the item that began
    log = replace(log, sequence=sequence)
    ranks = ranks_of(parameters, log)
    seen = [log.sequence[b] in log.sequence[a:b] for a, b in zip(wanted.starts, wanted.stops, strict=True)]
    np.testing.assert_array_equal(ranks == ranking.MISS, seen)
    assert ranking.metrics(ranks[seen])["HR@100"] == 0


def test_ties_and_nan_never_favour_the_target(log, parameters):
    constant = parameters | {"item_embedding": np.ones_like(parameters["item_embedding"])}
    n_seen = [len(set(log.history(u)[:-1])) for u in range(len(log.users))]
    ranks = ranks_of(constant, log)
    hit = ranks != ranking.MISS
    np.testing.assert_array_equal(ranks[hit], 199 - np.array(n_seen)[hit])
    nothing = np.full((1, 5), np.nan)
    assert ranking.ranks_of(np.array([3]), nothing, np.zeros(1)) == [ranking.MISS]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("size", [1e200, np.nan])
def test_scores_that_are_not_finite_are_refused(log, parameters, size):
    large = ("item_embedding", "blocks.1.ffn_norm.gamma")
    diverged = parameters | {name: parameters[name] * size for name in large}
    with pytest.raises(UserError, match="not finite: it diverged"):
        ranks_of(diverged, log)
    with pytest.raises(UserError, match="not finite: it diverged"):
        list(ranking.recommend(diverged, CONFIG, [log.history(0)], 5))


def test_a_tie_that_rounding_splits_is_still_a_tie(log, parameters):
    split = parameters["item_embedding"].astype(np.float32)
    split[...] = split[0]
    split[1::2] *= 1 - 2e-7  # a rounding step below its neighbour
    single = {name: value.astype(np.float32) for name, value in parameters.items()} | {"item_embedding": split}
    ranks = ranks_of(single, log, filter_seen=False)
    assert (ranks == 199).all()


def test_substituted_weights_change_the_ranks(log, parameters):
    before = ranks_of(parameters, log)
    for attn in ("uniform", ("softmax", "identity")):
        assert (ranks_of(parameters, log, config=replace(CONFIG, attn=attn)) != before).any()


def test_metrics_of_known_ranks():
    values = ranking.metrics(np.array([0, 1, 9, 10, ranking.MISS]))
    assert values["HR@1"] == values["NDCG@1"] == values["MRR@1"] == pytest.approx(1 / 5)
    assert values["HR@10"] == pytest.approx(3 / 5)
    assert values["NDCG@10"] == pytest.approx((1 + 1 / np.log2(3) + 1 / np.log2(11)) / 5)
    assert values["MRR@20"] == pytest.approx((1 + 1 / 2 + 1 / 10 + 1 / 11) / 5)


@given(st.lists(st.integers(0, 300), min_size=1))
def test_metrics_are_ordered(ranks):
    values = ranking.metrics(np.array(ranks))
    for k in ranking.CUTOFFS:
        assert 0 <= values[f"MRR@{k}"] <= values[f"NDCG@{k}"] <= values[f"HR@{k}"] <= 1


@given(st.lists(st.one_of(st.integers(0, 150), st.just(ranking.MISS)), min_size=1, max_size=30))
def test_metrics_equal_those_of_a_plain_loop(ranks):
    values = ranking.metrics(np.array(ranks))
    for k in ranking.CUTOFFS:
        hits = [rank for rank in ranks if rank < k]
        assert values[f"HR@{k}"] == pytest.approx(len(hits) / len(ranks))
        assert values[f"NDCG@{k}"] == pytest.approx(sum(1 / math.log2(rank + 2) for rank in hits) / len(ranks))
        assert values[f"MRR@{k}"] == pytest.approx(sum(1 / (rank + 1) for rank in hits) / len(ranks))


@pytest.mark.parametrize("n_workers", [1, 3])
def test_recommendations_are_the_best_unseen_items(log, parameters, small_chunks, n_workers):
    histories = [log.history(u) for u in range(32)] + [np.arange(195)]
    with worker_map(n_workers, np) as run:
        chunks = list(ranking.recommend(parameters, CONFIG, histories, 7, run))
    assert [len(order) for order, _ in chunks] == [16, 16, 1]
    order, scores = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    for history, row, row_scores in zip(histories, order, scores, strict=True):
        expected = plain_scores(parameters, history)
        expected[history] = -np.inf
        np.testing.assert_array_equal(row, np.argsort(-expected, kind="stable")[:7])
        np.testing.assert_allclose(row_scores, expected[row])
    assert np.isneginf(scores[-1]).sum() == 2  # only five items are unseen


def test_the_best_of_many_ties_are_those_of_a_stable_sort(rng):
    scores = rng.integers(4, size=(50, 30)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.3] = -np.inf
    for k in (1, 7, 30):
        order, values = ranking.best_of(scores, k)
        np.testing.assert_array_equal(order, np.argsort(-scores, axis=1, kind="stable")[:, :k])
        np.testing.assert_array_equal(values, np.take_along_axis(scores, order, axis=1))
