"""Train by the whole service on one device: pre-training, then Colabator whose worker is killed on the way.

Data are rendered, and DA-CLIP, MUSIQ and VGG-19 have random weights of the true shapes. `corun-ray run` starts Ray, the
label pool, the stream and MLflow as for any user. In the middle of Colabator the worker's process gets a SIGKILL, and
the service has to go on from the last checkpoint by itself:

    python docs/evidence/gpu_service.py service.json --device cuda --steps 60 --size 288
    python docs/evidence/gpu_service.py service.json --device cpu --steps 8 --size 64 --stages 2 --width 8 --no-weights

Writes steps per second of both trainings, the seconds from the kill to the next step, and how busy the GPU was.
"""

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import yaml
from mlflow import MlflowClient

from corun_ray.demo.dataset import DemoSize, write_demo
from corun_ray.service.weights.folder import index_folder

sys.path.insert(0, str(Path(__file__).parent))
from lazy_coherence import ROOT, write_weights

STEP_LINE = re.compile(r"step (\d+)/(\d+)")
LOOK_EVERY_S = 0.5
ASK_GPU = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits"]


def main() -> None:
    """Write data, weights and jobs; run them, kill a worker and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the JSON file of the figures")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--steps", type=int, default=60, help="of each training")
    parser.add_argument("--size", type=int, default=288, help="side of a patch in pixels")
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--width", type=int, default=30)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--no-weights", action="store_true", help="scorers without weights, and no VGG-19")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for all of it")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        side_px = 2 * arguments.size
        write_demo(folder / "data", 0, DemoSize(12, 12, side_px, side_px), lambda done, total: None)
        if not arguments.no_weights:
            (folder / "weights").mkdir()
            write_weights(folder / "weights", json.loads((ROOT / "tests/data/daclip/daclip_keys.json").read_text()))
            index_folder(str(folder / "weights"))
        write_jobs(folder, arguments)
        figures = run_and_kill(folder, arguments.timeout)
        figures |= read_rates(folder)
    arguments.output.write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures, indent=1))


def write_jobs(folder: Path, arguments: argparse.Namespace) -> None:
    """Write the job file: pre-training, then Colabator from its model."""
    network = {"stages": arguments.stages, "width": arguments.width}
    every = max(1, arguments.steps // 6)
    common: dict[str, Any] = {
        "storage": str(folder / "runs"),
        "optim": {"precision": arguments.precision},
        "train": {
            "steps": arguments.steps,
            "batch_per_worker": 1,
            "log_every": every,
            "checkpoint_every": every,
            "validate_every": arguments.steps,
        },
        "cluster": {"workers": 1, "gpus_per_worker": int(arguments.device == "cuda"), "max_failures": 2},
    }
    data = {name: str(folder / "data" / name) for name in ("clear", "depth")} | {"patch_px": arguments.size}
    pretrain = {"kind": "pretrain", "name": "gpu-pretrain", "data": data, "network": network, **common}
    pretrain["tracking"] = {"register": "gpu-pretrained"}

    colabator = {"kind": "colabator", "name": "gpu-colabator", "network": network, **common}
    colabator["network"] = network | {"init": "models:/gpu-pretrained@candidate"}
    colabator["data"] = data | {"hazy": str(folder / "data" / "hazy")}
    if not arguments.no_weights:
        weights = str(folder / "weights")
        colabator["coherence"] = {"clarity": "daclip", "quality": "musiq", "weights": weights}
        colabator["loss"] = {"perceptual": "vgg19", "weights": weights}
    (folder / "jobs.yaml").write_text(yaml.safe_dump_all([pretrain, colabator]))


def run_and_kill(folder: Path, timeout_s: float) -> dict[str, Any]:
    """Run the jobs and kill Colabator's worker in the middle; return seconds, and how busy the GPU was.

    Raises `SystemExit` with the end of the output where the command fails or takes longer than `timeout_s`.
    """
    command = [sys.executable, "-m", "corun_ray", "run", str(folder / "jobs.yaml")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    service = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    watch = OutputWatch(service)
    watch.start()

    started_s, busy, last_name = time.monotonic(), [], ""
    figures: dict[str, Any] = {}
    while service.poll() is None:
        time.sleep(LOOK_EVERY_S)
        if time.monotonic() - started_s > timeout_s:
            service.send_signal(signal.SIGTERM)
            service.wait(60)
            raise SystemExit(f"not done within {timeout_s:g} s:\n{watch.end()}")
        busy += ask_gpu()

        # The first step of each training, and half way through the second the kill.
        if watch.step and watch.name != last_name:
            last_name = watch.name
            figures[f"{watch.name}_first_step_after_s"] = time.monotonic() - started_s
        is_half_way = watch.name == "gpu-colabator" and watch.steps and watch.step >= watch.steps // 2
        if is_half_way and "killed_at_step" not in figures:
            figures["killed_at_step"] = watch.step
            kill_worker(service.pid)
            killed_s, watch.step = time.monotonic(), 0
        if "killed_at_step" in figures and "back_after_s" not in figures and watch.step:
            figures["back_after_s"] = time.monotonic() - killed_s

    watch.join()
    if service.returncode or "killed_at_step" not in figures:
        raise SystemExit(f"exit code {service.returncode}, killed: {'killed_at_step' in figures}\n{watch.end()}")
    figures["total_s"] = time.monotonic() - started_s
    if busy:
        figures["gpu_busy_percent"] = statistics.mean(percent for percent, _ in busy)
        figures["gpu_memory_mib"] = max(memory_mib for _, memory_mib in busy)
    return figures


class OutputWatch(threading.Thread):
    """Reads the output of `corun-ray run`: which job is at which step."""

    def __init__(self, service: subprocess.Popen[str]) -> None:
        super().__init__(daemon=True)
        self._service, self._lines = service, []
        self.name, self.step, self.steps = "", 0, 0

    def run(self) -> None:
        """Read until the command ends."""
        assert self._service.stdout is not None
        for line in self._service.stdout:
            self._lines.append(line)
            header = re.match(r"(?:pretrain|colabator) (gpu-\w+)", line)
            if header:
                self.name, self.step, self.steps = header[1], 0, 0
            found = STEP_LINE.search(line)
            if found:
                self.step, self.steps = int(found[1]), int(found[2])

    def end(self) -> str:
        """Return the last lines."""
        return "".join(self._lines[-30:])


def kill_worker(root_pid: int) -> None:
    """Send SIGKILL to the process that trains: of all below `root_pid`, Ray Train's worker."""
    for process in psutil.Process(root_pid).children(recursive=True):
        if "RayTrainWorker" in " ".join(process.cmdline()):
            process.kill()
            return
    raise SystemExit("no process of a training worker was found")


def ask_gpu() -> list[tuple[float, float]]:
    """Return the busy percentage and the memory in MiB of the first GPU; nothing where there is none."""
    if shutil.which(ASK_GPU[0]) is None:
        return []
    said = subprocess.run(ASK_GPU, capture_output=True, text=True, check=False).stdout.split("\n")[0]
    percent, _, memory_mib = said.partition(",")
    return [(float(percent), float(memory_mib))] if memory_mib.strip().isdigit() else []


def read_rates(folder: Path) -> dict[str, float]:
    """Read the steps per second of both trainings from MLflow, without the first value of each."""
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    rates = {}
    for run in client.search_runs([client.get_experiment_by_name("corun").experiment_id]):
        history = client.get_metric_history(run.info.run_id, "rate/steps_per_s")
        name = run.data.tags["corun_ray.kind"]
        rates[f"{name}_steps_per_s"] = statistics.median([metric.value for metric in history][1:])
    return rates


if __name__ == "__main__":
    main()
