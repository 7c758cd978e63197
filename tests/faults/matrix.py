"""One run under one fault, and what must hold at its end; the whole matrix as a command (`make faults`)."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from corun_ray.service.storage import locate
from tests.conftest import CREDENTIALS, free_port, make_dataset, wait_for
from tests.faults.inject import FAULTS, Fault, Scene, storage_for
from tests.faults.rig import STEPS, Driver, Rig, write_job
from tests.faults.verdict import DONE, last_labels, problems
from tests.faulty_s3 import FaultyS3

MAX_RESUMED = 3


@dataclass
class Outcome:
    """What came of a run under a fault; no `problems` means that everything held."""

    fault: str
    seed: int
    struck_at_step: int = -1
    labels_held: int = 0
    """Labels of the last checkpoint before the fault."""
    resumed: int = 0
    """Times that a person had to start the job again, with --resume."""
    restarts: int = 0
    """Times that the workers began again by themselves."""
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    output: str = ""


@contextmanager
def stage() -> Iterator[tuple[Rig, FaultyS3, Path]]:
    """A cluster, an object store behind a proxy that can fail, and a small dataset, for as many runs as wanted."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="corun-faults-")))
        make_dataset(folder / "data")
        port = free_port()
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        stack.callback(server.wait)
        stack.callback(server.terminate)
        wait_for(f"http://127.0.0.1:{port}")
        store = stack.enter_context(FaultyS3(f"http://127.0.0.1:{port}"))
        before = dict(os.environ)
        # Ray's nodes, and what they start, know the object store by their environment.
        os.environ.update({**CREDENTIALS, "AWS_ENDPOINT_URL": store.url})
        stack.callback(lambda: (os.environ.clear(), os.environ.update(before)))
        rig = Rig()
        stack.callback(rig.close)
        yield rig, store, folder


def run(rig: Rig, store: FaultyS3, folder: Path, fault: Fault, seed: int) -> Outcome:
    """A run from its start to its end, struck at a random moment; raises OSError where the fault cannot be staged."""
    rng = np.random.default_rng([seed, *fault.name.encode()])
    return run_under(rig, store, folder, [(fault, int(rng.integers(1, STEPS - 1)))], rng, seed)


def run_under(
    rig: Rig, store: FaultyS3, folder: Path, blows: Sequence[tuple[Fault, int]], rng: np.random.Generator, seed: int = 0
) -> Outcome:
    """A run from its start to its end, struck by each fault in turn soon after it has done so many steps.

    All faults use the storage of the first. A person starts the job again, with `--resume`, when its process has ended
    before its time. Raises OSError where a fault cannot be staged.
    """
    started = time.monotonic()
    outcome = Outcome(" + ".join(fault.name for fault, _ in blows), seed)
    name = f"{outcome.fault.replace(' + ', '-').replace(' ', '-')}-{seed}"
    place = folder / name
    place.mkdir()
    rig.mend()
    with storage_for(blows[0][0], place, name[:60]) as storage:
        job = write_job(place, folder / "data", storage, name)
        driver, held = Driver(job, rig.environment()), {}
        for fault, moment in blows:
            if not driver.reaches(moment):
                outcome.problems.append(f"ended before step {moment}")
                break
            time.sleep(rng.uniform(0, 0.6))
            outcome.struck_at_step = driver.step
            held = last_labels(locate(storage))
            outcome.labels_held = len(held)
            fault.strike(Scene(rig, driver, rng, store, place / "disk", job, outcome.problems))
            if not driver.is_running:
                driver = _resumed(driver, job, rig, outcome)
        while driver.finish() != DONE and outcome.resumed < MAX_RESUMED:
            driver = _resumed(driver, job, rig, outcome)
        outcome.output += driver.output
        outcome.problems += problems(driver.finish(), locate(storage), held)
    outcome.restarts = outcome.output.count("workers restarted")
    outcome.seconds = round(time.monotonic() - started, 1)
    shutil.rmtree(place, ignore_errors=True)
    return outcome


def _resumed(driver: Driver, job: Path, rig: Rig, outcome: Outcome) -> Driver:
    driver.finish()
    outcome.output += driver.output
    outcome.resumed += 1
    rig.mend()
    return Driver(job, rig.environment(), "--resume")


def line(outcome: Outcome) -> str:
    """An outcome for a person."""
    verdict = "; ".join(outcome.problems) or "held"
    counts = f"{outcome.restarts} restarts  {outcome.resumed} resumed  {outcome.labels_held} labels held"
    where = f"seed {outcome.seed}  struck at step {outcome.struck_at_step:>2}"
    return f"{outcome.fault:<20} {where}  {counts}  {outcome.seconds:5.1f} s  {verdict}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the matrix; exits with 1 if anything did not hold."""
    parser = argparse.ArgumentParser(description="Runs a small Colabator job under every fault, at random moments.")
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--json", type=Path, help="file for what came of every run")
    parser.add_argument("--show", action="store_true", help="also print what each run printed")
    args = parser.parse_args(arguments)
    outcomes = []
    with stage() as (rig, store, folder):
        for name in args.faults:
            for seed in args.seeds:
                outcome = run(rig, store, folder, FAULTS[name], seed)
                outcomes.append(outcome)
                print(line(outcome), flush=True)
                if outcome.problems or args.show:
                    print(outcome.output[-6000:].replace("\r", "\n"), file=sys.stderr, flush=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(one) | {"output": None} for one in outcomes], indent=1))
    sys.exit(any(outcome.problems for outcome in outcomes))


if __name__ == "__main__":
    main()
