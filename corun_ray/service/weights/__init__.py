"""Pretrained weights: checked folders, fetching files, and what a job needs."""
