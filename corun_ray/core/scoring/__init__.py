"""Scores of pseudo labels: clarity, quality and the trust maps made of both."""
