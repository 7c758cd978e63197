"""Steps that stay away: when the person who watches is told, and what the cluster knows of its nodes then.

A worker, a link, the data or the storage may be slow or gone for a while, and a run that waits for them looks like one
that hangs.
"""

import time
from collections.abc import Callable

import ray

FIRST_PATIENCE_S = 15.0
PATIENCE_GROWS = 2.0
Clock = Callable[[], float]


class NodeWatch:
    """The cluster's nodes, by what Ray says of them, against those that it had at first."""

    def __init__(self) -> None:
        self._at_first = {node["NodeID"] for node in ray.nodes() if node["Alive"]}

    def __call__(self) -> str:
        """How many there are, and which are lost."""
        nodes = ray.nodes()
        alive = [node["NodeManagerAddress"] for node in nodes if node["Alive"]]
        dead = (node["NodeManagerAddress"] for node in nodes if not node["Alive"] and node["NodeID"] in self._at_first)
        lost = sorted(address for address in dead if address not in alive)
        text = f"{len(alive)} node{'s' * (len(alive) != 1)} in the cluster"
        return f"{text}, lost: {', '.join(lost)}" if lost else text


class Stalls:
    """Pauses between two steps. Told of are those twice as long as any before, from `FIRST_PATIENCE_S` on: a job whose
    steps or validations take long says so once. While one lasts, it is told of again when it is twice as long, and
    when there is news of the nodes.
    """

    def __init__(self, nodes: Callable[[], str], clock: Clock = time.monotonic) -> None:
        self._nodes, self._clock = nodes, clock
        self._step, self._since_s = 0, clock()
        self._patience_s = FIRST_PATIENCE_S
        self._next_s = FIRST_PATIENCE_S
        self._told: str | None = None
        """What was said of the nodes last, in this pause."""

    def look(self, step: int) -> str | None:
        """What there is to say now that so many steps are done; before the first one, nothing."""
        paused_s = self._clock() - self._since_s
        if step != self._step:
            text = f"steps go on after {paused_s:.0f} s" if self._told else None
            if self._step:
                self._patience_s = max(self._patience_s, PATIENCE_GROWS * paused_s)
            self._step, self._since_s = step, self._clock()
            self._next_s, self._told = self._patience_s, None
            return text
        is_due = paused_s >= self._next_s
        if step == 0 or not (is_due or self._told):
            return None
        nodes = self._nodes()
        if not is_due and nodes == self._told:
            return None
        if is_due:
            self._next_s = PATIENCE_GROWS * paused_s
        self._told = nodes
        return f"no step for {paused_s:.0f} s after step {step} ({nodes})"
