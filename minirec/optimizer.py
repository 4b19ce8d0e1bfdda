"""Adam (Kingma and Ba 2015, algorithm 1), on flat vectors: all parameters at once.

Symbols: P parameters in all, w one of them, g its gradient, t the step, lr the learning rate; m and v
running means of g and g^2. These start at 0; dividing by 1 - b^t makes them true averages again. Each w moves
by about lr whatever the scale of its g, and by less where g keeps changing its sign.
"""

import math

from minirec.backend import get_array_module

BETA_1, BETA_2, EPS = 0.9, 0.999, 1e-8


def adam_step(parameters, gradient, first_moment, second_moment, step, learning_rate):
    """Update parameters and moments in place.

    parameters, gradient, first_moment, second_moment: [P]; step counts from 1.

        m = b1 m + (1 - b1) g              v = b2 v + (1 - b2) g^2
        w = w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    """
    xp = get_array_module(parameters)
    first_moment += (1 - BETA_1) * (gradient - first_moment)
    second_moment += (1 - BETA_2) * (gradient * gradient - second_moment)
    denominator = xp.sqrt(second_moment)
    denominator *= 1 / math.sqrt(1 - BETA_2**step)
    denominator += EPS
    update = first_moment / denominator
    update *= learning_rate / (1 - BETA_1**step)
    parameters -= update
