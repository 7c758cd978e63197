"""Restoring photographs of any size, and pictures of the result."""
