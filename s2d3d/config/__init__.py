"""Configs: schema, YAML and overrides, comparison, the reference page."""
