"""A training run under way: what it keeps, in memory or in its folder, so that it can be stopped anywhere and go on.

    state.npz            all that it needs to go on to the same bits
    state.previous.npz   the one before, should the newest be damaged

Symbols: P parameters, S steps an epoch, M evaluated users.
"""

import math
import time
import warnings

import numpy as np

from minirec import backend, files
from minirec.data.split import Targets
from minirec.errors import UserError
from minirec.parameters import init_parameters, parameter_count, unflatten
from minirec.training import runs
from minirec.training.parallel import worker_map
from minirec.training.ranking import metrics, rank_targets
from minirec.training.runs import SELECTED_BY
from minirec.training.settings import model_config, settings_fingerprint

VERSION = 2  # of a state; 1 said neither its version nor its settings


class Progress:
    """A run under way: how far it is, the losses of its current epoch, its records so far.

    settings, log: as in fit.train; folder: where this process keeps the run, None: in memory; team: the workers, whose
    parameters it sets; n_steps: S.
    """

    def __init__(self, settings, folder, team, n_steps, log):
        self.settings, self.folder, self.team, self.n_steps = settings, folder, team, n_steps
        self.config, self.training = model_config(settings), settings["training"]
        state, self.loaded, self.records = team.ranks.broadcast(self._load)
        for name, vector in team.vectors.items():
            vector[...] = backend.to_device(state[name], team.xp)
        # The loss of a step is the sum over the ranks. That of the steps before is kept by the first rank alone.
        losses = state["losses"] if team.ranks.rank == 0 else np.zeros(n_steps)
        self.losses = backend.to_device(losses, team.xp)
        self.step, self.seconds = int(state["step"]), float(state["seconds"])  # steps in all, seconds of this epoch
        self.best = None  # the best parameters, flat, where no folder keeps them
        if folder and self.records:
            runs.load_parameters(folder, self.config)  # or say now, not after training, that they are lost
        if folder:
            runs.write_settings(folder, settings, log)

    def _load(self):
        """Return the state to go on from, its file's name, and the records of the epochs before it."""
        state, name, records = initial_state(self.config, self.training["seed"], self.n_steps), None, []
        if self.folder:
            state, name = load_state(self.folder, self.settings, state)
            records = runs.load_records(self.folder, int(state["step"]) // self.n_steps)
            check_length(self.folder, records, self.training)
        return state, name, records[: int(state["step"]) // self.n_steps]

    def complete(self):
        """Whether training has come to its end."""
        return finished(self.records, self.training)

    def close_epoch(self, sequence, valid):
        """Rank the validation targets and add the epoch's record; keep the parameters if they are the best so far.

        sequence: the log's flat items; valid: Targets.
        """
        losses = self._finite_losses(self.n_steps)
        measured = metrics(self._rank(sequence, valid))
        epoch = {"epoch": len(self.records) + 1, "loss": float(losses.mean()), "steps": self.n_steps}
        self.records.append(epoch | {"train_seconds": self.seconds} | measured)
        self.seconds = 0.0
        # The record is written before the checkpoint that it describes, and the state is written last. A run that is
        # killed before that repeats this epoch, to the same bits.
        if self.folder:
            files.write_json_lines(self.folder / "metrics.jsonl", self.records)
        if best(self.records) is self.records[-1]:
            self._keep_parameters()
        self._keep_state(losses)

    def keep_unfinished(self, n_done):
        """Keep an epoch of which n_done steps are done, to go on from there."""
        self._keep_state(self._finite_losses(n_done))
        if not self.records:
            self._keep_parameters()

    def best_parameters(self):
        """Return the parameters that were kept, {name: array} on the host; None where the first rank alone has them."""
        if self.folder:
            return runs.load_parameters(self.folder, self.config)
        return None if self.best is None else unflatten(self.best, self.config)

    def _finite_losses(self, n_done):
        """Return the losses of this epoch's steps, [S] on the host, added up over all ranks.

        Raises UserError where a loss of the first n_done, or a parameter after them, is not finite.
        """
        began = time.perf_counter()
        losses = backend.to_host(self.losses).copy()  # waits for the device: all steps are done after it
        self.team.ranks.allreduce(losses)
        self.seconds += time.perf_counter() - began
        # Parameters that are not finite make the next step's loss so.
        finite = np.append(np.isfinite(losses[:n_done]), bool(self.team.xp.isfinite(self.team.parameters).all()))
        if not finite.all():
            where = f"step {self.step - n_done + finite.argmin() + 1}"
            how = f"lr {self.training['lr']}, seed {self.training['seed']}"
            raise UserError(f"the loss is not finite at {where} ({how}): try a smaller --lr; earlier epochs are kept")
        return losses

    def _rank(self, sequence, targets):
        """Return the ranks [M] of targets; the ranks of an MPI run take every n-th user each."""
        parameters, ranks = unflatten(self.team.parameters, self.config), self.team.ranks
        mine = Targets(*(column[ranks.rank :: ranks.size] for column in targets))
        with worker_map(self.training["workers"], self.team.xp) as run_map:
            chunks = list(rank_targets(parameters, self.config, sequence, mine, self.training["filter_seen"], run_map))
        result = np.empty(len(targets.stops), np.int64)
        for rank, theirs in enumerate(ranks.gather(chunks)):
            result[rank :: ranks.size] = np.concatenate(theirs) if theirs else []
        return result

    def _keep_parameters(self):
        """Keep the parameters as they are now: as checkpoint.npz, or without a folder in memory."""
        flat = backend.to_host(self.team.parameters)
        if self.folder:
            files.write_arrays(self.folder / "checkpoint.npz", unflatten(flat, self.config))
        else:
            self.best = flat.copy()

    def _keep_state(self, losses):
        """Write state.npz, with the version and the settings that it belongs to, where a folder keeps the run.

        The state before stays, as state.previous.npz, unless it is damaged itself.
        """
        if not self.folder:
            return
        arrays = origin(self.settings) | {name: backend.to_host(x) for name, x in self.team.vectors.items()}
        arrays |= {"losses": losses, "step": np.int64(self.step), "seconds": np.float64(self.seconds)}
        newest, previous = (self.folder / name for name in runs.STATES)
        files.write_arrays(newest, arrays, previous if self.loaded != previous.name else None)
        self.loaded = newest.name


def best(records):
    """Return the epoch's record with the highest validation score, the first of equals."""
    return max(records, key=lambda record: record[SELECTED_BY])


def finished(records, training):
    """Whether all epochs are done, or `patience` of them have passed since the best one."""
    n = len(records)
    return n >= training["epochs"] or (n > 0 and n - best(records)["epoch"] >= training["patience"])


def check_length(folder, records, training):
    """Raise UserError where a run went on for longer than its `epochs` and `patience` are now.

    Its checkpoint may be of a later epoch. The last record does not count: a run that was killed between two writes at
    the end of an epoch repeats it.
    """
    if records[:-1] and finished(records[:-1], training):
        how = "give those that it ran with, or choose another --out"
        raise UserError(f"{folder}: ran for {len(records)} epochs, longer than --epochs and --patience allow; {how}")


# The state


def initial_state(config, seed, n_steps):
    """Return the arrays of a run before its first step; n_steps: S."""
    zeros = np.zeros(parameter_count(config), np.float32)
    return {
        "parameters": np.concatenate([value.reshape(-1) for value in init_parameters(config, seed).values()]),  # [P]
        "first_moment": zeros,  # [P]
        "second_moment": zeros,  # [P]
        "losses": np.zeros(n_steps),  # [S] of the current epoch's steps
        "step": np.int64(0),  # steps done in all
        "seconds": np.float64(0),  # spent in the current epoch's steps
    }


def origin(settings):
    """Return what a state says of where it comes from, as arrays."""
    return {"version": np.int64(VERSION), "settings": np.str_(settings_fingerprint(settings))}


def load_state(folder, settings, initial):
    """Return the arrays of the newest good state and the name of its file; `initial` and None where there is no state.

    What is wrong with a newer one is a warning. Raises UserError where the run has other settings than `settings`,
    or where no state is good.
    """
    if not any((folder / name).exists() for name in runs.STATES):
        return initial, None
    runs.check_same(folder, settings)
    refused = []
    for name in runs.STATES:
        try:
            state = read_state(folder / name, settings, initial)
        except UserError as error:
            refused.append(str(error))
        else:
            if refused:
                warnings.warn(f"{refused[0]}; going on from {name}", stacklevel=2)
            return state, name
    raise UserError(f"{'; '.join(refused)}; there is no other state to go on from: start anew with another --out")


def read_state(path, settings, initial):
    """Return the arrays of a state file. Raises UserError where it is damaged, of another version or other settings."""
    expected = initial | origin(settings)
    state = files.read_arrays(path, {name: files.kind(x.dtype, x.shape) for name, x in expected.items()})
    if state["version"] != expected["version"]:
        raise UserError(f"{path}: written by another version of minirec")
    if state["settings"] != expected["settings"]:
        raise UserError(f"{path}: the state of a run with other settings")
    if state["step"] < 0 or not 0 <= state["seconds"] < math.inf:
        raise UserError(f"{path}: damaged: step {state['step']}, {state['seconds']} seconds")
    return state
