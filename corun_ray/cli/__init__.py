"""The command line, one file for each group of commands."""

from corun_ray.cli.app import main

__all__ = ["main"]
