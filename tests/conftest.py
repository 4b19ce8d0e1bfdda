"""Fixtures of all tests."""

import numpy as np
import pytest
from helpers import run_cli


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
