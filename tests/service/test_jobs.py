"""Preparing the jobs of a file to run."""

from corun_ray.service.cluster.paths import make_paths_absolute
from tests.service.jobs import small_job


def test_every_folder_of_a_job_becomes_absolute_and_uris_stay(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = {
        "paired": {"hazy": "rainy", "clear": "file:///dry"},
        "hazy": "photos",
        "validation": {"hazy": "held"},
        "validation_sets": {"far": {"hazy": "far/hazy", "clear": "far/clear"}, "near": {"hazy": "near"}},
    }
    job = small_job("colabator", dataset, tmp_path, data=data, coherence={"weights": "scorers"})
    absolute = make_paths_absolute(job)
    assert (absolute.data.paired.hazy, absolute.data.paired.clear) == (str(tmp_path / "rainy"), "file:///dry")
    assert (absolute.data.hazy, absolute.data.validation.hazy) == (str(tmp_path / "photos"), str(tmp_path / "held"))
    far, near = absolute.data.validation_sets["far"], absolute.data.validation_sets["near"]
    assert (far.hazy, far.clear) == (str(tmp_path / "far/hazy"), str(tmp_path / "far/clear"))
    assert (near.hazy, near.clear) == (str(tmp_path / "near"), None)
    assert (absolute.coherence.weights, absolute.loss.weights) == (str(tmp_path / "scorers"), None)
    assert make_paths_absolute(absolute) == absolute
