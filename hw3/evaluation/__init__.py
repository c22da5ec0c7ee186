"""`hw3 eval`: output-only perplexity of the base model and of every checkpoint."""
