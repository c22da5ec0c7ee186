"""Base models and adapters: loading, devices, quantization, adapter swaps, masks, logits, content hashes."""
