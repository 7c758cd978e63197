"""Measurement of the label pool: filling, reading, saving and restoring it."""
