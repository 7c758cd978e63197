"""The rendered demo dataset: outdoor scenes with exact depth, drawn with NumPy and OpenCV alone."""
