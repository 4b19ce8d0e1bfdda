"""minirec: SASRec in plain NumPy/CuPy with hand-derived gradients, and the study of its attention.

Read the modules in this order: errors, backend, ops, attention, loss, model, optimizer, data,
describe, planted, files, runs, workers, evaluate, train, decompose, baselines, statistics, study,
figures, gradcheck, trace, report, catalogue.
"""

__version__ = "0.1.0"
