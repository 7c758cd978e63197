"""What `corun-ray check` says of a job's images."""

from corun_ray.config.loading import build_job
from corun_ray.service.check import check_job
from tests.service.jobs import small_job


def test_pairs_and_every_held_out_set_are_looked_at(dataset, tmp_path):
    truth = {"hazy": str(dataset / "hazy"), "clear": str(dataset / "hazy_truth")}
    sets = {"far": {"hazy": str(dataset / "clear")}, "near": truth}
    data = {"paired": truth, "validation": truth, "validation_sets": sets}
    notes, mistakes = check_job(small_job("colabator", dataset, tmp_path, data=data), [])
    assert mistakes == []
    assert notes[:4] == [
        "data      6 pairs of degraded and clean images, 6 real hazy",
        "validate  6 images, measured as val/...",
        "validate  8 images, measured as val/far/...",
        "validate  6 images, measured as val/near/...",
    ]


def test_a_wrong_set_or_pair_is_one_line_that_names_its_key(dataset, tmp_path):
    wrong = {"hazy": str(dataset / "hazy"), "clear": str(dataset / "clear")}
    for data, expected in (
        ({"validation_sets": {"far": wrong}}, "data.validation_sets.far.clear: 6 of 6 hazy images have no truth"),
        ({"paired": wrong}, "data.paired.clear: none of the 8 images"),
    ):
        _, mistakes = check_job(small_job("pretrain", dataset, tmp_path, data=data), [])
        (mistake,) = mistakes
        assert mistake.startswith(expected)


def test_what_a_serve_job_would_use(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "net.pth").touch()
    section = {"model": str(tmp_path / "net.pth"), "replicas": (1, 3), "cpus_per_replica": 2.0}
    tree = {"kind": "serve", "name": "s", "storage": str(tmp_path), "serve": section}
    notes, mistakes = check_job(build_job(tree), [])
    assert mistakes == [] and f"model     {tmp_path}/net.pth" in notes
    assert notes[-2:] == [
        "serves    127.0.0.1, port 8000, path /",
        "machines  1 to 3 replicas; at least 3 CPUs and 0 GPUs in all, on a local Ray",
    ]
    _, mistakes = check_job(build_job(tree | {"serve": section | {"model": "/none", "gpus_per_replica": 64.0}}), [])
    assert [line.split(":")[0] for line in mistakes] == ["serve.model", "serve.gpus_per_replica"]


def test_a_shipped_model_is_there_and_an_unknown_name_is_not(tmp_path):
    tree = {"kind": "serve", "name": "s", "storage": str(tmp_path), "serve": {"model": "corun-small"}}
    notes, mistakes = check_job(build_job(tree), [])
    assert mistakes == [] and "model     corun-small, which comes with this package" in notes
    _, mistakes = check_job(build_job(tree | {"serve": {"model": "corun-smal"}}), [])
    assert mistakes == [
        "serve.model: nothing at corun-smal (expected a checkpoint folder, a .pth, an MLflow URI or corun-small)"
    ]
