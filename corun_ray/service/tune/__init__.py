"""The search over hyperparameters by Ray Tune."""
