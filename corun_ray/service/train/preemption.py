"""Notices that nodes are about to be taken away, as all ranks of a training learn of them."""

from typing import Any

import ray.train

from corun_ray.service.telemetry.logs import Log

PREEMPTION_EVERY = 5
"""Steps between two looks for notices; each is a round trip of all ranks."""


class PreemptionWatch:
    """One rank's part in looking; rank 0 passes news on to the driver."""

    def __init__(self, rank: int, board: Any, log: Log) -> None:
        self._rank, self._board, self._log = rank, board, log
        self._nodes: list[str] = []

    def is_due(self, step: int) -> bool:
        """Whether a preemption has been announced since the last look; all ranks learn the same."""
        if step % PREEMPTION_EVERY:
            return False
        info = ray.train.get_preemption_info()
        is_news = info is not None and info.preempted_node_ids != self._nodes
        if info is not None:
            self._nodes = info.preempted_node_ids
        if is_news and self._rank == 0:
            self._log.warning("preemption announced", step=step, nodes=self._nodes)
            text = f"{len(self._nodes)} of the workers' nodes will be taken away: saving step {step}"
            self._board.post_note.remote(text)
        return is_news
