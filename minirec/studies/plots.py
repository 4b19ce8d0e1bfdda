"""Pictures, with matplotlib (extra `study`), which is not imported before a picture is asked for.

`heatmaps`, `rq3_plane` and the others that draw return a matplotlib figure. `write` or its own savefig writes it; a
notebook shows it after `%matplotlib inline`. They raise ImportError where matplotlib is missing. Figures are to be read
in grey and at the width of a column: arms and logs differ by marker and line, not by colour alone.
"""

import contextlib
import os
import sys
import warnings
from pathlib import Path

import numpy as np

from minirec.attention import known_weightings
from minirec.data import planted
from minirec.decompose import RATIOS, TINY
from minirec.files import replace
from minirec.studies.statistics import JUDGED_BY, MIXES_ABOVE, hedges_g_interval, published

LINES = ("-", "--", ":", "-.")  # of the weightings, in turn; those after the first one are grey
RATIO_STYLES = dict(
    zip(RATIOS, (("Attn", ":", "0.3", 1.4), ("AttnRes", "--", "0.0", 1.4), ("AttnResLN", "-", "0.7", 3)), strict=True)
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


def new_figure(rows, columns, width, height, **options):
    """Return a figure and its axes [rows, columns], without a window or a display; sizes in inches.

    Raises ImportError where matplotlib is missing.
    """
    import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot, which would load the user's backend
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def write(figure, path):
    """Write a figure to a path, in the format that its suffix names: png, pdf, svg."""
    import matplotlib

    path = Path(path)
    with warnings.catch_warnings(), matplotlib.rc_context({"pdf.fonttype": 42}):  # fonts that journals take
        warnings.simplefilter("ignore", UserWarning)  # a name in a script that the font lacks
        replace(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=150))


def study_figures(results, everything=None):
    """Return {name: figure} of a study: rq3, and LOG-heatmaps, LOG-ratios, LOG-curves of each log.

    results: {log: as from results.describe_dataset}; everything: the same with more logs, which rq3 shows too.
    """
    figures = {"rq3": rq3_plane(everything or results)}
    for name, result in results.items():
        title = f"{name}: the most recent positions, softmax, mean over seeds"
        figures[f"{name}-heatmaps"] = draw_heatmaps(result["pictures"], title)
        figures[f"{name}-ratios"] = ratio_distributions(name, result["pictures"])
        figures[f"{name}-curves"] = learning_curves(name, result["curves"])
    return figures


def with_nulls(values):
    """Return an array as nested lists, None where it is NaN."""
    return np.where(np.isnan(values), None, values).tolist()


def relative_maps(blocks, lengths):
    """Return blocks of a decomposition with heatmaps that can be compared from cell to cell.

    blocks: a list of dicts with {"attention", "contribution": [n, n]}, as from decompose.decompose or analysis.json;
    lengths [B]: of the sequences whose mean they are. A plain mean misleads: near the left edge only long sequences
    count, whose weights are smaller, so even exactly uniform weights would show a bright diagonal. So both maps are
    divided by what uniform weights would show: attention is then 1 for uniform ones. A contribution is further divided
    by the mean of its row, without the query's own, which would hide the others. None where there is nothing.
    """
    n = len(blocks[0]["attention"])
    back, uniform = np.arange(n)[::-1], np.full((n, n), np.nan)
    for j in range(n):
        reach = lengths[lengths > back[j]]  # of the sequences that count in column j
        if len(reach):
            uniform[j:, j] = (1 / (reach[:, None] - back[j:])).mean(axis=0)
    others = np.tri(n, k=-1, dtype=bool)
    relative = []
    for block in blocks:
        attention, contribution = (np.array(block[name], float) for name in ("attention", "contribution"))
        mixed = np.where(others, contribution / uniform, np.nan)
        row_means = np.nansum(mixed, axis=1) / np.maximum(np.isfinite(mixed).sum(axis=1), 1)
        shares = mixed / np.maximum(row_means, TINY)[:, None]
        relative.append(block | {"attention": with_nulls(attention / uniform), "contribution": with_nulls(shares)})
    return relative


def heatmaps(result):
    """Return a figure of relative attention beside relative contributions, a row a block, at the latest positions.

    result: as from decompose.decompose. Queries run down, keys across, both counted back from the latest, 0.
    """
    return draw_heatmaps(relative_maps(result["blocks"], result["positions"][result["latest"]] + 1))


def draw_heatmaps(blocks, title=None):
    """Return the figure of heatmaps; blocks: as from relative_maps."""
    figure, axes = new_figure(len(blocks), 2, 7.4, 3.2 * len(blocks))
    titles = {"attention": "attention weight (1: as uniform)"}
    titles |= {"contribution": "contribution of the others\n(1: the mean of the row)"}
    figure.suptitle(title, fontsize=10)
    for i, block in enumerate(blocks):
        for axis, (name, text) in zip(axes[i], titles.items(), strict=True):
            n = len(block[name])
            edges, values = np.arange(-n + 0.5, 1), np.ma.masked_invalid(np.array(block[name], float))
            image = axis.pcolormesh(edges, edges, values, cmap="cividis", vmin=0, vmax=max(2, values.max()))
            axis.invert_yaxis()
            axis.set(aspect="equal", xlabel="key position (0 = latest)", ylabel="query position")
            axis.set_title(f"block {i}: {text}", fontsize=9)
            figure.colorbar(image, ax=axis, shrink=0.8)
    return figure


def rq3_plane(results):
    """Return the figure of how much a model mixes against what learned weighting gains.

    results: {log: {"mixing_ratio", "mean_hedges_g", and, where known, "mixing_ratio_interval", "seeds", "confident"}}.
    Beside them stand the published points. Bars are 95 % intervals over seeds: of the ratio Student's, of g that of one
    metric. A point is filled where its regime is confident. A log without an effect size stands on the lower edge.
    """
    points = published()["datasets"]
    heights = [p["mean_hedges_g"] for p in (*points.values(), *results.values()) if p["mean_hedges_g"] is not None]
    # Published effect sizes lie within 3; planted ones reach 100. Linear to 1, logarithmic beyond.
    right = max(0.5, *(1.15 * r["mixing_ratio"] for r in results.values()), 0)
    low, high = min(-4.0, 3 * min(heights)), max(5.0, 3 * max(heights))
    figure, ((axis,),) = new_figure(1, 1, 7.4, 5.4)
    axis.axvspan(0, MIXES_ABOVE, color="0.95", zorder=0)
    axis.fill_between([MIXES_ABOVE, right], 0, high, color="0.89", zorder=0)
    axis.axhline(0, color="0.4", linewidth=0.8)
    regions = {"preserving": (0, high), "mixing with reliance": (MIXES_ABOVE, high)}
    for text, (x, y) in (regions | {"mixing without reliance": (MIXES_ABOVE, low)}).items():
        axis.text(x + 0.005, y / 1.05, text, fontsize=8, style="italic", va="top" if y > 0 else "bottom")
    axis.set_yscale("symlog", linthresh=1)
    axis.set(xlim=(0, right), ylim=(low, high), xlabel="mixing ratio (mean AttnResLN, softmax models)")
    axis.set_ylabel("mean Hedges' g, softmax over uniform\n(logarithmic beyond ±1)")
    axis.set_yticks([y for y in (-100, -30, -10, -3, -1, 0, 1, 3, 10, 30, 100) if low <= y <= high])
    axis.set_yticks([], minor=True)
    axis.yaxis.set_major_formatter("{x:g}")
    names = []
    labels = {"o": "published (Kozaki et al. 2026)", "s": "made-up logs", "D": "this study (filled: confident)"}
    for group, grey, weight in ((points, "0.75", "normal"), (results, "0", "bold")):
        for name, r in group.items():
            x, g, n = r["mixing_ratio"], r["mean_hedges_g"], len(r.get("seeds", ()))
            y, style = low if g is None else g, {"color": grey, "linewidth": 0.8, "zorder": 2}
            axis.plot([x] * 2, hedges_g_interval(y, n) if g is not None and n > 1 else [y, y], **style)
            axis.plot(r.get("mixing_ratio_interval") or [x, x], [y, y], **style)
            names.append((name if g is not None else f"{name} (no g)", (x, y), weight))
            marker = "o" if group is points else "s" if name in planted.DATASETS else "D"
            style = {"facecolor": "black" if r.get("confident") else "white", "edgecolor": "black", "zorder": 3}
            axis.scatter(x, y, s=26, marker=marker, label=labels.pop(marker, None), clip_on=False, **style)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3, frameon=False)
    place_names(figure, axis, names[::-1])  # ours first
    return figure


def place_names(figure, axis, names):
    """Write names [(text, (x, y), weight)] beside their points, where they cover least of other names and points."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # the layout must be known
    points = axis.transData.transform([point for _, point, _ in names])
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    offsets = [(dx, dy) for dy in (4, -8, 14, -18, 24, -28, 34) for dx in (5, -5)]

    def area(one, other):
        both = Bbox.intersection(one, other)
        return both.width * both.height if both else 0

    for name, point, weight in names:
        text, tries = axis.annotate(name, point, (0, 0), textcoords="offset points", fontsize=7, weight=weight), []
        for dx, dy in offsets:
            text.set(position=(dx, dy), ha="left" if dx > 0 else "right")
            box = text.get_window_extent()
            outside = box.width * box.height - area(box, axis.bbox)
            tries.append((outside + sum(area(box, other) for other in taken), dx, dy, box))
        _, dx, dy, box = min(tries, key=lambda one: one[0])
        text.set(position=(dx, dy), ha="left" if dx > 0 else "right")
        taken.append(box)


def ratio_distributions(name, blocks):
    """Return the figure of the distributions of the three mixing ratios over all positions, a panel a block.

    blocks: a list of {ratio: counts in equal bins over [0, 1]}. A line stands where mixing begins.
    """
    figure, axes = new_figure(1, len(blocks), 3.1 * len(blocks), 2.8, sharey=True)
    for i, (block, axis) in enumerate(zip(blocks, axes[0], strict=True)):
        for key, (label, line, grey, width) in reversed(RATIO_STYLES.items()):  # the widest line lies below
            counts = np.array(block[key], float)
            style = {"linestyle": line, "color": grey, "linewidth": width, "label": label}
            axis.stairs(100 * counts / counts.sum(), np.linspace(0, 1, len(counts) + 1), **style)
        axis.axvline(MIXES_ABOVE, color="0.4", linewidth=0.8, linestyle=(0, (1, 2)))
        axis.set(xlim=(0, 1), xlabel="mixing ratio", ylabel="" if i else "% of positions")
        axis.set_title(f"{name}, block {i}", fontsize=9)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=3, frameon=False, handlelength=3)
    return figure


def learning_curves(name, curves):
    """Return the figure of the validation metric of each epoch, a line a run, the kept epoch marked.

    curves: {attn: [values, a list a seed]}.
    """
    figure, ((axis,),) = new_figure(1, 1, 4.6, 3)
    for attn, runs in curves.items():
        number = known_weightings().index(attn)
        line, grey = LINES[number % len(LINES)], "0.35" if number else "0.0"
        for seed, values in enumerate(runs):
            kept, label = int(np.argmax(values)), None if seed else attn
            axis.plot(range(1, len(values) + 1), values, line, color=grey, linewidth=1, label=label)
            axis.plot(kept + 1, values[kept], "o", color=grey, markersize=3.5)
    axis.plot([], [], "o", color="0.35", markersize=3.5, label="kept")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(xlabel="epoch", ylabel=f"validation {JUDGED_BY}", ylim=(0, None))
    axis.set_title(name, fontsize=9)
    axis.legend(fontsize=8, handlelength=3)
    return figure
