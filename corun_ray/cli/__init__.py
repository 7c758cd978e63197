"""The command line, one file for each group of commands; heavy imports happen inside the commands."""

from corun_ray.cli.app import main

__all__ = ["main"]
