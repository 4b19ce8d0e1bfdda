"""Training, ranking and what surrounds them: run folders, baselines, processes."""
