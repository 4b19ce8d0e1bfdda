"""Pictures, with matplotlib (extra `study`); nothing here is imported unless a picture is asked for."""

import numpy as np

from minirec.runs import write


def new_figure(rows, columns, width, height):
    """Return a figure and its axes [rows, columns], without a window; sizes in inches.

    Raises ImportError where matplotlib is missing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure, path):
    """Write a figure as PNG."""
    write(path, lambda file: figure.savefig(file, format="png", dpi=150))


def heatmaps(result, path):
    """Draw attention weights beside contribution norms, a row a block, over the most recent positions.

    result: as from decompose.decompose; path: the PNG. Query positions run down, key positions
    across, both counted back from the latest, which is 0.
    """
    blocks = result["blocks"]
    figure, axes = new_figure(len(blocks), 2, 7, 3.2 * len(blocks))
    titles = {"attention": "attention weight (mean of heads)", "contribution": "contribution norm (AttnResLN)"}
    for i, block in enumerate(blocks):
        for axis, (name, title) in zip(axes[i], titles.items()):
            n = len(block[name])
            edges = np.arange(-n + 0.5, 1)
            image = axis.pcolormesh(edges, edges, np.ma.masked_invalid(block[name]), cmap="cividis", vmin=0)
            axis.invert_yaxis()
            axis.set(
                aspect="equal", title=f"block {i}: {title}", xlabel="key position (0 = latest)", ylabel="query position"
            )
            axis.title.set_fontsize(9)
            figure.colorbar(image, ax=axis, shrink=0.8)
    save(figure, path)
