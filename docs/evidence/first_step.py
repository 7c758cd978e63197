"""Time what a person waits for: the first step of a training, and the commands that only look.

Three ways to the first step take turns: plain `torchrun` (`plain_torchrun.py`), the service in a new storage folder,
where MLflow's database is made, and the service again. Prints a Markdown table of medians:

    python docs/evidence/first_step.py --turns 5
    python docs/evidence/first_step.py --turns 5 --beside ../another/checkout

`--beside` measures another checkout of this project as well, in the same turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import yaml
from mlflow import MlflowClient

from corun_ray.demo.dataset import DemoSize, write_demo

ROOT = Path(__file__).parents[2]
DEMO = DemoSize(clear_images=12, hazy_images=12, width_px=640, height_px=480)
TIMEOUT_S = 900


def write_job(folder: Path, storage: str) -> Path:
    """Write the job file that all ways run: Colabator, few small steps, one worker."""
    job = {
        "kind": "colabator",
        "name": "first",
        "storage": str(folder / storage),
        "data": {name: str(folder / "data" / name) for name in ("clear", "depth", "hazy")} | {"patch_px": 96},
        "network": {"stages": 2, "width": 8},
        "train": {"steps": 2, "batch_per_worker": 1, "log_every": 1, "checkpoint_every": 2, "validate_every": 2},
        "cluster": {"workers": 1, "cpus_per_worker": 1, "data_cpus": 1},
    }
    file = folder / f"{storage}.yaml"
    file.write_text(yaml.safe_dump(job))
    return file


def run(command: list[str], checkout: Path, folder: Path) -> tuple[float, float]:
    """Run a command of a checkout; return when it began and how many seconds it took.

    Raises `SystemExit` with the end of its output if the command fails.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
    started_s = time.time()
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return started_s, time.time() - started_s


def time_torchrun(job: Path) -> float:
    """Train by `torchrun`; return the seconds to the end of the first step."""
    out = job.with_suffix(".json")
    script = str(ROOT / "docs" / "evidence" / "plain_torchrun.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "--standalone"]
    started_s, _ = run([*launch, script, str(job), str(out)], ROOT, job.parent)
    return json.loads(out.read_text())["first_step_at_s"] - started_s


def time_service(job: Path, checkout: Path) -> float:
    """Train by the service; return the seconds to the first step's record in MLflow.

    The record comes up to half a second after the step.
    """
    started_s, _ = run([sys.executable, "-m", "corun_ray", "run", str(job)], checkout, job.parent)
    storage = yaml.safe_load(job.read_text())["storage"]
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    (newest, *_) = client.search_runs([client.get_experiment_by_name("corun").experiment_id])
    (first, *_) = client.get_metric_history(newest.info.run_id, "rate/steps_per_s")
    return first.timestamp / 1000 - started_s


def time_commands(job: Path, checkout: Path) -> dict[str, float]:
    """Return the seconds of the commands that only look."""
    storage = Path(yaml.safe_load(job.read_text())["storage"])
    (newest, *_) = sorted(storage.glob("first-*"), reverse=True)
    commands = {"--help": ["--help"], "check JOB": ["check", str(job)], "pool ls RUN": ["pool", "ls", str(newest)]}
    seconds = {}
    for name, words in commands.items():
        _, seconds[name] = run([sys.executable, "-m", "corun_ray", *words], checkout, job.parent)
    return seconds


def read_processor() -> str:
    """Return the processor's name, as Linux tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "an unknown processor"


def tell(way: str, seconds: float) -> None:
    """Tell a person who waits the last measurement, and how busy the machine is."""
    print(f"{way}: {seconds:.1f} s (load {os.getloadavg()[0]:.1f})", file=sys.stderr, flush=True)


def main() -> None:
    """Measure all ways by turns; print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--beside", type=Path, help="another checkout of this project")
    arguments = parser.parse_args()
    checkouts = {"service": ROOT}
    if arguments.beside is not None:
        checkouts["the other checkout"] = arguments.beside.absolute()

    steps: dict[str, list[float]] = defaultdict(list)
    commands: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(arguments.turns):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as root:
            folder = Path(root)
            write_demo(folder / "data", 0, DEMO, lambda done, total: None)
            steps["torchrun, to the first step"].append(time_torchrun(write_job(folder, "plain")))
            tell("torchrun", steps["torchrun, to the first step"][-1])

            for number, (name, checkout) in enumerate(checkouts.items()):
                job = write_job(folder, f"runs{number}")
                for way in (f"{name}, in a new storage folder", f"{name}, again"):
                    steps[way].append(time_service(job, checkout))
                    tell(way, steps[way][-1])
                for command, seconds in time_commands(job, checkout).items():
                    commands[name, command].append(seconds)

    print(f"{os.cpu_count()} cores of {read_processor()}, {arguments.turns} turns\n")
    for (name, command), seconds in commands.items():
        steps[f"{name}: `{command}`, whole"] = seconds
    print(format_table(steps))


def format_table(times: dict[str, list[float]]) -> str:
    """Format the Markdown table of all ways."""
    lines = ["| | median, s | least and most, s |", "| --- | --- | --- |"]
    for way, seconds in times.items():
        lines.append(f"| {way} | {statistics.median(seconds):.2f} | {min(seconds):.2f}, {max(seconds):.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
