"""minirec: SASRec in plain NumPy/CuPy with hand-derived gradients, and the study of its attention.

Read the modules in this order: plain, errors, backend, ops, packing, attention, loss, parameters, model, optimizer,
decompose, data.log, data.describe, data.planted, files, runs, workers, evaluate, train, baselines, statistics, study,
figures, gradcheck, trace, report, data.public.
"""

__version__ = "0.1.0"
