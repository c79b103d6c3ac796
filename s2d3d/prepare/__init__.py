"""Making data sets: procedural shapes, simulated scans, conversion, download."""
