"""minirec: SASRec in plain NumPy/CuPy with hand-derived gradients, and the study of its attention.

Read the modules in this order: plain, errors, backend, ops, packing, attention, loss, parameters, model, optimizer,
decompose, files, data.log, data.split, data.describe, data.planted, training.runs, data.public, training.parallel,
training.ranking, training.fit, training.baselines, studies.statistics, studies.grid, studies.plots, lesson.gradcheck,
lesson.trace, report.page.
"""

__version__ = "0.1.0"
