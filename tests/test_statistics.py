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
    assert statistics.mean_g([0.5, None, 1.5]) == 1 and statistics.mean_g([None]) is None


def test_the_paired_t_test_is_scipys_and_its_interval_holds_t_standard_errors(rng):
    a, b = rng.normal(1, 0.1, 5), rng.normal(0.9, 0.1, 5)
    found = statistics.paired_t(a, b)
    expected = stats.ttest_rel(a, b)
    assert (found["t"], found["p"]) == pytest.approx((expected.statistic, expected.pvalue))
    d = a - b
    half = stats.t.ppf(0.975, 4) * d.std(ddof=1) / math.sqrt(5)
    assert found["interval"] == pytest.approx([d.mean() - half, d.mean() + half])


def test_the_paired_t_test_where_nothing_spreads():
    assert statistics.paired_t([0.5, 0.5], [0.5, 0.5]) == {"t": 0.0, "p": 1.0, "interval": [0.0, 0.0]}
    found = statistics.paired_t([0.5, 0.6], [0.25, 0.35])
    assert found["t"] is found["p"] is None and found["interval"] == pytest.approx([0.25, 0.25])
    assert statistics.paired_t([0.5], [0.4]) == {"t": None, "p": None, "interval": None}


def test_the_bootstrap_interval_is_about_two_standard_errors_wide(rng):
    values = rng.normal(1, 2, 400)
    low, high = statistics.bootstrap(values)
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
    assert statistics.bootstrap(values) == [low, high]


@pytest.mark.parametrize(
    "seeds, users, expected",
    [
        ([0.02, 0.04], [0.01, 0.05], "better"),
        ([-0.04, -0.02], [-0.05, 0.001], "no better"),
        ([-0.04, -0.02], [-0.05, 0.006], "unclear"),
        ([-0.04, -0.02], [-0.05, -0.001], "worse"),
        ([-0.004, 0.002], [-0.0049, 0.0049], "equal"),
        ([-0.004, 0.002], [-0.006, 0.004], "no better"),  # the users do not agree within 5 % of 0.1
        ([0.001, 0.002], [0.001, 0.003], "equal"),  # sure, and of no importance
        ([0, 0.04], [0.01, 0.05], "unclear"),  # zero is in it
        ([-0.04, 0], [-0.05, -0.001], "no better"),
        (None, [0.01, 0.05], "unclear"),
    ],
)
def test_a_judgement_needs_both_intervals(seeds, users, expected):
    assert statistics.judge({"interval_seeds": seeds, "interval_users": users}, 0.1) == expected


def test_a_judgement_of_nothing_is_unclear():
    assert statistics.judge({"interval_seeds": [0, 0], "interval_users": [0, 0]}, 0) == "unclear"


def doubts(name, judgement, ratios, n_users=100, model=0.2, baselines=(0.1, 0.05)):
    return statistics.doubts(name, judgement, ratios, n_users, model, baselines)


def test_regimes_and_their_doubts():
    assert statistics.regime(0.1, 3) == "preserving"
    assert statistics.regime(0.3, 0.1) == "mixing_with_reliance"
    assert statistics.regime(0.3, 0) == "mixing_without_reliance"
    low, high = [0.10, 0.11, 0.10], [0.40, 0.41, 0.42]
    assert not doubts("preserving", "equal", low)
    assert doubts("preserving", "better", low)  # it does not mix, and yet weighting matters
    assert doubts("preserving", "worse", low)
    assert doubts("preserving", "equal", low[:2])  # too few seeds
    assert doubts("preserving", "equal", [0.1, 0.3, 0.15])  # on either side of the threshold
    assert not doubts("mixing_with_reliance", "better", high)
    assert doubts("mixing_with_reliance", "unclear", high)
    assert not doubts("mixing_without_reliance", "worse", high)
    assert doubts("preserving", "equal", low, n_users=5) == ["fewer than 30 users to test on"]
    assert doubts("preserving", "equal", low, baselines=(0.3, 0.1)) == ["counting does better than the model"]
    alone = doubts("preserving", "unclear", low[:1])
    assert len(alone) == 3 and alone[0] == "fewer than 3 seeds" and "do not agree on a side of 0.2" in alone[1]
    for name, ratios, fits in (
        ("preserving", low, {"equal", "no better"}),
        ("mixing_without_reliance", high, {"equal", "no better", "worse"}),
        ("mixing_with_reliance", high, {"better"}),
    ):
        judgements = {"equal", "no better", "worse", "better", "unclear"}
        assert {judgement for judgement in judgements if not doubts(name, judgement, ratios)} == fits
    assert not doubts("preserving", "equal", low, n_users=30)
    assert not doubts("preserving", "equal", low, baselines=(0.205, 0.1))  # better by less than the margin


def test_the_threshold_lies_in_a_gap_of_the_published_points():
    points = statistics.published()["datasets"]
    assert len(points) == 14 and all(tuple(point["hedges_g"]) == METRICS for point in points.values())
    assert min(abs(point["mixing_ratio"] - statistics.MIXES_ABOVE) for point in points.values()) > 0.02
    regimes = {
        name: statistics.regime(point["mixing_ratio"], statistics.mean_g(point["hedges_g"].values()))
        for name, point in points.items()
    }
    assert regimes["Beauty"] == regimes["LastFM"] == "preserving"
    assert regimes["ML-1M"] == regimes["ML-20M"] == "mixing_with_reliance"
    assert regimes["Yelp"] == regimes["BeerAdvocate"] == "mixing_without_reliance"


def test_a_comparison_is_json_without_nan(rng):
    for n in (1, 3):
        found = statistics.compare(rng.random(n), rng.random(n), rng.normal(size=50))
        json.dumps(found, allow_nan=False)
        assert (found["p"] is None) == (n == 1)


def test_a_comparison_with_nothing_has_no_relative_difference():
    found = statistics.compare([0.1, 0.3], [0.0, 0.0], np.full(50, 0.2))
    assert found["difference"] == pytest.approx(0.2) and found["relative"] is None
    assert statistics.compare([0.1, 0.3], [0.4, 0.6], np.full(50, -0.3))["relative"] == pytest.approx(-0.6)
