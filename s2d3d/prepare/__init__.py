"""Making data sets: procedural shapes, simulated scans, conversion, download."""

DEFAULT_POINTS = 2048
"""Points of a shape that is made from a mesh."""
