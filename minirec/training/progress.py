"""A training run under way: what it keeps, in memory or in its folder, so that it can be stopped anywhere and go on.

Symbols: P parameters, S steps an epoch, M evaluated users.
"""

import time

import numpy as np

from minirec import backend, files
from minirec.data.split import Targets
from minirec.errors import UserError
from minirec.parameters import init_parameters, parameter_count, unflatten
from minirec.training import runs
from minirec.training.parallel import Memory, worker_map
from minirec.training.ranking import rank_targets
from minirec.training.runs import SELECTED_BY


class Progress:
    """A run under way: how far it is, the losses of its current epoch, its records so far.

    settings, folder, log: as in fit.train; team: the workers, whose parameters it sets; n_steps: S.
    """

    def __init__(self, settings, folder, team, n_steps, log):
        self.settings, self.folder, self.team, self.n_steps = settings, folder, team, n_steps
        self.config, self.training = runs.model_config(settings), settings["training"]
        self.writes = bool(folder) and team.ranks.rank == 0
        state, self.loaded, self.records, self.recorded = team.ranks.broadcast(self.load)
        for name in Memory.NAMES:
            getattr(team, name)[...] = backend.to_device(state[name], team.xp)
        # The ranks' losses add up to a step's: those of the steps before are in the first rank's alone.
        losses = state["losses"] if team.ranks.rank == 0 else np.zeros(self.n_steps)
        self.losses = backend.to_device(losses, team.xp)
        self.step, self.seconds = int(state["step"]), float(state["seconds"])  # steps in all, seconds of this epoch
        self.best = None  # the best parameters, flat, where no folder keeps them
        if self.writes:
            runs.write_settings(folder, settings, log)

    def load(self):
        """Return the state to go on from and its file's name (see runs.load_state), the records of the epochs before
        it, and how many records there are."""
        if not self.folder:
            return initial_state(self.config, self.training["seed"], self.n_steps), None, [], 0
        state, name = runs.load_state(self.folder, self.settings, self.n_steps)
        state = state or initial_state(self.config, self.training["seed"], self.n_steps)
        records = runs.load_records(self.folder, int(state["step"]) // self.n_steps)
        return state, name, records, len(files.read_json_lines(self.folder / "metrics.jsonl"))

    def complete(self):
        """Whether training has come to its end: all epochs are done, or `patience` of them have passed since the best.

        Killed between the writes that end an epoch, a run repeats it: its parameters may be the checkpoint already.
        """
        return len(self.records) >= self.recorded and finished(self.records, self.training)

    def summed_losses(self):
        """Return the losses of this epoch's steps, [S] on the host, added up over all ranks."""
        losses = backend.to_host(self.losses).copy()  # waits for the device: all steps are done after it
        self.team.ranks.allreduce(losses)
        return losses

    def rank_validation(self, sequence, valid):
        """Return the ranks [M] of the validation targets; the ranks of an MPI run take every n-th user each."""
        began = time.perf_counter()
        self.epoch_losses = self.summed_losses()
        self.seconds += time.perf_counter() - began
        self.check_finite(self.epoch_losses)
        parameters, ranks = unflatten(self.team.parameters, self.config), self.team.ranks
        share = Targets(*(column[ranks.rank :: ranks.size] for column in valid))
        with worker_map(self.training["workers"], self.team.xp) as run_map:
            mine = list(rank_targets(parameters, self.config, sequence, share, self.training["filter_seen"], run_map))
        result = np.empty(len(valid.stops), np.int64)
        for rank, chunks in enumerate(ranks.gather(mine)):
            result[rank :: ranks.size] = np.concatenate(chunks) if chunks else []
        return result

    def close_epoch(self, measured):
        """Add the epoch's record, with what was measured on validation; keep the parameters if they are the best."""
        losses = self.epoch_losses
        epoch = {"epoch": len(self.records) + 1, "loss": float(losses.mean()), "steps": self.n_steps}
        self.records.append(epoch | {"train_seconds": self.seconds} | measured)
        self.seconds = 0.0
        if self.team.ranks.rank > 0:
            return
        # The record comes before the checkpoint that it tells of, and the state comes last: a run that is killed before
        # it repeats this epoch, to the same bits.
        if self.writes:
            files.write_json_lines(self.folder / "metrics.jsonl", self.records)
        if best(self.records) is self.records[-1]:
            self.keep_parameters()
        if self.writes:
            self.save_state(losses)

    def keep_unfinished(self, n_done):
        """Keep an epoch of which n_done steps are done, to go on from there."""
        losses = self.summed_losses()
        self.check_finite(losses[:n_done])
        if self.writes:
            self.save_state(losses)
        if not self.records and self.team.ranks.rank == 0:
            self.keep_parameters()

    def check_finite(self, losses):
        """Raise UserError where a loss of this epoch's steps so far, or a parameter after them, is not finite."""
        finite = bool(self.team.xp.isfinite(self.team.parameters).all())
        check_finite(losses if finite else np.append(losses, np.nan), self.step - len(losses), self.training)

    def keep_parameters(self):
        """Keep the parameters as they are now: as checkpoint.npz, or without a folder in memory."""
        flat = backend.to_host(self.team.parameters)
        if self.writes:
            files.write_arrays(self.folder / "checkpoint.npz", unflatten(flat, self.config))
        else:
            self.best = flat.copy()

    def best_parameters(self):
        """Return the parameters that were kept, {name: array} on the host; None on ranks that keep none."""
        if self.best is not None:
            return unflatten(self.best, self.config)
        return runs.load_parameters(self.folder, self.config) if self.writes else None

    def save_state(self, losses):
        arrays = {name: backend.to_host(getattr(self.team, name)) for name in Memory.NAMES}
        arrays |= {"losses": losses, "step": np.int64(self.step), "seconds": np.float64(self.seconds)}
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
