"""The metrics of a run as its driver knows them: the values that go to MLflow, and what went wrong."""

from collections.abc import Mapping

from corun_ray.service.telemetry import prometheus as telemetry
from corun_ray.service.telemetry.prometheus import Metric, Recorder

Held = dict[tuple[Metric, tuple[tuple[str, str], ...]], float]
"""Values by metric and labels."""
OF_METRICS = {
    "optim/lr": telemetry.LEARNING_RATE,
    "pool/win_rate": telemetry.WIN_RATIO,
    "pool/trust": telemetry.TRUST_RATIO,
}
"""MLflow's names of metrics that are gauges of their own here."""


class RunTelemetry:
    """Gauges that keep their last value as long as `refresh` is called now and then."""

    def __init__(self, labels: Mapping[str, str], steps: int) -> None:
        self._recorder = Recorder(labels)
        self._held: Held = {}
        self.hold(telemetry.STEPS_PLANNED, steps)
        for metric in (telemetry.RESTARTS, telemetry.FAILED_WRITES):
            self.hold(metric, 0)

    def hold(self, metric: Metric, value: float, /, **labels: str) -> None:
        """The value of a gauge from now on."""
        self._held[metric, tuple(labels.items())] = value

    def hold_metrics(self, metrics: Mapping[str, float]) -> None:
        """Those of metrics under MLflow's names that have gauges."""
        for name, value in metrics.items():
            first, _, last = name.rpartition("/")
            if name in OF_METRICS:
                self.hold(OF_METRICS[name], value)
            elif first == "loss":
                self.hold(telemetry.LOSS, value, term=last)
            elif first == "val" or first.startswith("val/"):
                self.hold(telemetry.VALIDATION, value, set=first, metric=last)

    def refresh(self) -> None:
        """Sets all gauges again."""
        for (metric, labels), value in self._held.items():
            self._recorder.set(metric, value, **dict(labels))
