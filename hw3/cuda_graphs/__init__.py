"""CUDA graphs of the training step and of the decoding step. The package is optional: without it, both run eagerly."""
