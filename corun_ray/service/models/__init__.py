"""Models in MLflow: tracking, the registry, model cards, and where a network comes from."""
