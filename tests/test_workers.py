"""Gradient buffers: every sequence once, and the same bits for any number of workers."""

import multiprocessing
import os
import signal
from dataclasses import replace

import numpy as np
import pytest

from minirec import backend, model, packing
from minirec.data import log as data
from minirec.data.split import Seen, leave_one_out, seen_items, training_windows, windows_end_to_end
from minirec.errors import UserError
from minirec.optimizer import adam_step
from minirec.packing import pack
from minirec.parameters import parameter_count, unflatten
from minirec.training import parallel
from minirec.training.parallel import AHEAD, NEGATIVES, Sampling, Team, worker_map

CONFIG = model.Config(n_items=30, hidden_size=8, max_length=10, dropout=0.5)


def take_steps(n_workers):
    rng = np.random.default_rng(0)
    sequence = rng.integers(30, size=400).astype(np.int32)
    with Team(CONFIG, sequence, np, n_workers) as team:
        team.parameters[...] = np.concatenate([v.reshape(-1) for v in model.init_parameters(CONFIG, 0).values()])
        losses = []
        for step in range(1, 6):
            starts, lengths = rng.integers(380, size=40), rng.integers(1, 11, size=40)
            losses.append(float(team.compute_gradients(starts, lengths, (7, step))))
            team.update(step, 0.01)
        return losses, team.parameters.copy()


def test_any_number_of_workers_gives_the_same_bits(monkeypatch):
    monkeypatch.setattr(packing, "CPU_PLAN", packing.CPU_PLAN._replace(micro_batch_tokens=20))
    monkeypatch.setattr(parallel, "UPDATE_SIZE", 100)
    losses, parameters = take_steps(1)
    for n in (2, 3, 4, 9):
        other_losses, other_parameters = take_steps(n)
        assert other_losses == losses
        np.testing.assert_array_equal(other_parameters, parameters)


def test_lanes_sum_to_the_gradient_of_the_whole_batch():
    sequence = np.random.default_rng(0).integers(30, size=60).astype(np.int32)
    starts, lengths = np.array([0, 10, 25, 40]), np.array([9, 4, 9, 2])
    config = model.Config(n_items=30, hidden_size=8, max_length=10, dropout=0)
    parameters = model.init_parameters(config, 0)
    loss, gradients = model.loss_and_gradients(
        parameters, config, [sequence[a : a + n + 1] for a, n in zip(starts, lengths, strict=True)]
    )
    with Team(config, sequence, np, 2) as team:
        team.parameters[...] = np.concatenate([v.reshape(-1) for v in parameters.values()])
        assert float(team.compute_gradients(starts, lengths, (0, 1))) == pytest.approx(loss, rel=1e-6)
        expected = np.concatenate([g.reshape(-1) for g in gradients.values()])
        np.testing.assert_allclose(team.gradients.sum(axis=0), expected, atol=1e-6)


def test_spawned_workers_do_as_forked_ones(monkeypatch):
    losses, parameters = take_steps(1)
    monkeypatch.setattr(parallel, "PROCESSES", multiprocessing.get_context("spawn"))
    other_losses, other_parameters = take_steps(2)
    assert other_losses == losses
    np.testing.assert_array_equal(other_parameters, parameters)


def test_negatives_share_no_random_stream_with_dropout():
    team, *_, sampling = sampled_team("sampled", 1)
    with team:
        keys = []
        original = parallel.generator
        parallel.generator = lambda xp, *key: keys.append(key) or original(xp, *key)
        try:
            team.compute_gradients(np.array([0, 5, 9, 12]), np.array([2, 2, 2, 2]), (7, 3))
        finally:
            parallel.generator = original
    first_words = [tuple(np.random.SeedSequence(key).generate_state(4)) for key in keys]
    assert len(set(first_words)) == len(keys) > 1


def test_a_worker_that_dies_is_reported_in_one_line():
    sequence = np.arange(30, dtype=np.int32)
    with Team(CONFIG, sequence, np, 2) as team:
        os.kill(team.processes[0].pid, signal.SIGKILL)
        team.processes[0].join()
        with pytest.raises(UserError, match="--resume"):
            team.compute_gradients(np.array([0, 5, 9, 12]), np.array([3, 3, 3, 3]), (0, 1))


def test_an_error_in_a_worker_reaches_the_caller():
    with Team(CONFIG, np.full(30, 99, np.int32), np, 2) as team:  # item 99 of 30
        with pytest.raises(IndexError):
            team.compute_gradients(np.array([0, 5, 9, 12]), np.array([3, 3, 3, 3]), (0, 1))


def test_worker_map_keeps_the_order():
    with worker_map(3, np) as run:
        assert list(run(lambda i: i * i, range(50))) == [i * i for i in range(50)]


@pytest.mark.parametrize("n", [1, 2])
def test_worker_map_is_never_far_before_its_caller(n):
    begun = []
    with worker_map(n, np) as run:
        for done, _ in enumerate(run(begun.append, range(200)), 1):
            assert len(begun) <= done + AHEAD * n
    assert sorted(begun) == list(range(200))


def test_an_error_of_worker_map_comes_at_its_turn_and_ends_the_work():
    with pytest.raises(ZeroDivisionError), worker_map(2, np) as run:
        for i, found in enumerate(run(lambda i: 1 / (i - 20), range(10**9))):
            assert found == 1 / (i - 20)
    assert i == 19


def sampled_team(loss, n_workers=2):
    """A log, a batch of it, and a team on a catalogue of which one step touches a part."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(3, 9, 30)
    sequence = rng.integers(500, size=sizes.sum()).astype(np.int32)
    log = data.Log([""] * 30, [""] * 500, np.concatenate([[0], np.cumsum(sizes)]), sequence)
    split = leave_one_out(log)
    starts, lengths = training_windows(log, split, 10)
    seen = seen_items(log, split)
    sampling = Sampling(loss, 20, seen, log.offsets, int((lengths + 1).sum()))
    config = model.Config(n_items=500, hidden_size=8, max_length=10, dropout=0)
    team = Team(config, sequence, np, n_workers, sampling)
    team.parameters[...] = np.concatenate([v.reshape(-1) for v in model.init_parameters(config, 0).values()])
    return team, config, sequence, starts, lengths, sampling


@pytest.mark.parametrize("loss", ["sampled", "bce"])
def test_the_small_table_gives_the_gradients_of_the_full_one(loss):
    team, config, sequence, starts, lengths, sampling = sampled_team(loss)
    with team:
        value = float(team.compute_gradients(starts, lengths, (7, 1)))
        table, small = team.lead.table, team.gradients.sum(axis=0)
        flat, begins = windows_end_to_end(sequence, starts, lengths)
        negatives = sampling.draw(backend.generator(np, 7, 1, NEGATIVES), 500, flat, starts, lengths)
        batch = pack(flat, begins, lengths, negatives=negatives if loss == "bce" else None)
        if loss == "sampled":
            batch = batch._replace(negatives=negatives)
        gradients = unflatten(np.zeros_like(team.parameters), config)
        parameters = unflatten(team.parameters, config)
        expected = model.add_gradients(parameters, config, batch, 1 / lengths.sum(), gradients, loss=loss)
    assert value == pytest.approx(float(expected), rel=1e-6)
    compact = replace(config, n_items=len(table))
    found = unflatten(small[: parameter_count(compact)], compact)
    np.testing.assert_allclose(found["item_embedding"], gradients["item_embedding"][table], atol=1e-6)
    assert np.delete(gradients["item_embedding"], table, axis=0).any() == 0
    for name in set(gradients) - {"item_embedding"}:
        np.testing.assert_allclose(found[name], gradients[name], atol=1e-6)


@pytest.fixture
def small_updates(monkeypatch):
    """Update 64 parameters at a time, or 9 rows of an item table: several slices a worker."""
    monkeypatch.setattr(parallel, "UPDATE_SIZE", 64)


def adam_by_hand(expected, gradient, step, places=slice(None)):
    """Take an Adam step on these places of the arrays in `expected`, named as a team's vectors."""
    parameters, *moments = (vector[places] for vector in expected.values())
    adam_step(parameters, gradient, *moments, step, 0.01)


@pytest.mark.parametrize("n_workers", [1, 3])
def test_steps_are_those_of_adam_on_all_parameters(n_workers, small_updates):
    rng = np.random.default_rng(0)
    with Team(CONFIG, rng.integers(30, size=60).astype(np.int32), np, n_workers) as team:
        team.parameters[...] = rng.normal(size=team.parameters.shape)
        expected = {name: vector.copy() for name, vector in team.vectors.items()}
        for step in (1, 2, 3):
            team.compute_gradients(np.array([0, 20, 45, 5]), np.array([9, 10, 2, 9]), (7, step))
            adam_by_hand(expected, team.gradients.sum(axis=0), step)
            team.update(step, 0.01)
            for name, values in expected.items():
                np.testing.assert_allclose(team.vectors[name], values, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("n_workers", [1, 3])
@pytest.mark.parametrize("loss", ["sampled", "bce"])
def test_sampled_steps_are_those_of_adam_on_the_touched_rows_alone(loss, n_workers, small_updates):
    team, config, _, starts, lengths, _ = sampled_team(loss, n_workers)
    with team:
        expected, d = {name: vector.copy() for name, vector in team.vectors.items()}, config.hidden_size
        for step in (1, 2, 3):
            some = slice(step - 1, None, 3)  # a step touches other rows than the one before
            team.compute_gradients(starts[some], lengths[some], (7, step))
            gradient, table = team.gradients.sum(axis=0), team.lead.table
            assert 3 * 9 < len(table) < config.n_items
            for row, item in enumerate(table):
                adam_by_hand(expected, gradient[row * d : row * d + d], step, slice(item * d, item * d + d))
            rest = team.parameters.size - config.n_items * d
            adam_by_hand(expected, gradient[len(table) * d :][:rest], step, slice(config.n_items * d, None))
            team.update(step, 0.01)
            for name, values in expected.items():
                np.testing.assert_allclose(team.vectors[name], values, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("loss, n", [("sampled", 5), ("bce", 6)])
def test_negatives_are_drawn_from_all_items_and_those_of_bce_from_the_unseen_ones(loss, n):
    seen = Seen(np.array([0, 1]), np.array([0]))  # the one user has had item 0 alone
    sampling = Sampling(loss, 5, seen, np.array([0, 9]), 10)
    starts, lengths, flat = np.array([2, 5]), np.array([1, 3]), np.zeros(6, int)  # two windows of 2 and 4 items
    draws = np.stack([sampling.draw(np.random.default_rng(seed), 7, flat, starts, lengths) for seed in range(200)])
    assert draws.shape == (200, n)
    inputs = [0, 2, 3, 4]  # the last item of a window is a target only
    drawn = draws[:, inputs] if loss == "bce" else draws
    assert set(drawn.flat) == set(range(7)) - ({0} if loss == "bce" else set())


@pytest.mark.parametrize("loss", ["sampled", "bce"])
@pytest.mark.parametrize("n_workers", [1, 2])
def test_rows_of_items_that_no_loss_looks_at_keep_parameters_and_moments_to_the_bit(loss, n_workers):
    team, config, sequence, starts, lengths, sampling = sampled_team(loss, n_workers)
    rng = np.random.default_rng(5)
    with team:
        for array in list(team.vectors.values())[
            1:
        ]:  # the moments, as after other steps: a zero gradient moves such rows
            array[...] = rng.uniform(0.1, 1, len(array))
        tables = [vector[: config.n_items * 8].reshape(-1, 8) for vector in team.vectors.values()]
        for step in range(1, 4):
            batch = np.random.default_rng(step).permutation(len(starts))[:9]
            before = [table.copy() for table in tables]
            flat, begins = windows_end_to_end(sequence, starts[batch], lengths[batch])
            stream = backend.generator(np, 7, step, NEGATIVES)
            negatives = sampling.draw(stream, 500, flat, starts[batch], lengths[batch])
            used = set(flat) | set(negatives if loss == "sampled" else ())
            for begin, length in zip(begins, lengths[batch], strict=True):
                used |= set(negatives[begin : begin + length]) if loss == "bce" else set()
            team.compute_gradients(starts[batch], lengths[batch], (7, step))
            team.update(step, 0.01)
            unused = sorted(set(range(500)) - used)
            assert len(unused) > 100
            for table, as_it_was in zip(tables, before, strict=True):
                np.testing.assert_array_equal(table[unused], as_it_was[unused])
                assert (table[sorted(used)] != as_it_was[sorted(used)]).any(axis=1).all()


def test_without_room_for_a_process_no_worker_is_left(monkeypatch):
    started, real_start = [], multiprocessing.process.BaseProcess.start

    def start(process):
        if started:
            raise OSError(11, "Resource temporarily unavailable")
        real_start(process)
        started.append(process)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start)
    with pytest.raises(UserError, match="no process for 3 workers .*fewer --workers"):
        Team(CONFIG, np.zeros(9, np.int32), np, 3)
    assert not started[0].is_alive()
