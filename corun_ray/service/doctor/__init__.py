"""Trying everything that a job would use, before one runs."""
