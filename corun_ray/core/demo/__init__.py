"""The embedded demo dataset: outdoor scenes with exact depth, drawn with NumPy and OpenCV alone."""

from corun_ray.core.demo.dataset import DemoSize, write_demo

__all__ = ["DemoSize", "write_demo"]
