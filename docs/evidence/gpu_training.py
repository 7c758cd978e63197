"""Train `corun-small` on, from the model in the package, until the steps are done or a signal ends the training.

PHOTOGRAPHS is the folder `corun_small` that `gather_corun_small.py` makes. The job is the last one of
`jobs/corun_small.yaml`, on one worker:

    python docs/evidence/gpu_training.py training.json corun_small --weights corun_small.pth --set train.steps=2400

Writes the first and the last validation (dB), steps per second, and the weights of the last checkpoint. After SIGTERM
the training ends where it is, and all of this is written.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from mlflow import MlflowClient

ROOT = Path(__file__).parents[2]
STEP_RATE, VALIDATION = "rate/steps_per_s", "val/psnr"


def main() -> None:
    """Write the job, train and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the JSON file of the figures")
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--weights", type=Path, required=True, help="the file for the weights of the last checkpoint")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the job")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        job = write_job(folder, arguments.photographs.absolute())
        code = train([str(job), *(option for value in arguments.set for option in ("--set", value))], folder)
        arguments.output.write_text(json.dumps(read_figures(folder) | {"exit_code": code}, indent=1))

        checkpoints = sorted(folder.glob("runs/*/checkpoint_*/network.pth"))
        if checkpoints:
            shutil.copy(checkpoints[-1], arguments.weights)
    print(arguments.output.read_text())


def write_job(folder: Path, photographs: Path) -> Path:
    """Write the last job of `jobs/corun_small.yaml`, which starts from the model in the package."""
    *_, job = yaml.safe_load_all((ROOT / "jobs" / "corun_small.yaml").read_text())
    job["storage"] = str(folder / "runs")
    job["network"]["init"] = "corun-small"
    job["cluster"] = {"workers": 1}
    del job["tracking"]
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    (folder / "corun_small").symlink_to(photographs)
    return file


def train(arguments: list[str], folder: Path) -> int:
    """Run the job in a folder; return its exit code. A SIGTERM to this process ends the job, too."""
    command = [sys.executable, "-m", "corun_ray", "run", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    service = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True)

    def pass_on(number: int, frame: FrameType | None) -> None:
        service.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    return service.wait()


def read_figures(folder: Path) -> dict[str, Any]:
    """Read steps, their rate, and the first and last validation from MLflow."""
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("corun").experiment_id])
    rates = client.get_metric_history(run.info.run_id, STEP_RATE)
    values = client.get_metric_history(run.info.run_id, VALIDATION)
    figures: dict[str, Any] = {"steps": max((metric.step for metric in rates), default=0)}
    if rates:
        figures["steps_per_s"] = rates[-1].value
    if values:
        figures |= {"first_validation_db": values[0].value, "last_validation_db": values[-1].value}
    return figures


if __name__ == "__main__":
    main()
