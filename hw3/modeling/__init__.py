"""Base models and adapters: loading, devices, quantization, adapter swaps, content hashes."""
