"""The metrics of one shard of the label pool, from the counters that it keeps anyway."""

from collections.abc import Mapping

from corun_ray.service.pool.poolrecords import PoolCounters
from corun_ray.service.telemetry import prometheus as telemetry
from corun_ray.service.telemetry.prometheus import Metric, Recorder


class PoolTelemetry:
    """Tells what a shard counts."""

    def __init__(self, labels: Mapping[str, str], number: int) -> None:
        self._recorder = Recorder(labels, shard=str(number))

    def tell(self, counters: PoolCounters) -> None:
        """The shard as of now."""
        self._recorder.set(telemetry.POOL_LABELS, counters.labels)
        self._recorder.set(telemetry.POOL_BYTES, counters.resident_bytes)
        for metric, total in _totals(counters).items():
            self._recorder.advance(metric, total)

    def restored(self, counters: PoolCounters) -> None:
        """The shard goes on counting from here; what was counted before has been told by others."""
        for metric, total in _totals(counters).items():
            self._recorder.skip(metric, total)
        self._recorder.add(telemetry.POOL_RESTORES)
        self.tell(counters)


def _totals(counters: PoolCounters) -> dict[Metric, int]:
    return {
        telemetry.POOL_OFFERS: counters.offers,
        telemetry.POOL_WINS: counters.wins,
        telemetry.POOL_READS: counters.reads,
        telemetry.POOL_HITS: counters.hits,
    }
