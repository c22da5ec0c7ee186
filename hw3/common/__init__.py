"""Helpers that every other package builds on: errors, atomic file writes, hashing, disk space, process groups."""
