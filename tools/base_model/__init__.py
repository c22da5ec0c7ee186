"""Encoding, training, scoring and documenting the small base model in `data/tiny`."""
