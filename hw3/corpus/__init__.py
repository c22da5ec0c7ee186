"""Building and checking training data."""
