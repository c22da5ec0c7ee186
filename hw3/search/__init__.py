"""`hw3 search`: the settings and prompts that score best, found with Optuna's samplers and pruners."""
