"""Metrics for the `evaluate` library."""
