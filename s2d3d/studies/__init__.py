"""Studies: configurations times seeds, paired, with tables."""
