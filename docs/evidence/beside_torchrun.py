"""Compare the service with plain `torchrun` (`plain_torchrun.py`), by turns, on this machine's CPU.

Both train the same network on the same samples in the same order, with one thread a worker. Prints a Markdown table of
the samples per second of all workers and the cost of the service, as medians over all turns:

    python docs/evidence/beside_torchrun.py --kind colabator --workers 1 2 4

The first `--warm` steps do not count. The time besides all steps has a column of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from mlflow import MlflowClient

from corun_ray.demo.dataset import DemoSize, write_demo

ROOT = Path(__file__).parents[2]
DEMO = DemoSize(clear_images=12, hazy_images=12, width_px=640, height_px=480)
TIMEOUT_S = 3600


@dataclass
class Way:
    """The measurements of one way to train with one number of workers."""

    rates: list[float] = field(default_factory=list)
    """Steps per second."""
    start_s: list[float] = field(default_factory=list)
    """Seconds besides all steps, one item a turn."""


def write_job(folder: Path, arguments: argparse.Namespace, workers: int) -> Path:
    """Write the job file that both ways run."""
    data = {
        "clear": str(folder / "data" / "clear"),
        "depth": str(folder / "data" / "depth"),
        "patch_px": arguments.size,
    }
    job = {
        "kind": arguments.kind,
        "name": f"beside-{workers}",
        "storage": str(folder / "runs"),
        "data": data,
        "network": {"stages": arguments.stages, "width": 30},
        "optim": {"precision": "fp32"},
        "train": {
            "steps": arguments.steps,
            "batch_per_worker": 1,
            "log_every": arguments.every,
            "checkpoint_every": arguments.steps,
            "validate_every": arguments.steps,
        },
        "cluster": {"workers": workers, "cpus_per_worker": 1, "data_cpus": 1},
    }

    # Colabator also needs real hazy images.
    if arguments.kind == "colabator":
        data["hazy"] = str(folder / "data" / "hazy")

    file = folder / f"{workers}.yaml"
    file.write_text(yaml.safe_dump(job))
    return file


def run(command: list[str], folder: Path) -> float:
    """Run a command; return its seconds.

    Raises `SystemExit` with the end of its output if the command fails.
    """
    # One thread a worker, for both ways.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started_s = time.perf_counter()
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return time.perf_counter() - started_s


def by_torchrun(job: Path, workers: int) -> tuple[list[float], float]:
    """Train by `torchrun`; return its rates and the seconds of the command."""
    out = job.with_suffix(".json")
    script = str(ROOT / "docs" / "evidence" / "plain_torchrun.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(workers), "--standalone"]
    seconds = run([*launch, script, str(job), str(out)], job.parent)
    return json.loads(out.read_text())["rates"], seconds


def by_service(job: Path) -> tuple[list[float], float]:
    """Train by the service; return its rates and the seconds of the command."""
    seconds = run([sys.executable, "-m", "corun_ray", "run", str(job)], job.parent)

    # The rates are in MLflow, in the newest run.
    client = MlflowClient(f"sqlite:///{job.parent}/runs/mlflow.db")
    (newest, *_) = client.search_runs([client.get_experiment_by_name("corun").experiment_id])
    return [metric.value for metric in client.get_metric_history(newest.info.run_id, "rate/steps_per_s")], seconds


def main() -> None:
    """Train both ways by turns; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("pretrain", "colabator"), default="pretrain")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--size", type=int, default=96, help="side of a patch in pixels")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warm", type=int, default=20, help="first steps that do not count")
    parser.add_argument("--every", type=int, default=5, help="steps that a rate is taken over")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()

    ways: dict[tuple[str, int], Way] = {}
    for workers in arguments.workers:
        for name in ("torchrun", "service"):
            ways[name, workers] = Way()

    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        write_demo(folder / "data", 0, DEMO, lambda done, total: None)

        # The ways take turns, so that a slow phase of the machine touches all of them.
        for _ in range(arguments.turns):
            for (name, workers), way in ways.items():
                job = write_job(folder, arguments, workers)
                rates, seconds = by_torchrun(job, workers) if name == "torchrun" else by_service(job)

                # Skip the rates of the warm-up. The rest of the command's time is its start and end.
                way.rates += rates[arguments.warm // arguments.every :]
                way.start_s.append(seconds - sum(arguments.every / rate for rate in rates))

    print(table(arguments.workers, ways))


def table(workers: list[int], ways: dict[tuple[str, int], Way]) -> str:
    """Format the Markdown table, one row for each number of workers."""
    lines = [
        "| workers | torchrun, samples/s | service, samples/s | service costs | besides steps: torchrun, service |",
        "| --- | --- | --- | --- | --- |",
    ]

    # A worker takes one sample a step, so samples per second are steps per second times the number of workers.
    for number in workers:
        plain, service = ways["torchrun", number], ways["service", number]
        rates = [number * statistics.median(way.rates) for way in (plain, service)]
        starts = [statistics.median(way.start_s) for way in (plain, service)]
        lines.append(
            f"| {number} | {rates[0]:.3f} | {rates[1]:.3f} | {100 * (rates[0] / rates[1] - 1):+.1f} % "
            f"| {starts[0]:.0f} s, {starts[1]:.0f} s |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
