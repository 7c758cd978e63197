"""When a stalled run is reported to its user."""

import pytest
import ray

from corun_ray.service.train.follower import FirstStepWatch, NodeWatch, StallDetector


@pytest.fixture
def run():
    """A run that is at a step at a time, in a cluster of so many nodes; returns what is said."""
    now, there_are = 0.0, ""
    stalls = StallDetector(lambda: there_are, clock=lambda: now)

    def at(time_s, step, nodes="2 nodes"):
        nonlocal now, there_are
        now, there_are = time_s, nodes
        return stalls.update(step)

    return at


def test_nothing_is_said_before_the_first_step_nor_of_short_pauses(run):
    assert [run(100, 0), run(101, 1), run(110, 1), run(114, 2), run(128, 2)] == [None] * 5


def test_a_pause_is_told_of_when_it_is_long_and_again_when_it_is_twice_as_long(run):
    assert [run(0, 7), run(14, 7)] == [None, None]
    assert run(15, 7) == "no step for 15 s after step 7 (2 nodes)"
    assert [run(16, 7), run(29, 7)] == [None, None]
    assert run(30, 7) == "no step for 30 s after step 7 (2 nodes)"
    assert run(42, 8) == "steps continue after 42 s"
    assert run(43, 9) is None


def test_news_of_the_nodes_is_told_at_once_while_a_pause_lasts(run):
    run(0, 7)
    assert run(10, 7, "1 node") is None, "no pause yet"
    assert run(15, 7) == "no step for 15 s after step 7 (2 nodes)"
    assert run(20, 7, "1 node") == "no step for 20 s after step 7 (1 node)"
    assert [run(21, 7, "1 node"), run(29, 7, "1 node")] == [None, None]
    assert run(30, 7, "1 node") == "no step for 30 s after step 7 (1 node)"


def test_pauses_as_long_as_one_before_are_the_job_s_own(run):
    run(0, 1)
    assert run(20, 1) and run(21, 2)
    assert [run(61, 2), run(62, 3)] == [None, None], "not twice as long"
    assert run(62 + 83, 3) is not None


def test_going_back_to_an_earlier_step_ends_a_pause(run):
    run(0, 8)
    assert run(20, 8)
    assert run(25, 7) == "steps continue after 25 s"


def test_lost_nodes_are_those_that_the_cluster_had_at_first(monkeypatch):
    def node(name, address, is_alive):
        return {"NodeID": name, "NodeManagerAddress": address, "Alive": is_alive}

    nodes = [node("a", "10.0.0.1", True), node("b", "10.0.0.2", True), node("old", "10.0.0.3", False)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    watch = NodeWatch()
    assert watch() == "2 nodes in the cluster"
    nodes[1]["Alive"] = False
    assert watch() == "1 node in the cluster, lost: 10.0.0.2"
    nodes.append(node("b2", "10.0.0.2", True))
    assert watch() == "2 nodes in the cluster", "it has come back"


def test_a_first_step_that_is_long_in_coming_is_told_with_what_is_free():
    now = 0.0
    watch = FirstStepWatch(lambda: "free now: 0 of 6 CPUs", clock=lambda: now)

    def at(time_s, step, num_attempts):
        nonlocal now
        now = time_s
        return watch.update(step, num_attempts)

    assert [at(100, 0, 0), at(110, 0, 1), at(139, 0, 1)] == [None] * 3, "the workers have not started before 110"
    assert at(140, 0, 1) == "no step yet, 30 s after the workers started (free now: 0 of 6 CPUs)"
    assert at(169, 0, 1) is None
    assert at(170, 0, 2) == "no step yet, 60 s after the workers started (free now: 0 of 6 CPUs)"
    assert at(400, 1, 2) is None
