"""`hw3 predict` and `hw3 compare`: outputs of a checkpoint, and their comparison."""
