"""The GPU path: under a strict stand-in for CuPy everywhere, and on a GPU where there is one."""

import configparser
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from fake_cupy import counts, installed
from helpers import ROOT

from minirec import attention, backend, decompose, kernels, model, ops, optimizer, packing
from minirec import gpu as gpu_module
from minirec import loss as minirec_loss
from minirec.attention import known_weightings
from minirec.data import planted
from minirec.data.split import Targets, leave_one_out, seen_items, training_windows
from minirec.errors import UserError
from minirec.lesson import gradcheck
from minirec.loss import LOSSES
from minirec.training import ranking
from minirec.training.parallel import Sampling, Team

MOST_LAUNCHES = 600  # of a step with two blocks
CONFIG = model.Config(planted.N_ITEMS, hidden_size=16, max_length=24, dropout=0.2)


@pytest.fixture
def cupy():
    with installed() as module:
        yield module


@pytest.fixture(scope="module")
def gpu():
    """The real CuPy, where it has a device."""
    try:
        return backend.load("cupy")
    except Exception as error:
        pytest.skip(f"no GPU: {error}")


def steps(xp, config, n_sequences, loss="ce", n_steps=2):
    """Losses and parameters of a few steps, and what the last one counted."""
    log = planted.household()
    split = leave_one_out(log)
    starts, lengths = training_windows(log, split, config.max_length)
    sampling = None
    if loss != "ce":
        sampling = Sampling(loss, 50, seen_items(log, split), log.offsets, n_sequences * (config.max_length + 1))
    flat = np.concatenate([x.reshape(-1) for x in model.init_parameters(config, 0).values()])
    losses = []
    with Team(config, log.sequence, xp, 1, sampling) as team:
        team.parameters[...] = backend.to_device(flat, xp)
        for step in range(1, n_steps + 1):
            counts.clear()
            value = team.compute_gradients(starts[:n_sequences], lengths[:n_sequences], (0, step))
            team.update(step, 1e-3)
            counted = dict(counts)
            losses.append(float(value))
        return losses, backend.to_host(team.parameters).copy(), counted


@pytest.mark.parametrize("attn", known_weightings())
@pytest.mark.parametrize("loss", LOSSES)
def test_the_device_path_computes_what_numpy_does(cupy, attn, loss):
    config = replace(CONFIG, attn=attn, dropout=0)  # the two libraries draw different masks
    losses, parameters, _ = steps(cupy, config, 40, loss)
    expected, expected_parameters, _ = steps(np, config, 40, loss)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(parameters, expected_parameters, atol=1e-5)


@pytest.mark.parametrize("attn", known_weightings())
def test_a_step_launches_as_much_for_any_batch_and_never_waits(cupy, attn):
    counted = [steps(cupy, replace(CONFIG, attn=attn), n)[2] for n in (16, 128, 512)]
    assert len({c["launches"] for c in counted}) == 1 and counted[0]["launches"] <= MOST_LAUNCHES
    assert not any(c.get("synchronisations") for c in counted)
    log = planted.household()
    for n, c in zip(
        (16, 128, 512), counted, strict=True
    ):  # items, positions, targets and places in the rectangles: ids only
        starts, lengths = training_windows(log, leave_one_out(log), CONFIG.max_length)
        assert c["uploaded bytes"] <= 4 * 8 * lengths[:n].sum()


def test_ranking_and_decomposing_do_what_they_do_on_numpy(cupy):
    log, config = planted.household(), replace(CONFIG, n_items=planted.N_ITEMS)
    parameters = model.init_parameters(config, 0)
    device = {name: backend.to_device(value, cupy) for name, value in parameters.items()}
    test = Targets(*(x[:60] for x in leave_one_out(log).test))
    ours, theirs = (
        np.concatenate(list(ranking.rank_targets(p, config, log.sequence, test))) for p in (device, parameters)
    )
    np.testing.assert_array_equal(ours, theirs)
    histories = [log.sequence[a:b] for a, b in zip(test.starts, test.stops, strict=True)]
    (items, scores), (expected_items, expected) = (
        next(iter(ranking.recommend(p, config, histories, 5))) for p in (device, parameters)
    )
    np.testing.assert_array_equal(items, expected_items)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    ours, theirs = (decompose.decompose(p, config, histories)["blocks"] for p in (device, parameters))
    for block, other in zip(ours, theirs, strict=True):
        for name in block:
            np.testing.assert_allclose(block[name], other[name], atol=1e-5)


def test_the_gradient_check_runs_on_the_device(cupy):
    names = ["item_embedding", "position_embedding"]
    found = list(gradcheck.check("softmax", cupy, only=names))
    assert [name for name, _, _ in found] == names and all(error < gradcheck.TOLERANCE for _, error, _ in found)


def test_a_numpy_array_in_the_device_path_is_caught(cupy):
    x = cupy.asarray(np.ones(3))
    for wrong in (
        lambda: x + np.ones(3),
        lambda: x[np.array([0])],
        lambda: cupy.maximum(x, np.ones(3)),
        lambda: cupy.concatenate([x, np.ones(3)]),
        lambda: np.asarray(x),
        lambda: cupy.sort(x),
        lambda: optimizer.adam_step(x, np.ones(3), x, x, 1, 0.1),
    ):
        with pytest.raises((TypeError, AttributeError)):
            wrong()


# The functions marked @fused beside their twins of kernels.py


def cases(xp, dtype):
    """{name of a twin: (the marked function, its arguments)}: ragged sizes, more than one warp, block and chunk."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return xp.asarray(rng.normal(size=shape).astype(dtype))

    def stream():
        return backend.generator(xp, 3)

    lengths = np.sort(np.r_[40, rng.integers(1, 41, 22)])
    n, d, heads, n_items = int(lengths.sum()), 36, 3, 301
    bucket = packing.make_buckets(lengths, 1, xp)[0]
    square = (len(lengths), heads, 40, 40)
    weights = attention.softmax(draw(*square), attention.causal_mask(40, draw(1)))
    dropped = weights * ops.dropout_mask(square, 0.3, stream(), weights)
    v, d_mixed = draw(*square[:3], 12), draw(*square[:3], 12)
    targets = xp.asarray(rng.integers(n_items, size=n))
    norm = ops.layer_norm(draw(n, d), draw(d), draw(d))[1]
    linear = ops.LinearCache(draw(n, d), draw(d, 70))
    return {
        "matmul": (backend.matmul, (draw(*square), draw(*square).swapaxes(2, 3))),
        "linear_backward": (ops.linear_backward, (draw(n, 70), linear, draw(d, 70), draw(70))),
        "dropout_mask": (ops.dropout_mask, ((17, 59), 0.3, stream(), draw(1))),
        "dropout": (ops.dropout, (draw(n, d), 0.5, stream())),
        "layer_norm": (ops.layer_norm, (draw(n, d), draw(d), draw(d))),
        "layer_norm_backward": (ops.layer_norm_backward, (draw(n, d), norm, draw(d), draw(d))),
        "to_heads": (packing.to_heads, (draw(n, d), bucket, heads)),
        "from_heads": (packing.from_heads, (draw(len(lengths), heads, 40, 12), bucket, draw(n, d))),
        "causal_mask": (attention.causal_mask, (37, draw(1))),
        "fixed_weights": (attention.fixed_weights, ("recency", 37, draw(1))),
        "softmax": (attention.softmax, (draw(*square), attention.causal_mask(50, draw(1))[:40, :40])),
        "softmax_backward": (
            attention.softmax_backward,
            (d_mixed @ v.swapaxes(2, 3).copy(), weights, dropped, d_mixed, dropped @ v),
        ),
        "cross_entropy": (minirec_loss.cross_entropy, (draw(n, d), draw(n_items, d), targets, 1 / n, draw(n_items, d))),
        "adam_step": (optimizer.adam_step, (draw(999), draw(999), draw(999), abs(draw(999)), 3, 1e-3)),
    }


RANDOM = {"generator", "random_uint16"}  # the backends draw differently


def leaves(x):
    """All arrays in nested tuples, on the host."""
    if isinstance(x, tuple):
        return [leaf for part in x for leaf in leaves(part)]
    return [backend.to_host(x)] if hasattr(x, "shape") else []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", sorted(gpu_module.TWINS.keys() - RANDOM))
def test_on_a_gpu_a_twin_computes_what_the_marked_function_does(gpu, name, dtype):
    if kernels.device_of(gpu, "d") is None:
        pytest.skip("this CuPy runs no kernels")
    found = []
    for of in (lambda f: gpu_module.TWINS[f.__name__], lambda f: f.__wrapped__):
        function, arguments = cases(gpu, dtype)[name]
        out = of(function)(*arguments)
        assert out is not NotImplemented
        found.append(leaves((out, arguments)))  # many write into their arguments
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=(1e-12 if dtype == np.float64 else 1e-5) * 50)


@pytest.mark.gpu
def test_on_a_gpu_random_words_are_those_of_philox_and_nobody_gets_them_twice(gpu):
    if kernels.device_of(gpu, "d") is None:
        pytest.skip("this CuPy runs no kernels")
    stream = kernels.Stream(0)
    words = backend.to_host(backend.random_uint16(stream, 8, gpu)).view(np.uint32)
    known = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # the answer that its authors publish for counter 0, key 0
    np.testing.assert_array_equal(words, np.array(known, np.uint32))
    both = backend.to_host(backend.random_uint16(kernels.Stream(0), 24, gpu))
    np.testing.assert_array_equal(backend.to_host(backend.random_uint16(stream, 16, gpu)), both[8:])


@pytest.mark.gpu
@pytest.mark.parametrize("attn", known_weightings())
def test_on_a_gpu_the_losses_are_those_of_numpy(gpu, attn):
    config = replace(CONFIG, attn=attn, dropout=0)
    losses, parameters, _ = steps(gpu, config, 128, n_steps=5)
    expected, expected_parameters, _ = steps(np, config, 128, n_steps=5)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(parameters, expected_parameters, atol=1e-4)


@pytest.mark.parametrize(
    "break_it, words",
    [
        (lambda c: setattr(c.cuda.runtime, "getDeviceCount", lambda: 0), "no GPU found"),
        (lambda c: setattr(c.cuda.runtime, "getDeviceCount", lambda: 1 / 0), "no usable GPU .division by zero.; check"),
        (lambda c: setattr(c, "ones", lambda n: 1 / 0), "install the CuPy that fits the driver's CUDA"),
    ],
)
def test_what_is_wrong_with_a_gpu_is_said_in_one_line(cupy, break_it, words):
    break_it(cupy)
    with pytest.raises(UserError, match=words) as caught:
        backend.load("cupy")
    assert "--backend numpy" in str(caught.value) and "\n" not in str(caught.value)


def test_a_broken_cupy_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "cupy.py").write_text("raise ImportError('libcublas.so.12: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    with pytest.raises(UserError, match="cannot be imported .libcublas.so.12"):
        backend.load("cupy")


@pytest.mark.parametrize(
    "cuda, command",
    [
        (12.8, "pip install cupy-cuda12x (the driver is for CUDA 12.8)"),
        (13.0, "pip install cupy-cuda13x (the driver is for CUDA 13.0)"),
        (14.1, "pip install cupy-cuda13x (the driver is for CUDA 14.1)"),  # a driver runs what is older
        (11.8, "pip install cupy-cuda12x (CUDA 12) or pip install cupy-cuda13x (CUDA 13), as nvidia-smi shows"),
        (None, "pip install cupy-cuda12x (CUDA 12) or pip install cupy-cuda13x (CUDA 13), as nvidia-smi shows"),
    ],
)
def test_the_cupy_that_fits_the_driver_is_named_where_it_is_missing_or_the_wrong_one(cupy, monkeypatch, cuda, command):
    monkeypatch.setattr(gpu_module, "driver_cuda", lambda: cuda)
    monkeypatch.setattr(cupy, "ones", lambda n: 1 / 0)
    with pytest.raises(UserError, match="cannot use the GPU") as caught:
        backend.load("cupy")
    assert command in str(caught.value)
    monkeypatch.setattr(gpu_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="CuPy is not installed") as caught:
        backend.load("cupy")
    assert command in str(caught.value)


def test_the_extras_install_the_cupy_that_messages_name():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    extras = settings["options.extras_require"]
    assert [extras[name].split(">=")[0].strip() for name in ("gpu", "gpu13")] == list(gpu_module.PACKAGES.values())


@pytest.mark.parametrize("answer, cuda", [(12080, 12.8), (13000, 13.0), (0, None), (OSError("no such file"), None)])
def test_the_driver_is_asked_for_its_cuda(monkeypatch, answer, cuda):
    def open_library(name):
        if isinstance(answer, Exception):
            raise answer
        write = lambda pointer: setattr(pointer._obj, "value", answer) or 0
        return SimpleNamespace(cuDriverGetVersion=write)

    monkeypatch.setattr(gpu_module.ctypes, "CDLL", open_library)
    assert gpu_module.driver_cuda() == cuda
