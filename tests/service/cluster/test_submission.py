"""What is handed to the Jobs API with a job file."""

from pathlib import Path

import pytest

from corun_ray.config.loading import JobFileError
from corun_ray.service.cluster.submission import prepare_submission
from tests import ROOT
from tests.jobtexts import COLABATOR, DEHAZE, DEPTH, EVALUATE, TUNE

JOBS = ROOT / "jobs"
ABSOLUTE = (
    "kind: pretrain\nname: p\nstorage: /runs\ndata: {clear: 's3://haze/clear'}\ntracking: {uri: 'http://m:5000'}\n"
)


def written(folder: Path, text: str) -> Path:
    path = folder / "My_Job.yaml"
    path.write_text(text)
    return path


def refused(path: Path, *overrides: str, **options) -> list[str]:
    with pytest.raises(JobFileError) as caught:
        prepare_submission(path, overrides, **options)
    return caught.value.lines


def test_a_job_of_the_checkout_goes_with_it_and_with_the_variables_that_it_names() -> None:
    env = {
        "CORUN_DATA": "s3://haze",
        "CORUN_STORAGE": "s3://runs",
        "MLFLOW_TRACKING_URI": "http://m:5000",
        "HOME": "/me",
    }
    more_env = ["HOME", "A=b=c"]
    sent = prepare_submission(JOBS / "colabator.yaml", ["train.steps=7 "], resume=True, env=env, more_env=more_env)
    assert sent.name == "colabator"
    assert sent.entrypoint == ("python3 -m corun_ray run jobs/colabator.yaml --set 'train.steps=7 ' --resume")
    assert (sent.working_dir / "corun_ray" / "__main__.py").exists() and sent.py_modules == ()
    assert sent.env == {**env, "A": "b=c"}
    assert sent.metadata == {"jobs": "colabator", "kinds": "colabator"}


def test_a_job_of_another_folder_goes_with_that_and_our_package(tmp_path: Path) -> None:
    sent = prepare_submission(written(tmp_path, ABSOLUTE), env={"SECRET": "x"})
    assert sent.working_dir == tmp_path and [module.name for module in sent.py_modules] == ["corun_ray"]
    assert sent.entrypoint.endswith("run My_Job.yaml") and sent.name == "p" and sent.env == {}


def test_a_pipeline_is_called_like_its_file(tmp_path: Path) -> None:
    text = f"{ABSOLUTE}---\n{ABSOLUTE.replace('name: p', 'name: q')}"
    sent = prepare_submission(written(tmp_path, text), env={})
    assert (sent.name, sent.metadata["jobs"]) == ("my_job", "p,q")
    assert prepare_submission(written(tmp_path, text), name="other", env={}).name == "other"


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        (COLABATOR, ["storage", "data.clear", "data.hazy"]),
        (TUNE, ["storage", "data.clear", "data.hazy", "data.validation.hazy"]),
        (
            EVALUATE.replace("hazy}", "hazy, models: {old: models:/m/1, new: net.pth}}"),
            ["storage", "evaluate.hazy", "evaluate.models.new"],
        ),
        (DEHAZE, ["storage", "dehaze.input", "dehaze.output", "dehaze.model"]),
        (DEPTH, ["storage", "depth.input", "depth.output", "depth.weights"]),
    ],
)
def test_relative_places_are_refused_key_by_key(tmp_path: Path, text: str, keys: list[str]) -> None:
    lines = refused(written(tmp_path, text), env={})
    assert [line.split(":")[0] for line in lines] == keys
    assert all("is relative, and a submitted job runs on the cluster" in line for line in lines)


def test_a_relative_database_a_searched_folder_and_a_checkpoint_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, ABSOLUTE)
    lines = refused(path, "tracking.uri=sqlite:///runs/mlflow.db", "network.init=old/net.pth", env={})
    assert [line.split(":")[0] for line in lines] == ["network.init", "tracking.uri"]
    absolute = ["tracking.uri=sqlite:////runs/mlflow.db", "network.init=models:/m@champion"]
    assert prepare_submission(path, absolute, env={})


def test_a_shipped_model_is_no_relative_place(tmp_path: Path) -> None:
    assert prepare_submission(written(tmp_path, ABSOLUTE), ["network.init=corun-small"], env={})
    lines = refused(written(tmp_path, DEHAZE), "dehaze.input=corun-small", "dehaze.model=corun-small", env={})
    assert [line.split(":")[0] for line in lines] == ["storage", "dehaze.input", "dehaze.output"]


def test_variables_without_a_value_are_named(tmp_path: Path) -> None:
    assert refused(written(tmp_path, ABSOLUTE), env={}, more_env=["NOT_SET"]) == [
        "--env NOT_SET: not set here (or NAME=VALUE)"
    ]
