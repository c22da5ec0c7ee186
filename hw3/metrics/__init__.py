"""Metrics in the form of the `evaluate` library."""
