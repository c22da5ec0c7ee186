"""Errors, atomic files, hashing, disk space and process groups: what every other package builds on."""
