"""Adam (Kingma and Ba 2015, algorithm 1), on flat vectors: all parameters at once.

Symbols: w a parameter, g its gradient, t the step, lr the learning rate; m and v running means of g and g^2.

    m = b1 m + (1 - b1) g              v = b2 v + (1 - b2) g^2
    w = w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

The code writes m += (1 - b1) (g - m), which is the same, and v likewise.

Why the 1 - b^t: m starts at 0. Unrolled, m_t = (1 - b1) sum_{i=1..t} b1^(t-i) g_i. If the expectation of g is the
same at all steps, E[m_t] = E[g] (1 - b1) sum_{i=1..t} b1^(t-i) = E[g] (1 - b1^t), a geometric sum. So m is too small by
the factor 1 - b1^t. Divided by it, m is an unbiased mean of g from the first step on, and v one of g^2.

What it does: where g is steady, w moves by about lr a step, whatever the scale of g. It moves by less where g keeps
changing its sign, and by up to about 7 lr where g is large after many small ones.
"""

import math

from minirec.backend import get_array_module
from minirec.gpu import fused

BETA_1, BETA_2, EPS = 0.9, 0.999, 1e-8


@fused
def adam_step(parameters, gradient, first_moment, second_moment, step, learning_rate):
    """Update parameters and moments in place.

    parameters, gradient, first_moment (m), second_moment (v): arrays of one shape; step (t) counts from 1.
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
