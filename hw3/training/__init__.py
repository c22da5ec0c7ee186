"""`hw3 train` and `hw3 check`: plan a run, train it with TRL, save complete checkpoints."""
