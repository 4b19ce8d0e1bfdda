"""Fixtures of all tests."""

import contextlib

import numpy as np
import pytest
from helpers import run_cli

with contextlib.suppress(ImportError):  # on a GPU, test_device.py runs without it
    from hypothesis import settings

    settings.register_profile("untimed", deadline=None)  # a busy machine fails no test
    settings.load_profile("untimed")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run folder: two epochs on the embedded dataset, made by the command line."""
    folder = tmp_path_factory.mktemp("trained")
    process = run_cli("train", "--epochs", 2, "--out", folder / "run", cwd=folder)
    assert process.returncode == 0, process.stderr
    return folder / "run"
