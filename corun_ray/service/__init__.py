"""Ray, object storage and MLflow around the method."""
