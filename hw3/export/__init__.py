"""`hw3 export`: a checkpoint merged into its base model, with a model card."""
