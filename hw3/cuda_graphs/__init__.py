"""The CUDA-graph training step and decoding step: what makes a GPU run fast. Nothing else depends on it."""
