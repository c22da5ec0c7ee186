"""Output-only perplexity: `evaluate.load` takes this folder."""
