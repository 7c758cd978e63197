"""What the version before the rooms made, and what today's makes of it.

`data/before_rooms.tar.xz` holds what that version wrote, on images of 48 x 56 px: a finished pre-training whose model
is registered as `before`, a Colabator run that was killed after its checkpoint of step 4, its label pool, a pack of the
clear images, and the database of MLflow as SQL. `@FOLDER@` stands for the folder in which the files were made.
"""

import pickle
import sqlite3
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mlflow import MlflowClient

from corun_ray.cli import main
from corun_ray.config.jobs import TuneJob
from corun_ray.config.loading import load_jobs
from corun_ray.core.data.samples import SAMPLES_VERSION
from corun_ray.core.inference.restore import restore, to_image, to_tensor
from corun_ray.core.training.precision import choose_precision, judge_bfloat16, read_processor
from corun_ray.service.data.manifest import build_manifest
from corun_ray.service.models.sources import fetch_model
from corun_ray.service.models.tracking import get_tracking_uri
from corun_ray.service.pool.source import find_saved_pool
from corun_ray.service.runs.record import ResumeError, find_last_run, read_record, write_record
from corun_ray.service.storage import locate
from corun_ray.service.telemetry.console import Console
from corun_ray.service.train.driver import run_training
from corun_ray.service.tune.search import run_search
from tests import DATA

STOPPED, FINISHED = "stopped-20261128-031955", "before-20261128-031727"


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, unpacked, with its own path where it was made elsewhere."""
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(DATA / "before_rooms.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        content = file.read_bytes()
        if b"@FOLDER@" in content:
            file.write_bytes(content.replace(b"@FOLDER@", str(folder).encode()))
    with sqlite3.connect(folder / "runs" / "mlflow.db") as database:
        database.executescript((folder / "runs" / "mlflow.sql").read_text())
    return folder


@pytest.fixture
def tracking(earlier: Path) -> str:
    return f"sqlite:///{earlier}/runs/mlflow.db"


def test_a_pool_is_read(earlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["pool", "ls", str(earlier / "runs" / STOPPED / "pool" / "step_00000004.json")])
    assert ended.value.code == 0 and "as of step 4" in capsys.readouterr().out

    pool = find_saved_pool(str(earlier / "runs" / STOPPED / "pool"))
    index = pool.read_index()
    assert sorted(index) == ["hazy_0.png", "hazy_1.png", "hazy_2.png"]
    label = pool.read_label("hazy_1.png", index["hazy_1.png"][1])
    assert label.scene.shape == (3, 32, 32) and label.scene.dtype == np.uint8 and 0 < label.scene.mean() < 255


def test_a_pack_holds_the_bytes_of_its_folder(earlier: Path) -> None:
    tree = yaml.safe_load((earlier / "pretrain.yaml").read_text())
    manifests = []
    for clear, depth in (("clear", "depth"), ("packed", "packed")):
        tree["data"] |= {"clear": str(earlier / clear), "depth": str(earlier / depth)}
        file = earlier / f"from_{clear}.yaml"
        file.write_text(yaml.safe_dump(tree))
        (job,) = load_jobs(file)
        manifests.append((job, build_manifest(job)))
    (job, plain), (packed_job, packed) = manifests
    assert plain.clear == packed.clear == tuple(f"clear_{number}.png" for number in range(4))
    for key in plain.clear:
        assert plain.read_image(job.data.clear, key) == packed.read_image(packed_job.data.clear, key)


def test_a_registered_model_restores_as_its_own_code_does(earlier: Path, tracking: str) -> None:
    """Its code travels with it: a process that has not imported this package needs nothing else."""
    code = (
        "import sys, mlflow, numpy as np\n"
        f"mlflow.set_tracking_uri({tracking!r})\n"
        "images = np.random.default_rng(0).integers(0, 256, (1, 40, 56, 3)).astype(np.uint8)\n"
        "np.save('theirs.npy', mlflow.pyfunc.load_model('models:/before@champion').predict(images))\n"
        "mlflow.pytorch.load_model('models:/before@champion')\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=earlier, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]

    model = fetch_model("models:/before@champion", tracking)
    images = np.random.default_rng(0).integers(0, 256, (1, 40, 56, 3)).astype(np.uint8)
    with torch.inference_mode():
        scene = restore(model.build().eval(), to_tensor(images[0])).scene
    difference = to_image(scene).astype(int) - np.load(earlier / "theirs.npy")[0]
    assert np.abs(difference).max() <= 1 and (np.load(earlier / "theirs.npy") != images).any()


def test_a_checkpoint_is_a_model(earlier: Path, tracking: str) -> None:
    registered = fetch_model("models:/before/1", tracking).build().state_dict()
    saved = fetch_model(str(earlier / "runs" / FINISHED / "checkpoint_00000004"), tracking).build().state_dict()
    assert registered.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in registered.items())


def test_a_run_resumes(
    earlier: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Places are remembered by their text, and a relative one is elsewhere now.
    monkeypatch.chdir(earlier)
    locate.cache_clear()
    here = [f"data.{name}={earlier / name}" for name in ("clear", "depth", "hazy")]
    (job,) = load_jobs(earlier / "colabator.yaml", ["train.steps=8", *here])
    run = find_last_run(job)
    assert run is not None and run.name == STOPPED

    # Samples have changed since. The run's other files are as good as ever, which shows where its record says so.
    with pytest.raises(ResumeError, match="samples: made in another way"):
        run_training(job, Console(), earlier, resume=True)
    write_record(run, read_record(run).model_copy(update={"samples": SAMPLES_VERSION}))

    run_training(job, Console(), earlier, resume=True)
    said = capsys.readouterr().out
    assert STOPPED in said and "step 8/8" in said and "step 1/8" not in said
    assert (earlier / "runs" / STOPPED / "checkpoint_00000008" / "network.pth").exists()

    # That version knew no `auto`. What the workers choose is told, recorded with the run and in MLflow.
    chosen = str(choose_precision("auto", judge_bfloat16(read_processor(torch.device("cpu")))))
    assert "optim.precision fp32 -> auto" in said and f"\n  precision {chosen}\n" in said
    record = read_record(run)
    assert record.precision == chosen
    tags = MlflowClient(get_tracking_uri(job)).get_run(record.mlflow_run).data.tags
    assert tags["corun_ray.precision"] == chosen

    # A run that has all its steps needs no more samples.
    (job,) = load_jobs(earlier / "pretrain.yaml", here[:2])
    assert run_training(job, Console(), earlier, resume=True) == "models:/before/1"


def test_a_search_that_names_modules_of_old_is_refused_in_a_line(
    earlier: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Tune keeps a search as a pickle, which names functions by their modules."""
    # Places are remembered by their text, and a relative one is elsewhere now.
    monkeypatch.chdir(earlier)
    locate.cache_clear()
    tree = yaml.safe_load((earlier / "colabator.yaml").read_text())
    tree |= {"kind": "tune", "name": "search", "tune": {"search": {"network.stages": [2, 3]}, "metric": "val/fade"}}
    tree["data"]["validation"] = {"hazy": "hazy"}
    (earlier / "tune.yaml").write_text(yaml.safe_dump(tree))
    (job,) = load_jobs(earlier / "tune.yaml")
    assert isinstance(job, TuneJob)

    # A search of today that is stopped before its first trial, whose pickle then names a module that is gone.
    monkeypatch.setattr("ray.tune.Tuner.fit", lambda tuner: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_search(job, Console(), earlier)
    run = find_last_run(job)
    assert run is not None
    gone = types.ModuleType("corun_ray.service.tune_progress")
    gone.TrialLines = type("TrialLines", (), {"__module__": gone.__name__})  # type: ignore[attr-defined]
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, gone.__name__, gone)
        state = pickle.dumps(gone.TrialLines())  # type: ignore[attr-defined]
    (Path(run.path) / "search").mkdir(exist_ok=True)
    (Path(run.path) / "search" / "tuner.pkl").write_bytes(state)
    with pytest.raises(ResumeError, match=r"^--resume: .*was begun by another version of corun_ray.*") as refused:
        run_search(job, Console(), earlier, resume=True)
    assert "\n" not in str(refused.value)
