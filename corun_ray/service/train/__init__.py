"""Training by Ray Train: the driver, and the loop of each worker."""
