"""minirec: SASRec in plain NumPy/CuPy with hand-derived gradients, and the study of its attention.

Read the modules in this order: plain, errors, gpu, backend, ops, packing, attention, loss, parameters, optimizer,
kernels, model, decompose, files, data.log, data.split, data.describe, data.planted, data.public, training.runs,
training.mpi, training.parallel, training.ranking, training.baselines, training.progress, training.fit,
studies.statistics, studies.grid, studies.plots, lesson.gradcheck, lesson.trace, report.page, cli.common, cli.study,
cli.train, cli.inspect, cli.lessons, cli.data.
"""

__version__ = "0.1.0"
