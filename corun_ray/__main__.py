"""`python -m corun_ray`: the same as `corun-ray`, also where nothing is installed."""

from corun_ray.cli import main

main()
