"""minirec: SASRec in plain NumPy/CuPy with hand-derived gradients, and the study of its attention.

    import minirec
    log = minirec.read_log("ratings.csv")           # or Log.from_columns(users, items, times)
    model = minirec.fit(log, attn="softmax")        # a Model: .evaluate() .with_attention("uniform") .decompose()
    minirec.study({"ratings": log})                 # is learned attention needed on it?

Read the modules in this order: plain, errors, gpu, backend, ops, packing, attention, loss, parameters, optimizer,
kernels, model, decompose, files, data.times, data.log, data.columns, data.read, data.split, data.describe,
data.planted, data.public, training.settings, training.runs, training.mpi, training.parallel, training.ranking,
training.baselines, training.progress, training.fit, studies.statistics, studies.plots, studies.results,
studies.grid, lesson.gradcheck, lesson.recording, lesson.trace, lesson.exercises, lesson.page, report.page,
cli.options, cli.common, cli.study, cli.inspect, cli.train, cli.lessons, cli.data.
"""

import importlib

__version__ = "0.1.0"

FRONT = {  # what a notebook needs, and the module that holds it; imported when it is first asked for
    "Log": "minirec.data.log",
    "read_log": "minirec.data.read",
    "fit": "minirec.training.fit",
    "load": "minirec.training.fit",
    "compare": "minirec.studies.results",
    "study": "minirec.studies.grid",
    "plots": "minirec.studies",
}
__all__ = [*FRONT, "__version__"]


def __getattr__(name):
    if name not in FRONT:
        raise AttributeError(f"module 'minirec' has no attribute {name!r}")
    found = getattr(importlib.import_module(FRONT[name]), name, None)
    return found or importlib.import_module(f"{FRONT[name]}.{name}")


def __dir__():
    return sorted({*globals(), *FRONT})
