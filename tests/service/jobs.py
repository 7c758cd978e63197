"""Small training jobs for tests, written as their job files would say them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from corun_ray.config.jobs import TrainingJob
from corun_ray.config.loading import load_jobs


def small_job(kind: str, root: Path, folder: Path, /, **sections: dict[str, Any]) -> TrainingJob:
    """A job of a few steps on 32 px patches, alike on every processor; `sections` are merged over the defaults below.

    `data.paired` takes the place of clear and depth, another `network.type` that of stages and width.
    """
    tree: dict[str, Any] = {
        "kind": kind,
        "name": f"test-{kind}",
        "storage": str(folder / "runs"),
        "data": {"clear": str(root / "clear"), "depth": str(root / "depth"), "patch_px": 32},
        "network": {"stages": 2, "width": 4},
        "optim": {"precision": "fp32"},
        "train": {"steps": 4, "batch_per_worker": 1, "log_every": 2, "checkpoint_every": 2, "validate_every": 100},
        "cluster": {"workers": 1, "max_failures": 1},
    }
    if kind == "colabator":
        tree["data"]["hazy"] = str(root / "hazy")
        tree["optim"] |= {"ema": 0.5, "lr": 1e-3}
    for name, section in sections.items():
        tree.setdefault(name, {}).update(section)
    if "paired" in tree["data"]:
        del tree["data"]["clear"], tree["data"]["depth"]
    if "type" in sections.get("network", {}):
        tree["network"] = sections["network"]
    path = folder / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(tree))
    (job,) = load_jobs(path)
    assert isinstance(job, TrainingJob)
    return job


def assert_plain_pyfunc_runs(tracking: str, uri: str, folder: Path) -> None:
    """The model restores images of two sizes in a fresh process that imports MLflow alone."""
    code = (
        "import sys, mlflow, numpy as np\n"
        f"mlflow.set_tracking_uri({tracking!r})\n"
        f"model = mlflow.pyfunc.load_model({uri!r})\n"
        "for shape in [(1, 40, 56, 3), (3, 33, 17, 3)]:\n"
        "    images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)\n"
        "    out = model.predict(images)\n"
        "    assert out.shape == shape and out.dtype == np.uint8, (out.shape, out.dtype)\n"
        "    assert (out != images).any()\n"
        "assert 'ray' not in sys.modules\n"
        "print('fine')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert result.stdout.strip().endswith("fine"), result.stderr[-2000:]
