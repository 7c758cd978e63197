"""What a person sees of a search while it runs."""

from collections.abc import Sequence
from typing import Any

from ray.tune import Callback

from corun_ray.service.telemetry.console import Console


class TrialLines(Callback):
    """One live line of progress over all trials, and a line for each trial that ends."""

    def __init__(self, console: Console, metric: str, num_trials: int, steps: int) -> None:
        self._console, self._metric, self._num_trials, self._steps = console, metric, num_trials, steps

    def on_trial_start(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        """A trial begins, or goes on with what it did before."""
        self._console.say(f"  trial {trial} begins" if not trial.last_result else f"  trial {trial} goes on")

    def on_trial_result(self, iteration: int, trials: Sequence[Any], trial: Any, result: dict, **info: Any) -> None:
        """A trial has validated."""
        self._progress(trials)

    def on_trial_complete(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        """A trial has ended, by itself or because it fell behind."""
        last = trial.last_result
        how = "ended" if "model" in last else f"stopped at step {last.get('step', 0)}"
        score = f", {self._metric} {last[self._metric]:.4g}" if self._metric in last else ""
        self._console.say(f"  trial {trial} {how}{score}")
        self._progress(trials)

    def on_trial_error(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        """A trial has failed; the others go on."""
        self._console.say(f"  trial {trial} failed")
        self._progress(trials)

    def _progress(self, trials: Sequence[Any]) -> None:
        over = [trial for trial in trials if trial.status in ("TERMINATED", "ERROR")]
        running = [trial for trial in trials if trial.status == "RUNNING"]
        done = len(over) * self._steps + sum(trial.last_result.get("step", 0) for trial in running if trial not in over)
        details = [f"{len(over)} of {self._num_trials} trials over", f"{len(running)} running"]
        self._console.progress(done, self._num_trials * self._steps, "step", details)
