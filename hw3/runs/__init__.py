"""A run folder: its files, its complete checkpoints, what may change on resume."""
