"""What the pictures show: the numbers that they were given, under the names that belong to them."""

import numpy as np
import pytest

from minirec.decompose import RATIOS, decompose
from minirec.parameters import Config, init_parameters
from minirec.studies import statistics

pytest.importorskip("matplotlib", reason="pictures need matplotlib")

from minirec.studies import plots  # noqa: E402


@pytest.fixture
def results(rng):
    """The results of two logs, as far as pictures show them; all numbers differ."""

    def block():
        counts = {name: rng.integers(1, 100, 50).tolist() for name in RATIOS}
        maps = {name: rng.random((3, 3)) for name in ("attention", "contribution")}
        for values in maps.values():
            values[np.triu_indices(3, 1)] = np.nan
        return counts | {name: plots.with_nulls(v) for name, v in maps.items()}

    numbers = {
        "a": {"mixing_ratio": 0.1, "mean_hedges_g": 1.5, "mixing_ratio_interval": [0.05, 0.15], "seeds": [0, 1, 2]},
        "b": {"mixing_ratio": 0.4, "mean_hedges_g": -0.5, "mixing_ratio_interval": [0.3, 0.5], "seeds": [0, 1, 2]},
    }
    curves = {name: {attn: rng.random((2, 4)).tolist() for attn in ("softmax", "uniform")} for name in "ab"}
    pictures = {name: [block(), block()] for name in "ab"}
    return {name: numbers[name] | {"pictures": pictures[name], "curves": curves[name]} for name in "ab"}


def test_every_picture_is_drawn_under_its_name_and_written_by_its_suffix(results, tmp_path):
    figures = plots.study_figures(results)
    kinds = ("heatmaps", "ratios", "curves")
    assert list(figures) == ["rq3", *(f"{name}-{kind}" for name in "ab" for kind in kinds)]
    for suffix, begins in (("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")):
        plots.write(figures["a-curves"], tmp_path / f"a.{suffix}")
        assert (tmp_path / f"a.{suffix}").read_bytes().startswith(begins)


def test_exactly_uniform_weights_are_one_everywhere_however_long_the_sequences_are(rng):
    lengths, n = rng.integers(1, 9, 50), 5  # some shorter than the map, as in decompose.decompose
    sums, counts = np.zeros((2, n, n)), np.zeros((n, n))
    scale = rng.random(n)  # of the keys: what one contributes beyond its weight
    for length in lengths:
        for i in range(min(n, length)):
            for j in range(i, min(n, length)):  # both counted back from the latest
                at = n - 1 - i, n - 1 - j
                sums[:, *at] += np.array([1, 99 if i == j else scale[n - 1 - j]]) / (length - i)
                counts[at] += 1
    attention, contribution = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    ((block),) = plots.relative_maps([{"attention": attention, "contribution": contribution, "attn": 3}], lengths)
    assert block["attn"] == 3
    found = {name: np.array(block[name], float) for name in ("attention", "contribution")}
    reached = np.tri(n, dtype=bool)
    np.testing.assert_allclose(found["attention"][reached], 1)
    assert np.isnan(found["attention"][~reached]).all() and np.isnan(np.diag(found["contribution"])).all()
    for i in range(1, n):  # the query's own, 99, hides nothing
        np.testing.assert_allclose(found["contribution"][i, :i], scale[:i] / scale[:i].mean())


def test_heatmaps_of_a_decomposition_are_relative_to_its_lengths(rng):
    parameters = init_parameters(Config(20, max_length=6, hidden_size=8, attn="uniform"), 0)
    config = Config(20, max_length=6, hidden_size=8, attn="uniform")
    result = decompose(parameters, config, [rng.integers(20, size=n) for n in (2, 5, 9)])
    axes = [axis for axis in plots.heatmaps(result).axes if "attention" in axis.get_title()]
    for axis in axes:
        (mesh,) = axis.collections
        np.testing.assert_allclose(mesh.get_array().compressed(), 1, rtol=1e-5)


def test_heatmaps_show_weights_beside_contributions_with_the_latest_position_at_the_lower_right(results):
    figures = plots.study_figures(results)
    for name, result in results.items():
        axes = [axis for axis in figures[f"{name}-heatmaps"].axes if axis.get_title()]  # the others are colour bars
        wanted = [(i, key) for i in (0, 1) for key in ("attention", "contribution")]
        for axis, (i, key) in zip(axes, wanted, strict=True):
            assert axis.get_title().startswith(f"block {i}: {key} ")
            (mesh,) = axis.collections
            expected = np.array(result["pictures"][i][key], float)
            np.testing.assert_array_equal(np.ma.filled(mesh.get_array(), np.nan), expected)  # rows: queries
            corners = mesh.get_coordinates()  # of the cells: [4, 4, (key, query)]
            assert corners[0, 0].tolist() == [-2.5, -2.5] and corners[-1, -1].tolist() == [0.5, 0.5]
            assert "key" in axis.get_xlabel() and "query" in axis.get_ylabel() and axis.yaxis_inverted()


def test_distributions_are_shares_under_the_name_of_their_ratio_with_the_line_where_mixing_begins(results):
    for name, result in results.items():
        figure = plots.ratio_distributions(name, result["pictures"])
        assert len({axis.get_ylim() for axis in figure.axes}) == 1
        for i, (axis, block) in enumerate(zip(figure.axes, result["pictures"], strict=True)):
            assert f"{name}, block {i}" in axis.get_title()
            assert [list(line.get_xdata()) for line in axis.lines] == [[statistics.MIXES_ABOVE] * 2]
            shown = {stairs.get_label(): stairs.get_data() for stairs in axis.patches}
            labels = {"Attn": "attn", "AttnRes": "attn_res", "AttnResLN": "attn_res_ln"}
            assert shown.keys() == labels.keys()
            for label, key in labels.items():
                counts = np.array(block[key])
                np.testing.assert_allclose(shown[label].values, 100 * counts / counts.sum())
                np.testing.assert_allclose(shown[label].edges, np.linspace(0, 1, 51))


def test_learning_curves_are_those_of_their_weighting_with_the_kept_epoch_marked(results):
    for name, result in results.items():
        (axis,) = plots.learning_curves(name, result["curves"]).axes
        lines = [line for line in axis.lines if line.get_linestyle() != "None"]
        styles = {line.get_label(): line.get_linestyle() for line in lines if line.get_label()[0] != "_"}
        assert styles.keys() == result["curves"].keys() and len(set(styles.values())) == len(styles)
        for attn, style in styles.items():
            of_attn = [line for line in lines if line.get_linestyle() == style]
            assert [line.get_ydata().tolist() for line in of_attn] == result["curves"][attn]
            assert all(list(line.get_xdata()) == [1, 2, 3, 4] for line in of_attn)
        marks = [(*line.get_xdata(), *line.get_ydata()) for line in axis.lines if line.get_marker() == "o"]
        values = sum(result["curves"].values(), [])
        assert marks == [*((1 + int(np.argmax(v)), max(v)) for v in values), ()]  # the last one is the legend's
        assert all(tick == int(tick) for tick in axis.get_xticks())


def test_the_plane_tells_made_up_logs_and_sure_verdicts_from_the_others():
    logs = {"chain": True, "taste": False, "mine": True, "yours": False}
    results = {
        name: {"mixing_ratio": 0.1 + i / 100, "mean_hedges_g": 1.0, "confident": confident}
        for i, (name, confident) in enumerate(logs.items())
    }
    figure = plots.rq3_plane(results)
    points = [c for c in figure.axes[0].collections if type(c).__name__ == "PathCollection"]
    shown = points[-len(logs) :]  # the published ones come first
    np.testing.assert_allclose([c.get_offsets()[0][0] for c in shown], [r["mixing_ratio"] for r in results.values()])
    assert [bool(point.get_facecolor()[0][:3].sum()) for point in shown] == [False, True, False, True]  # black or white
    corners = [tuple(map(tuple, point.get_paths()[0].vertices.round(3))) for point in shown]
    assert corners[0] == corners[1] != corners[2] == corners[3]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["published (Kozaki et al. 2026)", "made-up logs", "this study (filled: confident)"]


def test_the_plane_holds_every_log_at_its_ratio_and_effect_size_with_their_intervals(results):
    everything = results | {"earlier": {"mixing_ratio": 0.6, "mean_hedges_g": 9.5}}  # studied in this folder before
    everything |= {"alone": {"mixing_ratio": 0.3, "mean_hedges_g": None}}  # one seed has no effect size
    (axis,) = plots.rq3_plane(everything).axes
    (low, high), (left, right) = axis.get_ylim(), axis.get_xlim()
    expected = {name: (result["mixing_ratio"], result["mean_hedges_g"]) for name, result in everything.items()}
    expected["alone"] = 0.3, low  # on the lower edge
    expected |= {
        name: (point["mixing_ratio"], np.mean(list(point["hedges_g"].values())))
        for name, point in statistics.published()["datasets"].items()
    }
    named = {text.get_text().removesuffix(" (no g)"): text.xy for text in axis.texts if hasattr(text, "xy")}
    assert named == expected and any(text.get_text() == "alone (no g)" for text in axis.texts)
    points = [group for group in axis.collections if type(group).__name__ == "PathCollection"]
    places = [tuple(map(float, group.get_offsets()[0])) for group in points]
    np.testing.assert_allclose(sorted(places), sorted(expected.values()))
    assert all(left <= x <= right and low <= y <= high for x, y in expected.values())
    bars = [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines]
    for name in "ab":
        x, g = expected[name]
        assert ([x, x], statistics.hedges_g_interval(g, 3)) in bars
        assert (results[name]["mixing_ratio_interval"], [g, g]) in bars


def test_names_in_the_plane_do_not_overlap():
    close = {f"log {i}": {"mixing_ratio": 0.3 + i / 1000, "mean_hedges_g": 1.0 + i / 100} for i in range(4)}
    figure = plots.rq3_plane(close)
    figure.draw_without_rendering()
    (axis,) = figure.axes
    boxes = [text.get_window_extent() for text in axis.texts if hasattr(text, "xy")]
    assert len(boxes) == 18
    assert not [1 for i, box in enumerate(boxes) for other in boxes[:i] if box.overlaps(other)]
