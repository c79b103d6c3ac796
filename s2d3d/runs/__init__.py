"""Run folders: paths, checkpoints, resuming, records, metrics."""
