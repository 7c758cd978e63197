"""Local folders that some node of a cluster does not see."""

import os

import pytest
import ray

from corun_ray.service.cluster import shared
from corun_ray.service.cluster.connect import ClusterError
from corun_ray.service.cluster.shared import find_unseen, list_places, refuse_unshared_places
from tests.service.jobs import small_job

NODES = {"id": "10.0.0.2"}


def refuse(monkeypatch, hidden, written, read):
    """Refuses places for a node that sees everything but the folders `hidden`."""

    def ask(nodes, marks, say):
        numbers = find_unseen(marks)
        assert numbers == [], "the driver sees its own marks"
        return {"10.0.0.2": [number for number, mark in enumerate(marks) if mark.path.startswith(tuple(hidden))]}

    monkeypatch.setattr(shared, "_ask_nodes", ask)
    refuse_unshared_places(NODES, written, read, lambda line: None)


def test_a_storage_of_one_machine_is_named_by_its_key_and_nothing_is_left_in_it(monkeypatch, tmp_path, dataset):
    places = {"storage": str(tmp_path / "runs")}, {"data.clear": str(dataset / "clear")}
    refuse(monkeypatch, [], *places)
    with pytest.raises(ClusterError) as error:
        refuse(monkeypatch, [str(tmp_path), str(dataset)], *places)
    lines = str(error.value).splitlines()
    advice = "is not the same folder on 10.0.0.2; expected a URI (s3://…) or a folder that all nodes share"
    assert lines == [f"data.clear: {dataset}/clear {advice}", f"storage: {tmp_path}/runs {advice}"]
    assert os.listdir(tmp_path / "runs") == []


def test_files_of_another_size_are_not_the_same_folder(tmp_path):
    (tmp_path / "image.png").write_bytes(b"1234")
    (mark,) = shared._find_marks({"data.clear": str(tmp_path)})
    assert find_unseen([mark, mark._replace(size_bytes=5), mark._replace(path="/nowhere")]) == [1, 2]


def test_a_job_s_places_are_those_that_its_nodes_use(tmp_path, dataset):
    job = small_job("colabator", dataset, tmp_path)
    written, read = list_places(job)
    assert written == {"storage": job.storage}
    assert read.keys() == {"data.clear", "data.depth", "data.hazy"}


def test_nodes_look_for_the_marks_themselves(local_ray, tmp_path):
    # The one node of the session is the driver's; it looks as another would.
    assert shared.list_other_nodes() == {}
    here = {ray.get_runtime_context().get_node_id(): "10.0.0.2"}
    refuse_unshared_places(here, {"storage": str(tmp_path)}, {}, lambda line: None)
