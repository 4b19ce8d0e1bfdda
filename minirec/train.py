"""The training loop: epochs, early stopping on validation, a run folder that can be resumed.

Symbols: P parameters.

Everything random is derived from (seed, epoch) or (seed, step), never from a generator that lives
on, so a run that stops anywhere and is resumed ends in the same bits as one that did not stop.
"""

import time

import numpy as np

from minirec import backend, runs
from minirec.data import batches, cases, leave_one_out, training_pairs, training_windows
from minirec.errors import UserError
from minirec.evaluate import metrics, rank_targets
from minirec.model import init_parameters, parameter_count, views
from minirec.workers import Memory, Sampling, Team, worker_map

SELECTED_BY = "NDCG@10"  # on validation: it picks the checkpoint and stops the run


def train(log, settings, folder, resume=False, on_step=None, on_epoch=None, stop=None):
    """Train a model and keep the best on validation in a run folder.

    log: data.Log; settings: what config.json holds (see runs); folder: the run's pathlib.Path;
    resume: go on from its state.npz, where it has one. on_step(epoch, i, n_steps, loss) is called
    after each step, its loss a 0-d array on the device; on_epoch(record) after each epoch, with the
    line of metrics.jsonl; stop() is asked after each step and ends training there when true.
    Returns the records of all epochs and whether training came to its end (False: it was stopped).
    Raises UserError for a log without training data, a folder that cannot be used, a loss that is
    not finite.
    """
    config, training = runs.model_config(settings), settings["training"]
    xp = backend.load(training["backend"])
    split = leave_one_out(log)
    starts, lengths = training_windows(log, split, config.max_length)
    if not len(starts):
        raise UserError(
            "nothing to train on: no user has two interactions besides those held out for validation and test"
        )
    valid = cases(log, split, "valid")
    n_steps = -(-len(starts) // training["batch_size"])

    sampling = None
    if training["loss"] != "ce":
        largest_batch = training["batch_size"] * (config.max_length + 1)
        pairs = training_pairs(log, split)
        sampling = Sampling(training["loss"], training["negatives"], pairs, log.offsets, largest_batch)

    # The workers start first: they must not inherit, and outlive, the lock on the run folder.
    team = Team(config, log.sequence, xp, training["workers"], sampling)
    with team, runs.opened(folder, resume):
        state = runs.load_state(folder, settings, n_steps) or initial_state(config, training["seed"], n_steps)
        records = runs.read_json_lines(folder / "metrics.jsonl")[: int(state["step"]) // n_steps]
        runs.write_json(folder / "config.json", settings)
        runs.write_json(folder / "items.json", log.items)
        for name in Memory.NAMES:
            getattr(team, name)[...] = backend.to_device(state[name], xp)
        losses = backend.to_device(state["losses"], xp)  # of the current epoch's steps; read at its end
        step, seconds = int(state["step"]), float(state["seconds"])

        def save_state():
            arrays = {name: backend.to_host(getattr(team, name)) for name in Memory.NAMES}
            arrays |= {"losses": backend.to_host(losses), "step": np.int64(step), "seconds": np.float64(seconds)}
            runs.write_arrays(folder / "state.npz", arrays)

        def save_checkpoint():
            runs.write_arrays(folder / "checkpoint.npz", views(backend.to_host(team.parameters), config))

        while not finished(records, training):
            epoch = step // n_steps + 1
            epoch_batches = batches(len(starts), training["batch_size"], training["seed"], epoch)
            for i in range(step % n_steps, n_steps):
                batch = epoch_batches[i]
                began = time.perf_counter()
                step += 1
                losses[i] = team.compute_gradients(starts[batch], lengths[batch], (training["seed"], step))
                team.update(step, training["lr"])
                seconds += time.perf_counter() - began
                if on_step:
                    on_step(epoch, i + 1, n_steps, losses[i])
                if i + 1 < n_steps and stop and stop():
                    save_state()
                    if not records:
                        save_checkpoint()
                    return records, False
            began = time.perf_counter()
            host_losses = backend.to_host(losses)  # waits for the device
            seconds += time.perf_counter() - began
            check_finite(host_losses, step - n_steps, training)
            with worker_map(training["workers"], xp) as run:
                ranks = rank_targets(views(team.parameters, config), config, log.sequence, valid, run=run)
                ranks = np.concatenate(list(ranks))
            record = {"epoch": epoch, "loss": float(host_losses.mean()), "steps": n_steps, "train_seconds": seconds}
            records.append(record | metrics(ranks))
            if best(records) is records[-1]:
                save_checkpoint()
            seconds = 0.0
            # The state comes last: a run killed before it repeats this epoch, to the same bits.
            runs.write_json_lines(folder / "metrics.jsonl", records)
            save_state()
            if on_epoch:
                on_epoch(records[-1])
            if stop and stop():
                return records, False
    return records, True


def initial_state(config, seed, n_steps):
    """Return the state of a run before its first step, on the host (see runs.load_state)."""
    flat = np.concatenate([value.reshape(-1) for value in init_parameters(config, seed).values()])
    zeros = np.zeros(parameter_count(config), np.float32)
    return {
        "parameters": flat,
        "first_moment": zeros,
        "second_moment": zeros.copy(),
        "losses": np.zeros(n_steps),
        "step": 0,
        "seconds": 0.0,
    }


def best(records):
    """Return the epoch's record with the highest validation score, the first of equals."""
    return max(records, key=lambda record: record[SELECTED_BY])


def finished(records, training):
    """Whether all epochs are done, or `patience` of them have passed since the best one."""
    n = len(records)
    return n >= training["epochs"] or (n > 0 and n - best(records)["epoch"] >= training["patience"])


def check_finite(losses, steps_before, training):
    """Raise UserError where one of an epoch's losses is NaN or infinite, naming the first such step."""
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        raise UserError(
            f"the loss is {losses[bad[0]]} at step {steps_before + bad[0] + 1} (lr {training['lr']}, "
            f"seed {training['seed']}): try a smaller --lr; what earlier epochs reached is kept"
        )
