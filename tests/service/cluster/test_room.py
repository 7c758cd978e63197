"""What fits into a cluster's nodes, what can never fit, and what a person is told of a wait."""

import math
import threading
import time
from collections import Counter

import pytest
import ray
from ray.util import placement_group, placement_group_table

from corun_ray.config.jobs import ClusterSection
from corun_ray.service.cluster import room
from corun_ray.service.cluster.autoscaling import Launches, NodeType
from corun_ray.service.cluster.connect import ClusterError
from corun_ray.service.cluster.room import (
    NodeRoom,
    RoomRequest,
    RoomWatch,
    await_room,
    count_fitting,
    find_waiting_workers,
    free_left_room,
    refuse_misfit,
    request_actor,
    request_workers,
)

THREE_CPUS = {"CPU": 3.0}


def workers(count, cpus, decodes=False):
    return RoomRequest("worker", count, {"CPU": float(cpus)}, decodes, "cluster.workers")


@pytest.mark.parametrize(
    ("each", "node", "count"),
    [
        ({"CPU": 2}, {"CPU": 5}, 2),
        ({"CPU": 0.1}, {"CPU": 0.3}, 3),
        ({"CPU": 1, "GPU": 1}, {"CPU": 8, "GPU": 2}, 2),
        ({"CPU": 1, "GPU": 1}, {"CPU": 8}, 0),
        ({"CPU": 1, "GPU": 0.5}, {"CPU": 8, "GPU": 2}, 4),
        ({"CPU": 1, "GPU": 0.6}, {"CPU": 8, "GPU": 2}, 2),
    ],
)
def test_processes_are_counted_by_the_scarcest_resource_of_a_node(each, node, count):
    assert count_fitting(each, node) == count


@pytest.mark.parametrize(
    ("request_", "fits"),
    [
        (workers(2, 3), True),
        (workers(1, 4), False),
        (workers(3, 2), False),
        (workers(2, 3, decodes=True), False),
        (workers(2, 2, decodes=True), True),
        (workers(4, 1, decodes=True), True),
    ],
)
def test_nodes_are_compared_not_their_sum(request_, fits):
    assert request_.fits([THREE_CPUS, THREE_CPUS]) is fits


def test_what_a_job_asks_for_is_said_with_its_amounts():
    size = ClusterSection(workers=2, cpus_per_worker=4, gpus_per_worker=1)
    assert str(request_workers(size)) == "2 workers of 4 CPUs and 1 GPU each, and 1 CPU to decode images"
    assert str(request_actor([NodeRoom({"CPU": 4, "GPU": 1}, {})])) == "1 process of 1 GPU"
    assert str(request_actor([NodeRoom({"CPU": 4}, {})])) == "1 process of 1 CPU"
    assert str(request_actor([NodeRoom({"CPU": 4}, {})], wants_gpu=True)) == "1 process of 1 GPU"


def test_what_can_never_fit_is_refused_with_the_largest_node_unless_nodes_may_be_added(monkeypatch):
    monkeypatch.setattr(room, "read_nodes", lambda: [NodeRoom(THREE_CPUS, {}), NodeRoom(THREE_CPUS, THREE_CPUS)])
    monkeypatch.setattr(room, "can_autoscale", lambda: False)
    refuse_misfit(workers(2, 3))
    with pytest.raises(ClusterError) as error:
        refuse_misfit(workers(1, 4))
    assert str(error.value) == (
        "cluster: no room for 1 worker of 4 CPUs, ever: the largest node has 3 CPUs, 2 nodes together 6 CPUs; "
        "ask for less (cluster.workers) or add nodes"
    )

    # An autoscaler that does not tell its nodes is trusted; one that does is asked for the largest.
    monkeypatch.setattr(room, "can_autoscale", lambda: True)
    monkeypatch.setattr(room, "read_node_types", lambda: None)
    refuse_misfit(workers(1, 4))


GPU_WORKERS = RoomRequest("worker", 2, {"CPU": 4.0, "GPU": 1.0}, True, "cluster.workers")


@pytest.mark.parametrize(
    ("types", "reason"),
    [
        ([NodeType("cpu", {"CPU": 16}, 9), NodeType("gpu", {"CPU": 4, "GPU": 1}, 4)], None),
        ([NodeType("both", {"CPU": 9, "GPU": 2}, math.inf)], None),
        # The third node of this type has the CPU that decodes.
        ([NodeType("gpu", {"CPU": 4, "GPU": 1}, 3)], None),
        (
            [NodeType("cpu", {"CPU": 16}, 9), NodeType("gpu", {"CPU": 2, "GPU": 1}, 4)],
            "the autoscaler's largest node type, gpu, has 2 CPUs and 1 GPU, at most 4 of it",
        ),
        (
            [NodeType("gpu", {"CPU": 4, "GPU": 1}, 2)],
            "the autoscaler's largest node type, gpu, has 4 CPUs and 1 GPU, at most 2 of it",
        ),
        ([NodeType("cpu", {"CPU": 16}, math.inf)], "the autoscaler's largest node type, cpu, has 16 CPUs and 0 GPUs"),
        ([], "the autoscaler adds no nodes"),
    ],
)
def test_a_group_of_no_nodes_counts_and_one_that_can_never_fit_is_named(monkeypatch, types, reason):
    # Of the type `gpu` there is a node already, and it is among the most that there can be.
    nodes = [NodeRoom({}, {}), NodeRoom({"CPU": 4, "GPU": 1}, {}, "gpu")]
    monkeypatch.setattr(room, "read_nodes", lambda: nodes)
    monkeypatch.setattr(room, "can_autoscale", lambda: True)
    monkeypatch.setattr(room, "read_node_types", lambda: types)
    if reason is None:
        refuse_misfit(GPU_WORKERS)
        return
    with pytest.raises(ClusterError) as error:
        refuse_misfit(GPU_WORKERS)
    assert str(error.value) == (
        "cluster: no room for 2 workers of 4 CPUs and 1 GPU each, and 1 CPU to decode images, ever: the largest node "
        f"has 4 CPUs and 1 GPU, 2 nodes together 4 CPUs and 1 GPU; {reason}; ask for less (cluster.workers) or add "
        "nodes"
    )


def test_a_wait_is_told_within_seconds_and_every_15_s_with_what_has_become_free():
    now_s, free = 0.0, {"CPU": 0.0}
    nodes = [NodeRoom(THREE_CPUS, free), NodeRoom(THREE_CPUS, {"CPU": 1.0})]
    watch = RoomWatch(can_grow=lambda: False, read_launches=Launches, read=lambda: nodes, clock=lambda: now_s)

    def at(time_s, *requests):
        nonlocal now_s
        now_s = time_s
        return watch.update(requests)

    asked = workers(2, 2)
    assert [at(100), at(101, asked), at(104, asked)] == [None] * 3
    assert at(105, asked) == (
        "waiting for room for 2 workers of 2 CPUs each; the largest node has 3 CPUs, 2 nodes together 6 CPUs; "
        "free now: 1 of 6 CPUs"
    )
    free["CPU"] = 1.0
    assert at(119, asked) is None
    assert at(120, asked) == "still waiting for room after 19 s; free now: 2 of 6 CPUs (at most 1 on one node)"

    # Ray Train asks anew every minute: that is no other wait. A wait that has ended is.
    assert [at(125), at(130, asked)] == [None, None]
    assert at(135, asked).startswith("still waiting")
    assert [at(150), at(151, asked), at(154, asked)] == [None] * 3
    assert at(155, asked).startswith("waiting for room for 2 workers")


def test_a_cluster_that_may_add_nodes_is_called_that():
    launches = Launches()
    watch = RoomWatch(
        can_grow=lambda: True,
        read_launches=lambda: launches,
        read=lambda: [NodeRoom(THREE_CPUS, THREE_CPUS)],
        clock=iter([0, 4, 20, 40]).__next__,
    )
    watch.update([workers(1, 4)])
    assert watch.update([workers(1, 4)]).endswith("; the autoscaler may add nodes")

    # What it is at is said, too.
    launches = Launches(Counter({"large": 1}), {"spot": "none left"})
    assert watch.update([workers(1, 4)]) == (
        "still waiting for room after 20 s; free now: 3 of 3 CPUs; starting now: 1 large; spot did not start: none left"
    )
    launches = Launches(unmet=[{"CPU": 4.0}])
    assert watch.update([workers(1, 4)]).endswith("3 of 3 CPUs; the autoscaler can add no node for that now")


def test_a_wait_ends_when_another_job_ends_and_its_workers_are_found_meanwhile(local_ray, monkeypatch):
    monkeypatch.setattr(room, "FIRST_WORD_S", 0.0)
    monkeypatch.setattr(room, "LOOK_EVERY_S", 0.2)
    cpus = ray.cluster_resources()["CPU"]
    holder = ray.remote(num_cpus=cpus)(threading.Event).remote()
    ray.get(holder.__ray_ready__.remote())
    lines = []

    def hear(line):
        # The first line is about what stands in Ray's queue; then the other job ends.
        if not lines:
            lines.extend(map(str, find_waiting_workers()))
            ray.kill(holder)
        lines.append(line)

    with pytest.raises(ClusterError, match=r"no room for 1 worker of 1 CPU within 0\.1 s; free now: 0 of"):
        await_room(workers(1, 1), lambda line: None, limit_s=0.1)

    await_room(workers(1, 1), hear)
    assert lines[0] == "1 worker of 1 CPU"
    assert lines[1].startswith("  waiting for room for 1 worker of 1 CPU; the largest node has")
    assert lines[-1].startswith("  there is room, after ")

    assert wait_for_cpus(cpus) == cpus, "the room is given back"


class GroupMaker:
    """An actor that holds room, and waits for more than there will be."""

    def take(self, cpus: int) -> None:
        self.placed, self.waiting = placement_group([{"CPU": 1}]), placement_group([{"CPU": cpus}])
        assert self.placed.wait(30)


def test_room_that_a_dead_actor_holds_or_waits_for_is_given_back(local_ray):
    cpus = int(ray.cluster_resources()["CPU"])
    makers = [ray.remote(num_cpus=0)(GroupMaker).remote() for _ in range(2)]
    ray.get([maker.take.remote(cpus) for maker in makers])
    own = placement_group([{"CPU": 1}])
    assert own.wait(30) and free_left_room() == 0, "all of them live"

    ray.kill(makers[0])
    assert free_left_room(makers[0]._actor_id.hex()) == 2, "also before Ray has noted the death"
    assert find_waiting_workers() == [RoomRequest("worker", 1, {"CPU": float(cpus)})]

    ray.kill(makers[1])
    given_back, deadline_s = 0, time.monotonic() + 30
    while given_back < 2 and time.monotonic() < deadline_s:
        given_back += free_left_room()
    assert given_back == 2 and placement_group_table(own)["state"] == "CREATED"
    room._remove_group(own)
    assert wait_for_cpus(cpus) == cpus


def test_a_wait_gives_back_what_a_search_that_has_ended_left(local_ray):
    cpus = int(ray.cluster_resources()["CPU"])
    maker = ray.remote(num_cpus=0)(GroupMaker).remote()
    ray.get(maker.take.remote(cpus))
    ray.kill(maker)
    await_room(workers(1, cpus), lambda line: None, limit_s=60)
    assert wait_for_cpus(cpus) == cpus


def wait_for_cpus(cpus: float) -> float:
    """Waits until so many CPUs are free, at most 10 s; returns how many are."""
    deadline_s = time.monotonic() + 10
    while ray.available_resources().get("CPU") != cpus and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return ray.available_resources().get("CPU", 0)
