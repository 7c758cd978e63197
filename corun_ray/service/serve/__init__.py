"""Serving a model over HTTP by Ray Serve."""
