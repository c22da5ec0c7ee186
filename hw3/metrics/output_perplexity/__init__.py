"""Output-only perplexity. Pass the path of this folder to `evaluate.load`."""
