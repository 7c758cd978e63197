"""Where `corun_ray.jobmethod` looks for the metrics' names until it imports them from the core."""

from corun_ray.core.iqanames import IqaFacts, no_reference_metrics

__all__ = ["IqaFacts", "no_reference_metrics"]
