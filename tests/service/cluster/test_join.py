"""What joining a growing cluster adds: a word about GPUs that are not there yet, and a look at the nodes that come."""

import pytest

from corun_ray.config.jobs import ClusterSection, DehazeJob
from corun_ray.service.cluster import join
from corun_ray.service.cluster.autoscaling import NodeType
from corun_ray.service.cluster.join import join_cluster, misses_gpus
from corun_ray.service.cluster.room import NodeRoom
from tests.service.jobs import small_job

CPU_NODE, GPU_NODE = NodeRoom({"CPU": 4}, {}), NodeRoom({"CPU": 4, "GPU": 1}, {})
GPU_TYPE, CPU_TYPE = NodeType("gpu", {"CPU": 4, "GPU": 1}, 2), NodeType("cpu", {"CPU": 4}, 2)


def batch_job(gpus=0.0):
    dehaze = {"input": "in", "output": "out", "model": "corun-small"}
    cluster = ClusterSection(gpus_per_worker=gpus)
    return DehazeJob(kind="dehaze", name="images", dehaze=dehaze, cluster=cluster)


@pytest.mark.parametrize(
    ("gpus", "nodes", "can_grow", "types", "misses"),
    [
        (0, [CPU_NODE], True, [CPU_TYPE, GPU_TYPE], True),
        (0, [CPU_NODE], True, None, True),
        (0, [CPU_NODE], True, [CPU_TYPE], False),
        (0, [CPU_NODE], False, None, False),
        (0, [GPU_NODE], True, [GPU_TYPE], False),
        (1, [CPU_NODE], True, [GPU_TYPE], False),
    ],
)
def test_a_batch_job_is_told_of_gpus_that_could_come(monkeypatch, gpus, nodes, can_grow, types, misses):
    monkeypatch.setattr(join, "can_autoscale", lambda: can_grow)
    monkeypatch.setattr(join, "read_node_types", lambda: types)
    assert misses_gpus(batch_job(gpus), nodes) is misses


def test_a_training_says_itself_what_it_trains_on(dataset, tmp_path):
    assert not misses_gpus(small_job("pretrain", dataset, tmp_path), [CPU_NODE])


def test_a_node_that_comes_while_a_job_waits_is_asked_for_its_folders(monkeypatch):
    done, there, asked = [], {}, []
    monkeypatch.setattr(join, "connect", lambda *sizes: f"a cluster of {1 + len(there)}")
    monkeypatch.setattr(join, "list_other_nodes", lambda has_pool=False: dict(there))
    monkeypatch.setattr(join, "read_nodes", lambda: [CPU_NODE])
    monkeypatch.setattr(join, "misses_gpus", lambda job, nodes: True)
    monkeypatch.setattr(join, "refuse_unshared", lambda job, say, places: done.append(f"looked at {len(there)}"))

    def come(request, say):
        asked.append(str(request))
        there["id"] = "10.0.0.7"

    monkeypatch.setattr(join, "await_room", come)
    assert join_cluster(batch_job(), done.append) == "a cluster of 2"
    assert done == ["looked at 0", join.GPU_ADVICE, "looked at 1"]

    # Where no node comes, none is asked again; a GPU that is asked for is waited for.
    done.clear()
    assert join_cluster(batch_job(1), done.append) == "a cluster of 2"
    assert done == ["looked at 1", join.GPU_ADVICE] and asked == ["1 process of 1 CPU", "1 process of 1 GPU"]
