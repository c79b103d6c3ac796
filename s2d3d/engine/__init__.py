"""Training and evaluation: config, trainer, evaluator, checkpoints."""
