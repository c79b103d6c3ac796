"""Numbers from a model and data."""
