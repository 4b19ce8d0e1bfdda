"""From paired runs to a verdict: effect sizes, intervals, regimes.

Two arms were trained with the same n seeds. Of a metric, a [n] and b [n] are the arms' values.

    Hedges' g = J (mean a - mean b) / sqrt((var a + var b) / 2),   J = 1 - 3 / (4 (n + n) - 9)

(Hedges 1981): the difference in units of the spread over seeds, J correcting the bias of few seeds. It
says how sure a difference is, not how large: beside it stand the difference itself and two intervals,
one over seeds (would other seeds agree?) and one over users (would other users?).

What cannot be computed is None: JSON knows no NaN.
"""

import json
import math
from importlib import resources

import numpy as np

from minirec.errors import UserError

METRICS = ("HR@1", "HR@10", "HR@100", "NDCG@10", "NDCG@100")  # the paper's five
JUDGED_BY = "NDCG@10"  # its intervals decide what is said in words
CONFIDENCE = 0.95
RESAMPLES = 1000  # of the bootstrap
MARGIN = 0.05  # arms that differ by less than 5 % of the second one's mean are called equal
# Above it a model mixes. The published ratios have a gap there: 5 of 14 lie at 0.146 to 0.174, the rest from 0.233.
MIXES_ABOVE = 0.2
FEWEST_SEEDS, FEWEST_USERS = 3, 30  # fewer never make a regime confident; users with a target that can be hit


def published():
    """Return what the authors published for 14 datasets, with its source (see published.json)."""
    return json.loads(resources.files("minirec.studies").joinpath("published.json").read_text("utf-8"))


def hedges_g(a, b):
    """Return Hedges' g of a over b [n]; 0 where nothing spreads or differs; None where n < 2 or it only differs."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    if len(a) < 2:
        return None
    difference, spread = a.mean() - b.mean(), math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    if spread <= 1e-12 * max(abs(a.mean()), abs(b.mean())):  # equal values have a variance of rounding
        return 0.0 if np.allclose(a, b, rtol=1e-12, atol=0) else None
    return float((1 - 3 / (4 * (len(a) + len(b)) - 9)) * difference / spread)


def paired_t(a, b):
    """Return {"t", "p", "interval"} of a paired, two-sided t-test over seeds; Nones where it says nothing.

    interval: [low, high] of the mean difference, at CONFIDENCE. Raises ImportError without scipy.
    """
    stats = import_scipy()

    differences = np.asarray(a, float) - np.asarray(b, float)
    n = len(differences)
    if n < 2:
        return {"t": None, "p": None, "interval": None}
    mean, error = float(differences.mean()), float(differences.std(ddof=1)) / math.sqrt(n)
    if error <= 1e-12 * np.abs(np.concatenate([a, b])).max():
        same = bool(np.allclose(a, b, rtol=1e-12, atol=0))
        return {"t": 0.0 if same else None, "p": 1.0 if same else None, "interval": [mean, mean]}
    result = stats.ttest_rel(a, b)
    interval = result.confidence_interval(CONFIDENCE)
    return {"t": float(result.statistic), "p": float(result.pvalue), "interval": [float(x) for x in interval]}


def bootstrap(values, seed=0):
    """Return [low, high], at CONFIDENCE, of the mean of values [M] over users drawn with replacement."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    tail = (1 - CONFIDENCE) / 2
    return [float(x) for x in np.quantile(means, [tail, 1 - tail])]


def import_scipy():
    """Return scipy.stats. Raises UserError where it is missing."""
    try:
        from scipy import stats
    except ImportError:
        raise UserError("a study needs scipy for its statistics: pip install 'minirec[study]'") from None
    return stats


def compare(a, b, user_differences):
    """Compare two arms on one metric.

    a, b [n]: one value a seed; user_differences [M]: a - b of each user, a mean over seeds.
    Returns {"hedges_g", "difference", "relative", "t", "p", "interval_seeds", "interval_users"}; relative to
    the second arm's mean, None where that is 0.
    """
    test = paired_t(a, b)
    difference = float(np.mean(a) - np.mean(b))
    return {
        "hedges_g": hedges_g(a, b),
        "difference": difference,
        "relative": difference / float(np.mean(b)) if np.mean(b) else None,
        "t": test["t"],
        "p": test["p"],
        "interval_seeds": test["interval"],
        "interval_users": bootstrap(user_differences),
    }


def mean_g(values):
    """Return the mean of the effect sizes that are not None; None where all are."""
    values = [g for g in values if g is not None]
    return float(np.mean(values)) if values else None


def judge(comparison, mean):
    """Say what a comparison shows, by both of its intervals and never by a point.

    mean: of the second arm. Returns one of "better", "worse" (the first arm), "equal" (within MARGIN of the mean),
    "no better" (perhaps worse, and better by the margin at most), "unclear". A difference below the margin
    whose sign is sure is "equal": it is of no importance.
    """
    intervals = [comparison["interval_seeds"], comparison["interval_users"]]
    if None in intervals or mean == 0:
        return "unclear"
    low, high = min(i[0] for i in intervals), max(i[1] for i in intervals)
    if high <= MARGIN * mean:
        return "equal" if low >= -MARGIN * mean else "worse" if high < 0 else "no better"
    return "better" if low > 0 else "unclear"


def regime(ratio, g):
    """Return the regime of a point: mixing ratio of the softmax runs, g of softmax over uniform."""
    if ratio <= MIXES_ABOVE:
        return "preserving"
    return "mixing_with_reliance" if g > 0 else "mixing_without_reliance"


def doubts(name, judgement, ratios, n_users, model, baselines):
    """Return why a regime is not to be relied on, as a list of words; empty where seeds and users bear it out.

    name: the regime; judgement: of softmax over uniform (see judge); ratios [n]: the mixing ratios by seed;
    n_users: with a target that can be hit; model, baselines: JUDGED_BY of the softmax runs and of rankings without
    learning. A model that a count clearly beats has learned too little, and an untrained one mixes nothing.
    """
    fits = {
        "preserving": ("equal", "no better"),
        "mixing_without_reliance": ("equal", "no better", "worse"),
        "mixing_with_reliance": ("better",),
    }
    interval = paired_t(ratios, np.zeros(len(ratios)))["interval"] or [-math.inf, math.inf]
    found = {
        f"fewer than {FEWEST_SEEDS} seeds": len(ratios) < FEWEST_SEEDS,
        f"fewer than {FEWEST_USERS} users to test on": n_users < FEWEST_USERS,
        "counting does better than the model": model < (1 - MARGIN) * max(baselines),
        f"the seeds' mixing ratios do not agree on a side of {MIXES_ABOVE}": interval[0] <= MIXES_ABOVE < interval[1],
        "whether weighting matters is not clear, or not as the regime has it": judgement not in fits[name],
    }
    return [words for words, applies in found.items() if applies]
