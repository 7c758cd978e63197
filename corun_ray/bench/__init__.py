"""Measurements of a step, a photograph, the sample stream and the label pool; the forecast for many GPUs."""
