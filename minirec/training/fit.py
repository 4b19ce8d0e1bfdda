"""The training loop: epochs, early stopping on validation, a run folder that can be resumed.

Symbols: P parameters, S steps an epoch.

Everything random is derived from (seed, epoch) or (seed, step), never from a generator that lives
on, so a run that stops anywhere and is resumed ends in the same bits as one that did not stop.
"""

import time
import warnings
from contextlib import nullcontext

import numpy as np

from minirec import backend, files
from minirec.data.split import Targets, batches, seen_items, training_windows
from minirec.errors import UserError
from minirec.parameters import init_parameters, parameter_count, unflatten
from minirec.training import runs
from minirec.training.parallel import Memory, Sampling, Team, worker_map
from minirec.training.ranking import metrics, rank_targets
from minirec.training.runs import SELECTED_BY


def train(log, settings, folder, resume=False, on_step=None, on_epoch=None, stop=None, ranks=None):
    """Train a model and keep the best on validation in a run folder.

    log: data.Log; settings: what config.json holds (see runs); folder: the run's pathlib.Path;
    resume: go on from its state.npz, where it has one. on_step(epoch, i, n_steps, loss) is called
    after each step, its loss a 0-d array on the device; on_epoch(record) after each epoch, with the
    line of metrics.jsonl; stop() is asked after each step and ends training there when true. ranks: the
    mpi.Ranks that train together, of which the first one writes; on_step's loss is then an estimate from
    this rank's share, and stop, where it is given, must end all ranks at the same step.
    Returns the records of all epochs and whether training came to its end (False: it was stopped).
    Raises UserError for a log without training data, a folder that cannot be used, a loss that is
    not finite.
    """
    config, training = runs.model_config(settings), settings["training"]
    xp = backend.load(training["backend"])
    split = runs.split_log(log, settings)
    if not len(split.valid.users):
        raise UserError("nothing to validate on: no user has as many as three interactions, of which two are held out")
    windows = training_windows(log, split, config.max_length)
    if not len(windows[0]):
        raise UserError(
            "nothing to train on: no user has two interactions besides those held out for validation and test"
        )
    sampling = None
    if training["loss"] != "ce":
        largest_batch = training["batch_size"] * (config.max_length + 1)
        seen = seen_items(log, split) if training["loss"] == "bce" else None
        if seen:
            check_negatives(seen, len(log.items))
        sampling = Sampling(training["loss"], training["negatives"], seen, log.offsets, largest_batch)

    # The workers start first: they must not inherit, and outlive, the lock on the run folder.
    team = Team(config, log.sequence, xp, training["workers"], sampling, ranks)
    writes = team.ranks.rank == 0
    with team, runs.opened(folder, resume) if writes else nullcontext():
        run = Progress(settings, folder, team, windows)
        if writes:
            files.write_json(folder / "config.json", settings)
            files.write_json(folder / "items.json", log.items)
        while not run.complete():
            if not run.take_steps(on_step, stop):
                break
            run.close_epoch(log.sequence, split.valid)
            if on_epoch:
                on_epoch(run.records[-1])
            if stop and stop():
                break
        return run.records, run.complete()


def check_negatives(seen, n_items):
    """Warn of users who were trained on all items, so that none is unseen; raise UserError where there is one item.

    seen: data.Seen.
    """
    if n_items < 2:
        raise UserError("--loss bce needs a second item as the negative, and this log has one item: use --loss ce")
    n_seen = np.diff(seen.offsets)
    if n_without := int((n_seen == n_items).sum()):
        warnings.warn(
            f"--loss bce: {n_without:,} of {len(n_seen):,} users were trained on all {n_items:,} items, so their "
            "negatives are any items but the target",
            stacklevel=3,
        )


class Progress:
    """A run under way, in its folder: how far it is, the losses of its current epoch, its records so far.

    settings, folder: as in train; team: the workers, whose parameters it sets; windows: starts and
    lengths of the training inputs.
    """

    def __init__(self, settings, folder, team, windows):
        self.settings, self.folder, self.team = settings, folder, team
        self.config, self.training = runs.model_config(settings), settings["training"]
        self.starts, self.lengths = windows
        self.n_steps = -(-len(self.starts) // self.training["batch_size"])
        state, self.loaded, self.records, self.recorded = team.ranks.share(self.load)
        for name in Memory.NAMES:
            getattr(team, name)[...] = backend.to_device(state[name], team.xp)
        # The ranks' losses add up to a step's: those of the steps before are in the first rank's alone.
        losses = state["losses"] if team.ranks.rank == 0 else np.zeros(self.n_steps)
        self.losses = backend.to_device(losses, team.xp)
        self.step, self.seconds = int(state["step"]), float(state["seconds"])  # steps in all, seconds of this epoch

    def load(self):
        """Return the state to go on from and its file's name (see runs.load_state), the records of the epochs before
        it, and how many records there are."""
        state, name = runs.load_state(self.folder, self.settings, self.n_steps)
        state = state or initial_state(self.config, self.training["seed"], self.n_steps)
        records = runs.load_records(self.folder, int(state["step"]) // self.n_steps)
        return state, name, records, len(files.read_json_lines(self.folder / "metrics.jsonl"))

    def complete(self):
        """Whether training has come to its end.

        Killed between the writes that end an epoch, a run repeats it: its parameters may be the checkpoint already.
        """
        return len(self.records) >= self.recorded and finished(self.records, self.training)

    def take_steps(self, on_step, stop):
        """Take the steps that are left of the current epoch; return False where stop() ended them."""
        seed, epoch = self.training["seed"], self.step // self.n_steps + 1
        epoch_batches = batches(len(self.starts), self.training["batch_size"], seed, epoch)
        for i in range(self.step % self.n_steps, self.n_steps):
            batch = epoch_batches[i]
            began = time.perf_counter()
            self.step += 1
            self.losses[i] = self.team.compute_gradients(self.starts[batch], self.lengths[batch], (seed, self.step))
            self.team.update(self.step, self.training["lr"])
            self.seconds += time.perf_counter() - began
            if on_step:
                on_step(epoch, i + 1, self.n_steps, self.losses[i] * self.team.ranks.size)
            if i + 1 < self.n_steps and stop and stop():
                losses = self.summed_losses()
                self.check_finite(losses[: i + 1])
                if self.team.ranks.rank == 0:
                    self.save_state(losses)
                    if not self.records:
                        self.save_checkpoint()
                return False
        return True

    def summed_losses(self):
        """Return the losses of this epoch's steps, [S] on the host, added up over all ranks."""
        losses = backend.to_host(self.losses).copy()  # waits for the device: all steps are done after it
        self.team.ranks.add_up(losses)
        return losses

    def close_epoch(self, sequence, valid):
        """Rank the validation targets, add the epoch's record, keep the parameters if they are the best so far."""
        began = time.perf_counter()
        losses = self.summed_losses()
        self.seconds += time.perf_counter() - began
        self.check_finite(losses)
        parameters, ranks = unflatten(self.team.parameters, self.config), self.team.ranks
        share = Targets(*(column[ranks.rank :: ranks.size] for column in valid))
        filter_seen = self.training["filter_seen"]
        with worker_map(self.training["workers"], self.team.xp) as run_map:
            own = list(rank_targets(parameters, self.config, sequence, share, filter_seen, run_map))
        found = np.empty(len(valid.stops), np.int64)
        for rank, part in enumerate(ranks.gather(own)):
            found[rank :: ranks.size] = np.concatenate(part) if part else []
        epoch = {"epoch": len(self.records) + 1, "loss": float(losses.mean()), "steps": self.n_steps}
        self.records.append(epoch | {"train_seconds": self.seconds} | metrics(found))
        self.seconds = 0.0
        if ranks.rank > 0:
            return
        # The record comes before the checkpoint that it tells of, and the state comes last: a run that is killed before
        # it repeats this epoch, to the same bits.
        files.write_json_lines(self.folder / "metrics.jsonl", self.records)
        if best(self.records) is self.records[-1]:
            self.save_checkpoint()
        self.save_state(losses)

    def check_finite(self, losses):
        """Raise UserError where a loss of this epoch's steps so far, or a parameter after them, is not finite."""
        finite = bool(self.team.xp.isfinite(self.team.parameters).all())
        check_finite(losses if finite else np.append(losses, np.nan), self.step - len(losses), self.training)

    def save_checkpoint(self):
        flat = backend.to_host(self.team.parameters)
        files.write_arrays(self.folder / "checkpoint.npz", unflatten(flat, self.config))

    def save_state(self, losses):
        arrays = {name: backend.to_host(getattr(self.team, name)) for name in Memory.NAMES}
        arrays |= {"losses": losses, "step": np.int64(self.step)}
        arrays |= {"seconds": np.float64(self.seconds)}
        runs.save_state(self.folder, self.settings, arrays, keep_previous=self.loaded != runs.STATES[1])
        self.loaded = runs.STATES[0]


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
