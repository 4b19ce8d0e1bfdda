"""From paired runs to a verdict: effect sizes, intervals, judgements, regimes.

Two arms were trained with the same n seeds and tested on the same M users. Of a metric, a [n, M] and b [n, M] are the
values of each user under each seed, d = a - b.

    Hedges' g = J (mean a - mean b) / sqrt((var a + var b) / 2),   J = 1 - 3 / (4 (n + n) - 9)

with the n means over users (Hedges 1981): the difference in units of the spread over seeds, J correcting the bias of
few seeds. It says how sure a difference is, not how large. Beside it stand the difference itself and three intervals:
over seeds (would other seeds agree?), over users (would other users?), and over both at once. The last one decides what
is said in words. Its half-width h is made of theirs (Howe 1974),

    h^2 = t_n^2 S + t_M^2 (U - R)       S = var(seed means of d) / n      U = var(user means of d) / M

with t_n and t_M the quantiles of Student's t with n - 1 and M - 1 degrees of freedom, and h no less than t_n sqrt(S) or
t_M sqrt(U). R = var(r) / n M is what is particular to one user under one seed: r is d without the means of its seed and
of its user. S and U both hold it, and it counts once.

What cannot be computed is None: JSON knows no NaN.
"""

import json
import math
from importlib import resources

import numpy as np

from minirec.errors import UserError

METRICS = ("HR@1", "HR@10", "HR@100", "NDCG@10", "NDCG@100")  # the paper's five
JUDGED_BY = "NDCG@10"  # its combined interval decides what is said in words
CONFIDENCE = 0.95
RESAMPLES = 1000  # of the bootstrap
MARGIN = 0.05  # arms that differ by less than 5 % of the second one's mean are called equal
# Above it a model mixes. The published ratios have a gap there: 5 of 14 lie at 0.146 to 0.174, the rest from 0.233.
MIXES_ABOVE = 0.2
HALF = 0.5  # of what learned weights gain over an average: relied on is recency if it brings that much, else content
FAR = 1000  # shares beyond it are not looked for


def published():
    """Return what the authors published for 14 datasets, with its source (see published.json)."""
    theirs = json.loads(resources.files("minirec.studies").joinpath("published.json").read_text("utf-8"))
    for point in theirs["datasets"].values():
        point |= {"mean_hedges_g": mean_hedges_g(point["hedges_g"].values()), "seeds": range(theirs["seeds"])}
    return theirs


def import_scipy():
    """Return scipy.stats. Raises UserError where it is missing."""
    try:
        from scipy import stats
    except ImportError:
        raise UserError("a study needs scipy for its statistics: pip install scipy") from None
    return stats


def hedges_g(a, b):
    """Return Hedges' g of a over b [n]; 0 where nothing spreads or differs; None where n < 2 or it only differs."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    if len(a) < 2:
        return None
    difference, spread = a.mean() - b.mean(), math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    if spread <= 1e-12 * max(abs(a.mean()), abs(b.mean())):  # equal values have a variance of rounding
        return 0.0 if np.allclose(a, b, rtol=1e-12, atol=0) else None
    return float((1 - 3 / (4 * (len(a) + len(b)) - 9)) * difference / spread)


def hedges_g_interval(g, n):
    """Return [low, high], at CONFIDENCE, of an effect size g from n seeds an arm; None where g is.

    Its variance is about 2/n + g^2 / 4n (Hedges and Olkin 1985): with 3 seeds an effect of 0 reaches from -1.6 to 1.6.
    """
    if g is None:
        return None
    half = float(import_scipy().norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt(2 / n + g * g / (4 * n))
    return [g - half, g + half]


def mean_hedges_g(values):
    """Return the mean of the effect sizes that are not None; None where all are."""
    values = [g for g in values if g is not None]
    return float(np.mean(values)) if values else None


def mean_interval(values):
    """Return [low, high], at CONFIDENCE, of the mean of values [n] over seeds (Student's t); None where n < 2."""
    if len(values) < 2:
        return None
    half = import_scipy().t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return [float(np.mean(values) - half), float(np.mean(values) + half)]


def paired_t(a, b):
    """Return {"t", "p"} of a paired, two-sided t-test over seeds, a and b [n]; Nones where it says nothing."""
    if len(a) < 2:
        return {"t": None, "p": None}
    differences = np.asarray(a, float) - np.asarray(b, float)
    if differences.std(ddof=1) <= 1e-12 * np.abs(np.concatenate([a, b])).max():
        same = bool(np.allclose(a, b, rtol=1e-12, atol=0))
        return {"t": 0.0 if same else None, "p": 1.0 if same else None}
    result = import_scipy().ttest_rel(a, b)
    return {"t": float(result.statistic), "p": float(result.pvalue)}


def bootstrap(values, seed=0):
    """Return [low, high], at CONFIDENCE, of the mean of values [M] over users drawn with replacement."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    tail = (1 - CONFIDENCE) / 2
    return [float(x) for x in np.quantile(means, [tail, 1 - tail])]


def squared_errors(differences):
    """Return S, U and R (see above) of differences [..., n, M], n and M at least 2, as {name: [...]}."""
    n, n_users = differences.shape[-2:]
    by_seed, by_user = (differences.mean(axis=axis, keepdims=True) for axis in (-1, -2))
    residuals = differences - by_seed - by_user + by_seed.mean(axis=-2, keepdims=True)
    return {
        "seeds": by_seed.var(axis=(-1, -2), ddof=1) / n,
        "users": by_user.var(axis=(-1, -2), ddof=1) / n_users,
        "residuals": (residuals**2).sum(axis=(-1, -2)) / ((n - 1) * (n_users - 1)) / (n * n_users),
    }


def half_width(squared, n, n_users, alpha=1 - CONFIDENCE):
    """Return half the width of the interval over seeds and users, at 1 - alpha; squared: squared_errors."""
    seeds, users = import_scipy().t.ppf(1 - alpha / 2, [n - 1, n_users - 1]) ** 2
    seeds, users, once = seeds * squared["seeds"], users * squared["users"], users * squared["residuals"]
    return np.sqrt(np.maximum(seeds + users - once, np.maximum(seeds, users)))


def interval(comparison, alpha=1 - CONFIDENCE):
    """Return [low, high] of a comparison's difference over seeds and users, at 1 - alpha; None of one seed."""
    if comparison["squared_errors"] is None:
        return None
    half = float(half_width(comparison["squared_errors"], comparison["seeds"], comparison["users"], alpha))
    return [comparison["difference"] - half, comparison["difference"] + half]


def compare(a, b):
    """Compare two arms on one metric; a, b [n, M]: the value of each user under each seed.

    Returns {"seeds": n, "users": M, "hedges_g", "hedges_g_interval", "difference", "relative", "t", "p",
    "interval_seeds", "interval_users", "interval", "squared_errors"}: t and p of the paired t-test over seeds; relative
    to the second arm's mean, None where that is 0; the last two of seeds and users together. Raises UserError
    without scipy.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    (means_a, means_b), d = (x.mean(axis=1) for x in (a, b)), a - b
    g, squared = hedges_g(means_a, means_b), squared_errors(d) if min(d.shape) > 1 else None
    comparison = {
        "seeds": d.shape[0],
        "users": d.shape[1],
        "hedges_g": g,
        "hedges_g_interval": hedges_g_interval(g, len(a)),
        "difference": float(d.mean()),
        "relative": float(d.mean() / b.mean()) if b.any() else None,
        **paired_t(means_a, means_b),
        "interval_seeds": mean_interval(d.mean(axis=1)),
        "interval_users": bootstrap(d.mean(axis=0)),
        "squared_errors": squared and {name: float(value) for name, value in squared.items()},
    }
    return comparison | {"interval": interval(comparison)}


def holm(comparisons):
    """Return {name: alpha} for the comparisons of one log that are put into words together (Holm 1979).

    m of them are first judged at 0.05 / m. Where k of them differ, the others may be judged at 0.05 / (m - k), and so
    on. One that is truly nothing is then called a difference in 5 % of studies at most, however many there are.
    """

    def differs(name, alpha):
        both = interval(comparisons[name], alpha)
        return both is not None and not both[0] <= 0 <= both[1]

    left, alphas = list(comparisons), {}
    while left:
        alpha = (1 - CONFIDENCE) / len(left)
        alphas |= dict.fromkeys([name for name in left if differs(name, alpha)] or left, alpha)
        left = [name for name in left if name not in alphas]
    return alphas


def judge(comparison, mean, alpha=1 - CONFIDENCE):
    """Say what a comparison shows, by its combined interval and never by a point.

    mean: of the second arm; alpha: see holm. Returns one of "better", "worse" (the first arm), "equal" (within MARGIN
    of the mean), "no better" (perhaps worse, and better by the margin at most), "unclear". A difference below the
    margin whose sign is sure is "equal": it is of no importance.
    """
    both = interval(comparison, alpha)
    if both is None or mean == comparison["difference"] == 0:  # one seed, or nothing that was hit in either arm
        return "unclear"
    low, high = both
    if high <= MARGIN * mean:
        return "equal" if low >= -MARGIN * mean else "worse" if high < 0 else "no better"
    return "better" if low > 0 else "unclear"


def content_share(softmax, uniform, recency):
    """Return how much of what learned weights gain over an average is more than recency brings, and its interval.

    softmax, uniform, recency [n, M]: as in compare. The share is (softmax - recency) / (softmax - uniform). Its
    interval holds each share for which softmax - recency - share (softmax - uniform), whose mean is then 0, is not
    surely off 0 (Fieller 1954). So at share 1 it says what the interval of recency - uniform says. None for one seed.
    """
    content, gain = softmax - recency, softmax - uniform
    share = float(content.mean() / gain.mean())
    if min(gain.shape) < 2:
        return share, None

    from scipy.optimize import brentq

    def excess(candidate):  # above 0 where what is left is surely off 0, by more than rounding
        rest = content - candidate * gain
        return float(abs(rest.mean()) - half_width(squared_errors(rest), *gain.shape)) - 1e-15

    ends = (share - FAR, share + FAR)
    return share, [float(brentq(excess, share, end)) if excess(end) > 0 else end for end in ends]


def regime(ratio, g, judgement="unclear"):
    """Return the regime of a point: mixing ratio of the softmax runs, g of softmax over uniform, its judgement.

    A gain that is surely below the margin is no reliance, whatever the sign of g (see judge).
    """
    if ratio <= MIXES_ABOVE:
        return "preserving"
    return "mixing_with_reliance" if g > 0 and judgement not in ("equal", "no better") else "mixing_without_reliance"


FITS = {  # what softmax over uniform may be judged to be, for a regime to be sure (see judge)
    "preserving": ("equal", "no better"),
    "mixing_without_reliance": ("equal", "no better", "worse"),
    "mixing_with_reliance": ("better",),
}
