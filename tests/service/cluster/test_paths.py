"""Relative folders of a job file: workers do not run where the driver runs."""

from corun_ray.config.jobs import KINDS
from corun_ray.config.reference import list_keys
from corun_ray.service.cluster.paths import FOLDER_KEYS, make_paths_absolute
from tests.jobtexts import COLABATOR, load_training


def test_every_key_that_names_a_folder_is_known() -> None:
    """The descriptions say which keys do."""
    described = set()
    for kind in KINDS.values():
        for path, field in list_keys(kind).items():
            if (field.description or "").startswith("folder"):
                described.add(path.replace("validation_sets.", "validation_sets.*."))
    missing = described - set(FOLDER_KEYS)
    assert missing == set()
    assert {"storage", "data.clear", "data.validation.transmission", "evaluate.hazy"} <= described


def test_relative_folders_become_absolute(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    validation = "data.validation={hazy: a/hazy, clear: /b/clear, transmission: light}"
    job = make_paths_absolute(load_training(tmp_path, COLABATOR, validation))
    assert job.data.validation.hazy == f"{tmp_path}/a/hazy"
    assert job.data.validation.clear == "/b/clear"
    assert job.data.validation.transmission == f"{tmp_path}/light"
