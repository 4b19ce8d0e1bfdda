"""Pictures, with matplotlib (extra `study`); nothing here is imported unless a picture is asked for.

They are to be read in grey and at the width of a column: arms and datasets differ by marker and line,
not by colour alone.
"""

import contextlib
import os
import sys
import warnings

import numpy as np

from minirec.attention import known_weightings
from minirec.decompose import RATIOS
from minirec.files import replace
from minirec.studies.statistics import JUDGED_BY, MIXES_ABOVE, mean_g, published

LINES = ("-", "--", ":", "-.")  # of the weightings, in turn; those after the first one are grey
RATIO_STYLES = dict(
    zip(RATIOS, (("Attn", ":", "0.5"), ("AttnRes", "--", "0.35"), ("AttnResLN", "-", "0.0")), strict=True)
)


def import_matplotlib():
    """Import matplotlib, whatever backend the environment asks for. Raises ImportError where matplotlib is missing.

    The import reads MPLBACKEND, and fails where that names a backend that is not installed here: a shell in a notebook
    inherits such a name. Our figures need no backend, so the variable is hidden while matplotlib is imported. Code that
    draws beside ours in the same process still gets the backend that it asked for.
    """
    if "matplotlib" in sys.modules or "MPLBACKEND" not in os.environ:
        import matplotlib  # noqa: F401

        return
    asked_for = os.environ.pop("MPLBACKEND")
    try:
        import matplotlib

        with contextlib.suppress(ValueError):  # not installed here
            matplotlib.rcParams["backend"] = asked_for
    finally:
        os.environ["MPLBACKEND"] = asked_for


def new_figure(rows, columns, width, height):
    """Return a figure and its axes [rows, columns], without a window or a display; sizes in inches.

    Raises ImportError where matplotlib is missing.
    """
    import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot, which would load the user's backend
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure, path):
    """Write a figure as PNG."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a name in a script that the font lacks
        replace(path, lambda file: figure.savefig(file, format="png", dpi=150))


def heatmaps(result, path):
    """Draw attention weights beside contribution norms, a row a block, over the most recent positions.

    result: as from decompose.decompose; path: the PNG. Query positions run down, key positions
    across, both counted back from the latest, which is 0.
    """
    draw_heatmaps(result["blocks"], path)


def draw_heatmaps(blocks, path, title=None):
    """Draw what heatmaps does; blocks: a list of {"attention", "contribution": [n, n], NaN where there is nothing}."""
    figure, axes = new_figure(len(blocks), 2, 7, 3.2 * len(blocks))
    titles = {"attention": "attention weight (mean of heads)", "contribution": "contribution norm (AttnResLN)"}
    figure.suptitle(title, fontsize=10)
    for i, block in enumerate(blocks):
        for axis, (name, text) in zip(axes[i], titles.items(), strict=True):
            n = len(block[name])
            edges = np.arange(-n + 0.5, 1)
            image = axis.pcolormesh(edges, edges, np.ma.masked_invalid(block[name]), cmap="cividis", vmin=0)
            axis.invert_yaxis()
            axis.set(
                aspect="equal", title=f"block {i}: {text}", xlabel="key position (0 = latest)", ylabel="query position"
            )
            axis.title.set_fontsize(9)
            figure.colorbar(image, ax=axis, shrink=0.8)
    save(figure, path)


def study_pictures(results, everything, curves, folder):
    """Draw all pictures of a study into a folder; return their paths.

    results: {dataset: as from grid.describe_dataset}; everything: the same, with the datasets that were studied
    in this folder before; curves: as from grid.learning_curves.
    """
    paths = [folder / "rq3.png"]
    rq3_plane(everything, paths[0])
    for name, result in results.items():
        blocks = [
            {key: np.array(block[key], float) for key in ("attention", "contribution")} for block in result["pictures"]
        ]
        paths += [folder / f"{name}-{picture}.png" for picture in ("heatmaps", "ratios", "curves")]
        draw_heatmaps(blocks, paths[-3], f"{name}: the most recent positions, softmax, mean over seeds")
        ratio_distributions(name, result["pictures"], paths[-2])
        learning_curves(name, curves[name], paths[-1])
    return paths


def rq3_plane(results, path):
    """Draw how much a model mixes against what learned weighting gains: our datasets, the published ones, regimes."""
    points = {  # name -> ratio, g
        name: (point["mixing_ratio"], mean_g(point["hedges_g"].values()))
        for name, point in published()["datasets"].items()
    }
    own = {name: (r["mixing_ratio"], r["mean_g"]) for name, r in results.items() if r["mean_g"] is not None}
    left, right = 0, max(0.5, *(1.15 * x for x, _ in own.values())) if own else 0.5
    # Published effect sizes lie within 3; planted ones reach 100. Linear to 1, logarithmic beyond.
    heights = [g for _, g in (*points.values(), *own.values())]
    low, high = min(-3.0, 2 * min(heights)), max(4.0, 2 * max(heights))
    figure, ((axis,),) = new_figure(1, 1, 6.2, 4.6)
    axis.axvspan(left, MIXES_ABOVE, color="0.93", zorder=0)
    axis.fill_between([MIXES_ABOVE, right], 0, high, color="0.86", zorder=0)
    axis.axhline(0, color="0.4", linewidth=0.8)
    for x, y, text in (
        (left + 0.005, high, "preserving"),
        (MIXES_ABOVE + 0.005, high, "mixing with reliance"),
        (MIXES_ABOVE + 0.005, low, "mixing without reliance"),
    ):
        axis.text(x, y / 1.05, text, fontsize=8, style="italic", va="top" if y > 0 else "bottom")
    for group, marker, face, weight, label in (
        (points, "o", "white", "normal", "published (Kozaki et al. 2026)"),
        (own, "D", "black", "bold", "this study"),
    ):
        if group:
            style = {"marker": marker, "facecolor": face, "edgecolor": "black", "s": 26, "zorder": 3}
            axis.scatter(*zip(*group.values(), strict=True), label=label, **style)
        for name, point in group.items():
            side = -1 if group is own and point[0] > right / 5 else 1  # away from the published ones' names
            place = {
                "xytext": (4 * side, 3 * side),
                "textcoords": "offset points",
                "ha": "right" if side < 0 else "left",
            }
            axis.annotate(name, point, fontsize=7, weight=weight, **place)
    axis.set_yscale("symlog", linthresh=1)
    axis.set(
        xlim=(left, right),
        ylim=(low, high),
        xlabel="mixing ratio (mean AttnResLN, softmax models)",
        ylabel="mean Hedges' g, softmax over uniform\n(logarithmic beyond ±1)",
    )
    axis.set_yticks([y for y in (-10, -3, -1, 0, 1, 3, 10, 30, 100) if low <= y <= high])
    axis.set_yticks([], minor=True)
    axis.yaxis.set_major_formatter("{x:g}")
    figure.legend(fontsize=8, loc="outside lower center", ncols=2, frameon=False)
    save(figure, path)


def ratio_distributions(name, blocks, path):
    """Draw the distributions of the three mixing ratios over all positions, a panel a block.

    blocks: a list of {ratio: counts in equal bins over [0, 1]}.
    """
    figure, axes = new_figure(1, len(blocks), 3.1 * len(blocks), 2.6)
    for i, (block, axis) in enumerate(zip(blocks, axes[0], strict=True)):
        for key, (label, line, grey) in RATIO_STYLES.items():
            counts = np.array(block[key], float)
            edges = np.linspace(0, 1, len(counts) + 1)
            share = 100 * counts / counts.sum()
            axis.stairs(share, edges, linestyle=line, color=grey, label=label, linewidth=1.3)
        axis.set(xlim=(0, 1), title=f"{name}, block {i}", xlabel="mixing ratio", ylabel="% of positions")
        axis.title.set_fontsize(9)
    axes[0][-1].legend(fontsize=8)
    save(figure, path)


def learning_curves(name, curves, path):
    """Draw the validation metric of each epoch, a line a run; curves: {attn: [values, a list a seed]}."""
    figure, ((axis,),) = new_figure(1, 1, 4.2, 2.8)
    for attn, found in curves.items():
        place = known_weightings().index(attn)
        line, grey = LINES[place % len(LINES)], "0.35" if place else "0.0"
        for seed, values in enumerate(found):
            marker = "." if len(values) == 1 else ""
            label = None if seed else attn
            axis.plot(range(1, len(values) + 1), values, line, marker=marker, color=grey, linewidth=1, label=label)
    axis.set(title=name, xlabel="epoch", ylabel=f"validation {JUDGED_BY}", ylim=(0, None))
    axis.title.set_fontsize(9)
    axis.legend(fontsize=8)
    save(figure, path)
