"""Effect sizes, intervals and regimes, against scipy, numbers worked out by hand, and the published points."""

import json
import math

import numpy as np
import pytest

from minirec.studies import statistics
from minirec.studies.statistics import METRICS

stats = pytest.importorskip("scipy.stats", reason="the study's statistics need scipy")


def test_hedges_g_of_numbers_worked_out_by_hand():
    # means 3 and 2, both variances 1, J = 1 - 3 / (4 * 6 - 9) = 0.8
    assert statistics.hedges_g([2, 3, 4], [1, 2, 3]) == pytest.approx(0.8)
    assert statistics.hedges_g([1, 2, 3], [2, 3, 4]) == pytest.approx(-0.8)
    # variances 1 and 4: 0.8 * 1 / sqrt(2.5)
    assert statistics.hedges_g([2, 3, 4], [0, 2, 4]) == pytest.approx(0.8 / math.sqrt(2.5))
    # a difference of 4
    assert statistics.hedges_g([5, 6, 7], [1, 2, 3]) == pytest.approx(3.2)


def test_hedges_g_where_nothing_spreads():
    assert statistics.hedges_g([0.1] * 3, [0.1] * 3) == 0
    assert statistics.hedges_g([0.1] * 3, [0.2] * 3) is None
    assert statistics.hedges_g([0.1 + 0.2] * 3, [0.3] * 3) == 0  # equal to rounding
    assert statistics.hedges_g([0.1], [0.2]) is None
    assert statistics.mean_hedges_g([0.5, None, 1.5]) == 1 and statistics.mean_hedges_g([None]) is None


def test_the_interval_of_an_effect_size_is_that_of_hedges_and_olkin():
    assert statistics.hedges_g_interval(0, 3) == pytest.approx([-1.6003, 1.6003], abs=1e-4)  # 1.96 sqrt(2/3)
    low, high = statistics.hedges_g_interval(2, 5)
    half = stats.norm.ppf(0.975) * math.sqrt(10 / 25 + 4 / 20)  # (n + n) / n n + g^2 / 2 (n + n)
    assert (low, high) == pytest.approx((2 - half, 2 + half))
    assert statistics.hedges_g_interval(None, 3) is None


def test_the_paired_t_test_is_scipys_and_the_interval_over_seeds_holds_t_standard_errors(rng):
    a, b = rng.normal(1, 0.1, 5), rng.normal(0.9, 0.1, 5)
    found = statistics.paired_t(a, b)
    expected = stats.ttest_rel(a, b)
    assert (found["t"], found["p"]) == pytest.approx((expected.statistic, expected.pvalue))
    assert statistics.mean_interval(a - b) == pytest.approx(list(expected.confidence_interval(0.95)))
    assert statistics.mean_interval([0.5]) is None


def test_the_paired_t_test_where_nothing_spreads():
    assert statistics.paired_t([0.5, 0.5], [0.5, 0.5]) == {"t": 0.0, "p": 1.0}
    assert statistics.paired_t([0.5, 0.6], [0.25, 0.35]) == {"t": None, "p": None}
    assert statistics.paired_t([0.5], [0.4]) == {"t": None, "p": None}
    assert statistics.mean_interval([0.25, 0.25]) == [0.25, 0.25]


def test_the_bootstrap_interval_is_about_two_standard_errors_wide(rng):
    values = rng.normal(1, 2, 400)
    low, high = statistics.bootstrap(values)
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
    assert statistics.bootstrap(values) == [low, high]


def test_the_combined_error_is_that_of_a_two_way_analysis_of_variance(rng):
    d = rng.normal(size=(4, 1)) + rng.normal(size=(1, 30)) + rng.normal(size=(4, 30))
    by_seed, by_user = d.mean(axis=1), d.mean(axis=0)
    residuals = [[d[s, u] - by_seed[s] - by_user[u] + d.mean() for u in range(30)] for s in range(4)]
    seeds, users = by_seed.var(ddof=1) / 4, by_user.var(ddof=1) / 30
    both = np.square(residuals).sum() / (3 * 29) / 120
    squared = statistics.squared_errors(d)
    assert squared == pytest.approx({"seeds": seeds, "users": users, "residuals": both})
    t_seeds, t_users = stats.t.ppf(0.95, 3), stats.t.ppf(0.95, 29)
    expected = t_seeds**2 * seeds + t_users**2 * (users - both)
    assert statistics.half_width(squared, 4, 30, 0.1) ** 2 == pytest.approx(expected)


def test_where_users_or_seeds_do_not_differ_the_combined_interval_is_students(rng):
    a = np.repeat(rng.normal(size=(5, 1)), 30, axis=1)
    for d, values in ((a, a[:, 0]), (a.T, a[:, 0])):
        low, high = statistics.mean_interval(values)
        half = statistics.half_width(statistics.squared_errors(d), *d.shape)
        assert 2 * half == pytest.approx(high - low)


# What the error of a mean is made of: the standard deviations over seeds, over users, and of each user under each seed.
SOURCES = [(1, 1, 0), (1, 1, 1), (2, 1, 0), (3, 1, 0), (1, 2, 0), (2, 0, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)]


@pytest.mark.parametrize("n", [3, 5, 10])
def test_two_equal_arms_are_called_different_in_one_study_of_twenty(n):
    """Nominally 5 %, at most 7 %, whatever the error is made of."""
    rng, studies, n_users = np.random.default_rng(n), 6000, 40
    for deviations in SOURCES:
        seeds, users, both = deviations * np.sqrt([n, n_users, n * n_users])  # of one value
        d = seeds * rng.standard_normal((studies, n, 1)) + users * rng.standard_normal((studies, 1, n_users))
        d = d + both * rng.standard_normal((studies, n, n_users)) if both else d
        half = statistics.half_width(statistics.squared_errors(d), n, n_users)
        false = (np.abs(d.mean(axis=(1, 2))) > half).mean()
        print(n, deviations, f"{false:.3f}")
        assert false <= 0.07, deviations


def comparison(difference, half, **changes):
    """A comparison of 8 seeds whose combined interval at 95 % is so wide to either side."""
    squared = {"seeds": (half / stats.t.ppf(0.975, 7)) ** 2, "users": 0, "residuals": 0}
    return {"difference": difference, "squared_errors": squared, "seeds": 8, "users": 100} | changes


def judged(low, high, mean=0.1, alpha=0.05):
    return statistics.judge(comparison((low + high) / 2, (high - low) / 2), mean, alpha)


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0.01, 0.05, "better"),
        (-0.05, 0.001, "no better"),
        (-0.05, 0.006, "unclear"),
        (-0.05, -0.001, "worse"),
        (-0.0049, 0.0049, "equal"),
        (-0.006, 0.004, "no better"),  # not within 5 % of 0.1
        (0.001, 0.003, "equal"),  # sure, and of no importance
        (-0.0001, 0.05, "unclear"),  # zero is in it
        (0.02, 0.02, "better"),
    ],
)
def test_a_judgement_follows_from_the_combined_interval(low, high, expected):
    assert judged(low, high) == expected


def test_a_judgement_of_one_seed_or_of_nothing_is_unclear():
    assert statistics.judge(comparison(0.1, 0, squared_errors=None), 0.1) == "unclear"
    assert judged(0, 0, mean=0) == "unclear"


def test_an_arm_is_better_than_one_that_never_hits():
    assert judged(0.1, 0.2, mean=0) == "better"
    assert judged(-0.1, 0.2, mean=0) == "unclear"


def test_a_judgement_among_others_needs_more():
    assert judged(0.001, 0.05) == "better" and judged(0.001, 0.05, alpha=0.05 / 3) == "unclear"
    assert judged(-0.0049, 0.0049, alpha=0.05 / 3) == "unclear"


def test_comparisons_that_are_put_into_words_together_are_held_against_holms_levels():
    def of(p):
        return comparison(stats.t.isf(p / 2, 7), stats.t.ppf(0.975, 7))

    found = statistics.holm({"a": of(0.03), "b": of(0.001), "c": of(0.02)})
    assert found == pytest.approx({"b": 0.05 / 3, "c": 0.05 / 2, "a": 0.05})  # .02 < .025, .03 < .05: all differ
    found = statistics.holm({"a": of(0.03), "b": of(0.001), "c": of(0.04)})
    assert found == pytest.approx({"b": 0.05 / 3, "a": 0.05 / 2, "c": 0.05 / 2})  # .03 > .025 ends it
    assert statistics.holm({"a": of(0.5)}) == pytest.approx({"a": 0.05})
    same, none, sure = comparison(0, 0), comparison(1, 0, squared_errors=None), comparison(1, 0)
    assert statistics.holm({"a": same, "b": none, "c": sure}) == pytest.approx({"c": 0.05 / 3, "a": 0.025, "b": 0.025})


def test_the_share_that_recency_does_not_bring_and_its_interval(rng):
    uniform = rng.random((5, 400)) * 0.1
    softmax = uniform + 0.2 + rng.normal(0, 0.1, (5, 400))
    share, (low, high) = statistics.content_share(softmax, uniform, uniform + 0.25 * (softmax - uniform))
    assert (share, low, high) == pytest.approx((0.75, 0.75, 0.75))
    recency = uniform + 0.15 + rng.normal(0, 0.1, (5, 400))
    share, (low, high) = statistics.content_share(softmax, uniform, recency)
    assert share == pytest.approx((softmax - recency).mean() / (softmax - uniform).mean())
    for end in (low, high):  # there, what is left is just not off 0
        rest = softmax - recency - end * (softmax - uniform)
        assert abs(rest.mean()) == pytest.approx(statistics.half_width(statistics.squared_errors(rest), 5, 400))
    assert low < share < high
    assert statistics.content_share(softmax[:1], uniform[:1], recency[:1])[1] is None


@pytest.mark.parametrize("seed", range(30))
def test_the_shares_interval_agrees_with_comparing_the_arms_themselves(seed):
    """A share of 0: recency is as good as learned weights. Of 1: it is no better than an average. Of 1/2: half-way."""
    rng = np.random.default_rng(seed)
    uniform = rng.normal(0.1, 0.1, (3, 60)) + rng.normal(0, 0.01, (3, 1))
    softmax = uniform + 0.2 + rng.normal(0, 0.3, (3, 60)) + rng.normal(0, 0.02, (3, 1))
    recency = uniform + rng.uniform(-0.05, 0.25) + rng.normal(0, 0.3, (3, 60)) + rng.normal(0, 0.02, (3, 1))
    if statistics.compare(softmax, uniform)["interval"][0] <= 0:
        pytest.skip("no gain to have a share in")
    _, (low, high) = statistics.content_share(softmax, uniform, recency)
    for share, a, b in ((0, softmax, recency), (1, recency, uniform), (0.5, recency, (softmax + uniform) / 2)):
        below, above = statistics.compare(a, b)["interval"]
        assert (low <= share <= high) == (below <= 0 <= above)


def test_a_share_of_a_gain_that_may_be_nothing_has_no_end(rng):
    uniform = rng.normal(0.1, 0.1, (3, 60))
    softmax, recency = (uniform + rng.normal(0.01, 0.3, (3, 60)) for _ in range(2))
    _, interval = statistics.content_share(softmax, uniform, recency)
    assert interval[1] - interval[0] > statistics.FAR


def test_regimes_and_what_fits_them():
    assert statistics.regime(0.1, 3) == "preserving"
    assert statistics.regime(0.3, 0.1) == "mixing_with_reliance"
    assert statistics.regime(0.3, 0) == "mixing_without_reliance"
    assert statistics.regime(0.3, 0.1, "better") == "mixing_with_reliance"
    assert statistics.regime(0.3, 0.1, "equal") == "mixing_without_reliance"
    assert all(set(fits) < {"equal", "no better", "worse", "better", "unclear"} for fits in statistics.FITS.values())


def test_the_threshold_lies_in_a_gap_of_the_published_points():
    points = statistics.published()["datasets"]
    assert len(points) == 14 and all(tuple(point["hedges_g"]) == METRICS for point in points.values())
    assert min(abs(point["mixing_ratio"] - statistics.MIXES_ABOVE) for point in points.values()) > 0.02
    regimes = {
        name: statistics.regime(point["mixing_ratio"], statistics.mean_hedges_g(point["hedges_g"].values()))
        for name, point in points.items()
    }
    assert regimes["Beauty"] == regimes["LastFM"] == "preserving"
    assert regimes["ML-1M"] == regimes["ML-20M"] == "mixing_with_reliance"
    assert regimes["Yelp"] == regimes["BeerAdvocate"] == "mixing_without_reliance"


def test_a_comparison_is_json_without_nan(rng):
    for n in (1, 3):
        found = statistics.compare(rng.random((n, 50)), rng.random((n, 50)))
        json.dumps(found, allow_nan=False)
        assert (found["p"] is None) == (found["interval"] is None) == (n == 1)
    same = rng.random((3, 50))
    assert statistics.compare(same, same)["interval"] == [0, 0]


def test_a_comparison_with_nothing_has_no_relative_difference(rng):
    found = statistics.compare(np.full((2, 50), 0.2), np.zeros((2, 50)))
    assert found["difference"] == pytest.approx(0.2) and found["relative"] is None
    assert statistics.compare(np.full((2, 50), 0.2), np.full((2, 50), 0.5))["relative"] == pytest.approx(-0.6)


def test_the_numbers_of_a_comparison_are_those_of_their_names(rng):
    a, b = rng.random((4, 60)) + 0.2, rng.random((4, 60))
    found = statistics.compare(a, b)
    assert found["difference"] == pytest.approx(a.mean() - b.mean())
    assert found["hedges_g"] == statistics.hedges_g(a.mean(axis=1), b.mean(axis=1))
    assert found["hedges_g_interval"] == statistics.hedges_g_interval(found["hedges_g"], 4)
    assert found["interval_seeds"] == statistics.mean_interval((a - b).mean(axis=1))
    assert found["interval_users"] == statistics.bootstrap((a - b).mean(axis=0))
    half = statistics.half_width(statistics.squared_errors(a - b), 4, 60)
    assert found["interval"] == pytest.approx([found["difference"] - half, found["difference"] + half])
