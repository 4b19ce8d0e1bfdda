"""The state of a run: all that it needs to go on to the same bits.

    state.npz            the newest
    state.previous.npz   the one before, should the newest be damaged

Symbols: P parameters, S steps an epoch.
"""

import math
import warnings

import numpy as np

from minirec.errors import UserError
from minirec.files import opened_arrays, write_arrays
from minirec.parameters import init_parameters, parameter_count
from minirec.training.runs import STATES, check_same
from minirec.training.settings import model_config, settings_fingerprint

VERSION = 2  # 1 said neither its version nor its settings
ARRAYS = {  # beside "version" and "settings"
    "parameters": ("P", np.float32),
    "first_moment": ("P", np.float32),
    "second_moment": ("P", np.float32),
    "losses": ("S", np.float64),  # of the current epoch's steps
    "step": ("", np.int64),  # steps done in all
    "seconds": ("", np.float64),  # spent in the current epoch's steps
}


def initial_state(config, seed, n_steps):
    """Return the arrays of a run before its first step; n_steps: S."""
    zeros = np.zeros(parameter_count(config), np.float32)
    flat = np.concatenate([value.reshape(-1) for value in init_parameters(config, seed).values()])
    state = {"parameters": flat, "first_moment": zeros, "second_moment": zeros, "losses": np.zeros(n_steps)}
    return state | {"step": 0, "seconds": 0.0}


def save_state(folder, settings, arrays, keep_previous=True):
    """Write state.npz: ARRAYS, with the version and the settings that they belong to.

    keep_previous: whether the state before stays, as state.previous.npz; not where it is damaged itself.
    """
    known = {"version": np.int64(VERSION), "settings": np.str_(settings_fingerprint(settings))}
    newest, previous = (folder / name for name in STATES)
    write_arrays(newest, known | arrays, previous if keep_previous else None)


def load_state(folder, settings, n_steps):
    """Return the arrays of the newest good state and the name of its file; None, None where there is no state.

    What is wrong with a newer one is a warning. Raises UserError where the run has other settings than `settings`,
    or where no state is good.
    """
    if not any((folder / name).exists() for name in STATES):
        return None, None
    check_same(folder, settings)
    refused = []
    for name in STATES:
        try:
            state = read_state(folder / name, settings, n_steps)
        except UserError as error:
            refused.append(str(error))
        else:
            if refused:
                warnings.warn(f"{refused[0]}; going on from {name}", stacklevel=2)
            return state, name
    raise UserError(f"{'; '.join(refused)}; there is no other state to go on from: start anew with another --out")


def read_state(path, settings, n_steps):
    """Return the arrays of a state file. Raises UserError where it is damaged, of another version or other settings."""
    sizes = {"P": (parameter_count(model_config(settings)),), "S": (n_steps,), "": ()}
    expected = {name: (sizes[size], np.dtype(kind)) for name, (size, kind) in ARRAYS.items()}
    fingerprint = np.str_(settings_fingerprint(settings))
    with opened_arrays(path) as (headers, read):
        if headers.pop("version", None) != ((), np.dtype(np.int64)) or read("version") != VERSION:
            raise UserError(f"{path}: written by another version of minirec")
        if headers.pop("settings", None) != ((), fingerprint.dtype) or read("settings") != fingerprint:
            raise UserError(f"{path}: the state of a run with other settings")
        if headers != expected:
            raise UserError(f"{path}: damaged: not the arrays of such a state")
        state = {name: read(name) for name in expected}
    if state["step"] < 0 or not 0 <= state["seconds"] < math.inf:
        raise UserError(f"{path}: damaged: step {state['step']}, {state['seconds']} seconds")
    return state
