"""minirec: SASRec in plain NumPy/CuPy with hand-derived gradients, and the study of its attention.

Read the modules in this order: plain, errors, gpu, backend, ops, packing, attention, loss, parameters, optimizer,
kernels, model, decompose, files, data.times, data.log, data.read, data.split, data.describe, data.planted, data.public,
training.runs, training.mpi, training.parallel, training.ranking, training.baselines, training.progress, training.fit,
studies.statistics, studies.results, studies.grid, studies.plots, lesson.gradcheck, lesson.recording, lesson.trace,
lesson.exercises, lesson.page, report.page, cli.common, cli.study, cli.train, cli.inspect, cli.lessons, cli.data.
"""

__version__ = "0.1.0"


def __getattr__(name):
    """Import what the front offers when it is asked for: NumPy alone is enough for the lesson."""
    if name == "read_log":
        from minirec.data.read import read_log

        return read_log
    if name == "Log":
        from minirec.data.log import Log

        return Log
    raise AttributeError(f"module 'minirec' has no attribute {name!r}")
