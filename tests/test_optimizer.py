"""Adam against the algorithm as printed in the paper."""

import numpy as np

from minirec.optimizer import adam_step


def test_three_steps_equal_algorithm_1(rng):
    w = rng.normal(size=5)
    expected, m, v = w.copy(), np.zeros(5), np.zeros(5)
    first, second = np.zeros(5), np.zeros(5)
    for t in (1, 2, 3):
        g = rng.normal(size=5)
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        expected -= 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        adam_step(w, g, first, second, t, 0.01)
        np.testing.assert_allclose(w, expected, rtol=1e-12)


def test_a_zero_gradient_moves_nothing():
    w = np.ones(3)
    adam_step(w, np.zeros(3), np.zeros(3), np.zeros(3), 1, 0.1)
    np.testing.assert_array_equal(w, 1)
