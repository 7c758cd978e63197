"""What `corun-ray check` says of a job's images."""

import shutil

import pytest
import torch

from corun_ray.config.loading import build_job
from corun_ray.core.networks.corun import CORUN
from corun_ray.service.check import check_job
from tests.service.jobs import small_job
from tests.unusable import damage, draw_damaged_validation, draw_larger_truth, draw_unusable_depth


def test_pairs_and_every_held_out_set_are_looked_at(dataset, tmp_path):
    truth = {"hazy": str(dataset / "hazy"), "clear": str(dataset / "hazy_truth")}
    sets = {"far": {"hazy": str(dataset / "clear")}, "near": truth}
    data = {"paired": truth, "validation": truth, "validation_sets": sets}
    notes, mistakes = check_job(small_job("colabator", dataset, tmp_path, data=data), [])
    assert mistakes == []
    assert notes[:9] == [
        "data      6 pairs of degraded and clean images, 6 real hazy",
        "validate  6 images, measured as val/...",
        "validate  8 images, measured as val/far/...",
        "validate  6 images, measured as val/near/...",
        "opened    data.paired: all, none unusable",
        "opened    data.hazy: all, none unusable",
        "opened    data.validation: all, none unusable",
        "opened    data.validation_sets.far: all, none unusable",
        "opened    data.validation_sets.near: all, none unusable",
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
    torch.save({"params": CORUN(2, 4).state_dict()}, tmp_path / "net.pth")
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


def unusable(notes):
    """The files that a check names, by name, with their reasons."""
    lines = [note.removeprefix("unusable  ") for note in notes if note.startswith("unusable ")]
    return {line.partition(": ")[0].rpartition("/")[2]: line.partition(": ")[2] for line in lines}


def test_every_unusable_image_is_named_with_its_reason(tmp_path):
    root = draw_damaged_validation(tmp_path / "held")
    data = {"depth": None, "validation": {"hazy": str(root / "hazy"), "clear": str(root / "clear")}}
    notes, mistakes = check_job(small_job("pretrain", root, tmp_path, data=data), [])
    assert mistakes == [] and unusable(notes) == {"0002.jpg": "truncated JPEG"}

    root = draw_unusable_depth(tmp_path / "depth")
    notes, (mistake,) = check_job(small_job("pretrain", root, tmp_path), [])
    assert list(unusable(notes)) == ["constant.npy", "nan.npy", "turned.npy"]
    assert mistake.startswith("4 of 6 images cannot be used, more than data.max_bad_fraction (0.01)")

    root = draw_larger_truth(tmp_path / "larger")
    held = {"hazy": str(root / "hazy"), "clear": str(root / "gt")}
    data = {"clear": str(root / "gt"), "depth": None, "validation": held}
    notes, (mistake,) = check_job(small_job("pretrain", root, tmp_path, data=data), [])
    assert len(unusable(notes)) == 3 and "(crop_truth: true" in mistake


@pytest.fixture
def half(dataset, tmp_path):
    """A folder of hazy images whose first is damaged, and one of damaged images alone."""
    shutil.copytree(dataset / "hazy", tmp_path / "half")
    damage(tmp_path / "half/photo_0.png")
    (tmp_path / "none").mkdir()
    shutil.copy(tmp_path / "half/photo_0.png", tmp_path / "none")
    return tmp_path


@pytest.mark.parametrize("kind", ["dehaze", "evaluate", "depth"])
def test_the_images_of_other_jobs_are_opened_too(kind, half):
    def check(folder):
        sections = {
            "dehaze": {"input": folder, "output": str(half / "out"), "model": "corun-small"},
            "evaluate": {"hazy": folder, "baselines": ("hazy",), "metrics": ("fade",)},
            "depth": {"input": folder, "output": str(half / "out"), "weights": folder},
        }
        tree = {"kind": kind, "name": "s", "storage": str(half), kind: sections[kind]}
        notes, mistakes = check_job(build_job(tree), [])
        return unusable(notes), [line for line in mistakes if "weights" not in line]

    expected = {"photo_0.png": "truncated PNG"}
    assert check(str(half / "half")) == (expected, [])
    found, (mistake,) = check(str(half / "none"))
    assert found == expected and "none of the 1 images can be used; the first: " in mistake


def test_models_that_do_not_load_are_told_apart_by_their_keys(dataset, tmp_path):
    (tmp_path / "empty.pth").touch()
    torch.save({"params": CORUN(3, 4).state_dict()}, tmp_path / "three.pth")
    for name, expected in (("empty", "network.init: "), ("three", "network.stages: 2, but")):
        job = small_job("pretrain", dataset, tmp_path, network={"init": str(tmp_path / f"{name}.pth")})
        (mistake,) = check_job(job, [])[1]
        assert mistake.startswith(expected) and str(tmp_path / f"{name}.pth") in mistake

    models = {"a": str(tmp_path / "empty.pth"), "b": str(tmp_path / "three.pth"), "c": str(tmp_path / "none.pth")}
    section = {"hazy": str(dataset / "hazy"), "metrics": ("fade",), "models": models}
    tree = {"kind": "evaluate", "name": "s", "storage": str(tmp_path), "evaluate": section}
    notes, mistakes = check_job(build_job(tree), [])
    assert [line.split(":")[0] for line in mistakes] == ["evaluate.models.a", "evaluate.models.c"]
    assert f"model     {tmp_path}/three.pth" in notes


def test_a_learning_rate_that_ends_before_the_training(dataset, tmp_path):
    cycles = {"cycles": [{"steps": 1, "lr": 1e-3, "min_lr": 1e-4}, {"steps": 2, "lr": 1e-3, "min_lr": 1e-5}]}
    mistakes = check_job(small_job("pretrain", dataset, tmp_path, optim=cycles), [])[1]
    assert mistakes == ["optim.cycles: end at step 3: the other 1 of train.steps have its last rate, 1e-05"]
    assert check_job(small_job("pretrain", dataset, tmp_path, optim=cycles, train={"steps": 3}), [])[1] == []
    early = {"lr": 1e-3, "min_lr": 1e-4, "schedule_steps": 2}
    notes, mistakes = check_job(small_job("pretrain", dataset, tmp_path, optim=early), [])
    note = "schedule  optim.schedule_steps: ends at step 2: the other 2 of train.steps have optim.min_lr, 0.0001"
    assert note in notes and mistakes == []


def test_who_makes_the_pixels_is_told_where_it_is_the_workers(dataset, tmp_path):
    for gpus, device in ((0, "CPUs"), (1, "GPUs")):
        sections = {"data": {"synthesis": "worker"}, "cluster": {"gpus_per_worker": gpus}}
        notes = check_job(small_job("pretrain", dataset, tmp_path, **sections), [])[0]
        made = f"haze, noise, JPEG and strong views are made by the training workers, on their {device}"
        assert f"synthesis {made}" in notes
    notes = check_job(small_job("pretrain", dataset, tmp_path), [])[0]
    assert not any(note.startswith("synthesis") for note in notes)


def test_a_search_is_checked_by_all_its_values(dataset, half):
    """Images are held against the largest patch, and every folder and model is looked at."""
    tree = small_job("colabator", dataset, half).model_dump() | {"kind": "tune"}
    search = {
        "data.patch_px": (32, 128),
        "data.hazy": (str(dataset / "hazy"), str(half / "none")),
        "network.init": (None, str(half / "none.pth")),
    }
    tree["data"]["validation"] = {"hazy": str(dataset / "hazy")}
    notes, mistakes = check_job(build_job(tree | {"tune": {"search": search}}), [])
    assert [line.split(":")[0] for line in mistakes] == ["data.hazy", "network.init"]
    smaller = [note for note in notes if note.startswith("smaller")]
    assert "data.clear and data.depth: 8 of 8 opened are smaller than a patch of 128 px" in smaller[0]
