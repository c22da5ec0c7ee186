"""`hw3 export`: merge a checkpoint into its base model, and write a complete model with its card."""
