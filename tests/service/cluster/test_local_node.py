"""A local Ray has the processes that it needs, and no others."""

import ray._private.node
from ray._private.node import Node

from corun_ray.service.cluster.local_node import LocalNode, starting_few_processes


def test_only_the_processes_that_a_single_node_needs_start(local_ray):
    assert sorted(ray._private.worker._global_node.all_processes) == ["gcs_server", "raylet"]
    assert ray._private.node.Node is Node


def test_ray_starts_what_is_left_out_by_these_methods():
    with starting_few_processes():
        assert ray._private.node.Node is LocalNode
    for name in ("start_monitor", "start_api_server", "start_log_monitor"):
        assert hasattr(Node, name), f"Ray calls {name} by another name now"
