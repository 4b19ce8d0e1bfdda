"""The state of a run: all that it needs to go on to the same bits.

    state.npz            the newest
    state.previous.npz   the one before, should the newest be damaged

Symbols: P parameters, S steps an epoch.
"""

import math
import warnings

import numpy as np

from minirec.errors import UserError
from minirec.files import kind, read_arrays, write_arrays
from minirec.parameters import init_parameters, parameter_count
from minirec.training.runs import STATES, check_same
from minirec.training.settings import settings_fingerprint

VERSION = 2  # 1 said neither its version nor its settings


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
    """Return what a state's file says of where it comes from, as arrays."""
    return {"version": np.int64(VERSION), "settings": np.str_(settings_fingerprint(settings))}


def save_state(folder, settings, arrays, keep_previous=True):
    """Write state.npz: the arrays, with the version and the settings that they belong to.

    keep_previous: whether the state before stays, as state.previous.npz; not where it is damaged itself.
    """
    newest, previous = (folder / name for name in STATES)
    write_arrays(newest, origin(settings) | arrays, previous if keep_previous else None)


def load_state(folder, settings, initial):
    """Return the arrays of the newest good state and the name of its file; `initial` and None where there is no state.

    What is wrong with a newer one is a warning. Raises UserError where the run has other settings than `settings`,
    or where no state is good.
    """
    if not any((folder / name).exists() for name in STATES):
        return initial, None
    check_same(folder, settings)
    refused = []
    for name in STATES:
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
    wanted = origin(settings)
    state = read_arrays(path, {name: kind(x.dtype, x.shape) for name, x in (wanted | initial).items()})
    if state.pop("version") != wanted["version"]:
        raise UserError(f"{path}: written by another version of minirec")
    if state.pop("settings") != wanted["settings"]:
        raise UserError(f"{path}: the state of a run with other settings")
    if state["step"] < 0 or not 0 <= state["seconds"] < math.inf:
        raise UserError(f"{path}: damaged: step {state['step']}, {state['seconds']} seconds")
    return state
