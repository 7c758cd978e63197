"""Dehazing and evaluating folders of images by Ray Data."""
