"""What the pictures show: the numbers that they were given, under the names that belong to them."""

import numpy as np
import pytest

from minirec.decompose import RATIOS
from minirec.studies import statistics

pytest.importorskip("matplotlib", reason="pictures need matplotlib")

from minirec.studies import plots  # noqa: E402


@pytest.fixture
def drawn(monkeypatch):
    """{file name: figure} of all figures that are saved."""
    saved = {}
    monkeypatch.setattr(plots, "save", lambda figure, path: saved.update({path.name: figure}))
    return saved


@pytest.fixture
def results(rng):
    """The results of two logs, as far as pictures show them; all numbers differ."""

    def block():
        counts = {name: rng.integers(1, 100, 50).tolist() for name in RATIOS}
        maps = {name: rng.random((3, 3)) for name in ("attention", "contribution")}
        for values in maps.values():
            values[np.triu_indices(3, 1)] = np.nan
        return counts | {name: np.where(np.isnan(v), None, v).tolist() for name, v in maps.items()}

    numbers = {"a": {"mixing_ratio": 0.1, "mean_g": 1.5}, "b": {"mixing_ratio": 0.4, "mean_g": -0.5}}
    return {name: values | {"pictures": [block(), block()]} for name, values in numbers.items()}


@pytest.fixture
def curves(rng):
    return {name: {attn: rng.random((2, 4)).tolist() for attn in ("softmax", "uniform")} for name in ("a", "b")}


def test_every_picture_is_drawn_under_its_name(drawn, results, curves, tmp_path):
    paths = plots.study_pictures(results, results, curves, tmp_path)
    kinds = ("heatmaps", "ratios", "curves")
    assert [path.name for path in paths] == ["rq3.png", *(f"{name}-{kind}.png" for name in "ab" for kind in kinds)]
    assert list(drawn) == [path.name for path in paths]


def test_heatmaps_show_weights_beside_contributions_with_the_latest_position_at_the_lower_right(
    drawn, results, curves, tmp_path
):
    plots.study_pictures(results, results, curves, tmp_path)
    for name, result in results.items():
        axes = [axis for axis in drawn[f"{name}-heatmaps.png"].axes if axis.get_title()]  # the others are colour bars
        wanted = [(i, key) for i in (0, 1) for key in ("attention", "contribution")]
        for axis, (i, key) in zip(axes, wanted, strict=True):
            assert axis.get_title().startswith(f"block {i}: {key} ")
            (mesh,) = axis.collections
            expected = np.array(result["pictures"][i][key], float)
            np.testing.assert_array_equal(np.ma.filled(mesh.get_array(), np.nan), expected)  # rows: queries
            corners = mesh.get_coordinates()  # of the cells: [4, 4, (key, query)]
            assert corners[0, 0].tolist() == [-2.5, -2.5] and corners[-1, -1].tolist() == [0.5, 0.5]
            assert "key" in axis.get_xlabel() and "query" in axis.get_ylabel() and axis.yaxis_inverted()


def test_distributions_are_shares_under_the_name_of_their_ratio(drawn, results, curves, tmp_path):
    plots.study_pictures(results, results, curves, tmp_path)
    for name, result in results.items():
        axes = drawn[f"{name}-ratios.png"].axes
        for i, (axis, block) in enumerate(zip(axes, result["pictures"], strict=True)):
            assert f"{name}, block {i}" in axis.get_title()
            found = {stairs.get_label(): stairs.get_data() for stairs in axis.patches}
            labels = {"Attn": "attn", "AttnRes": "attn_res", "AttnResLN": "attn_res_ln"}
            assert found.keys() == labels.keys()
            for label, key in labels.items():
                counts = np.array(block[key])
                np.testing.assert_allclose(found[label].values, 100 * counts / counts.sum())
                np.testing.assert_allclose(found[label].edges, np.linspace(0, 1, 51))


def test_learning_curves_are_those_of_their_weighting_from_the_first_epoch_on(drawn, results, curves, tmp_path):
    plots.study_pictures(results, results, curves, tmp_path)
    for name in results:
        (axis,) = drawn[f"{name}-curves.png"].axes
        styles = {line.get_label(): line.get_linestyle() for line in axis.lines if line.get_label()[0] != "_"}
        assert styles.keys() == curves[name].keys() and len(set(styles.values())) == len(styles)
        for attn, style in styles.items():
            lines = [line for line in axis.lines if line.get_linestyle() == style]
            assert [line.get_ydata().tolist() for line in lines] == curves[name][attn]
            assert all(list(line.get_xdata()) == [1, 2, 3, 4] for line in lines)


def test_the_plane_holds_every_log_at_its_ratio_and_effect_size(drawn, results, curves, tmp_path):
    everything = results | {"earlier": {"mixing_ratio": 0.6, "mean_g": 9.5}}  # studied in this folder before
    everything |= {"alone": {"mixing_ratio": 0.3, "mean_g": None}}  # one seed has no effect size
    plots.study_pictures(results, everything, curves, tmp_path)
    (axis,) = drawn["rq3.png"].axes
    expected = {name: (result["mixing_ratio"], result["mean_g"]) for name, result in everything.items()}
    del expected["alone"]
    expected |= {
        name: (point["mixing_ratio"], statistics.mean_g(point["hedges_g"].values()))
        for name, point in statistics.published()["datasets"].items()
    }
    named = {text.get_text(): text.xy for text in axis.texts if hasattr(text, "xy")}
    assert named == expected
    points = {
        group.get_label(): group.get_offsets().tolist() for group in axis.collections if group.get_label()[0] != "_"
    }
    assert points["this study"] == [list(expected[name]) for name in ("a", "b", "earlier")]
    np.testing.assert_allclose(sorted(sum(points.values(), [])), sorted(map(list, expected.values())))
    (low, high), (left, right) = axis.get_ylim(), axis.get_xlim()
    assert all(left <= x <= right and low <= y <= high for x, y in expected.values())
