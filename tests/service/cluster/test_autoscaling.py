"""What the two autoscalers of Ray tell of the nodes that may come."""

import math
from collections import Counter

import pytest
from ray.autoscaler.v2.schema import ClusterStatus, LaunchRequest, NodeInfo
from ray.core.generated.autoscaler_pb2 import ClusterConfig, GetClusterStatusReply

from corun_ray.service.cluster.autoscaling import (
    Launches,
    NodeType,
    has_node_types,
    list_config_types,
    list_group_types,
    list_unmet,
    parse_launches,
    parse_stored_launches,
)


def test_an_autoscaler_is_known_by_the_types_of_its_nodes():
    assert not has_node_types({})
    assert not has_node_types({"autoscaler_report": {"node_type_mapping": {"07be": "node_07be"}}})
    assert has_node_types({"autoscaler_report": {"node_type_mapping": {"07be": "ray.head.default"}}})
    assert has_node_types({"autoscaler_report": {"node_type_mapping": {}, "pending_launches": {"small": 2}}})


def test_node_types_are_those_of_the_configuration_without_the_head():
    gpu = {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 3}
    config = {
        "max_workers": 5,
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 4}, "max_workers": 9},
            "off": {"resources": {"CPU": 4}, "max_workers": 0},
            "gpu": gpu,
            "cpu": {"resources": {"CPU": 16}},
        },
    }
    assert list_config_types(config) == [NodeType("gpu", gpu["resources"], 3), NodeType("cpu", {"CPU": 16}, 5)]

    # One whose machines are left to the cloud tells nothing.
    config["available_node_types"]["any"] = {"resources": {}}
    assert list_config_types(config) is None


def test_node_types_may_be_told_by_a_service():
    config = ClusterConfig()
    for name, cpus, max_nodes in (("a", 4, 2), ("b", 8, -1), ("c", 8, 0)):
        group = config.node_group_configs.add(name=name, max_count=max_nodes)
        group.resources["CPU"] = cpus
    assert list_group_types(config) == [NodeType("a", {"CPU": 4}, 2), NodeType("b", {"CPU": 8}, math.inf)]


@pytest.mark.parametrize(
    ("report", "launches"),
    [
        (None, Launches()),
        (
            {"pending_launches": {"gpu": 1}, "pending_nodes": [["10.0.0.7", "gpu", "setting-up"]]},
            Launches(Counter({"gpu": 2})),
        ),
        (
            {
                "node_availability_summary": {
                    "node_availabilities": {
                        "gpu": {"unavailable_node_information": {"category": "Capacity", "description": "none left"}},
                        "cpu": {"unavailable_node_information": None},
                    }
                }
            },
            Launches(failed={"gpu": "Capacity: none left"}),
        ),
    ],
)
def test_launches_are_read_from_the_status_of_the_first_autoscaler(report, launches):
    assert parse_stored_launches({"autoscaler_report": report}) == launches


def test_launches_are_read_from_the_status_of_the_second_autoscaler():
    status = ClusterStatus(
        pending_launches=[LaunchRequest("", "gpu", 2, LaunchRequest.Status.PENDING, 0)],
        failed_launches=[LaunchRequest("", "spot", 1, LaunchRequest.Status.FAILED, 0, 0, "none left")],
        pending_nodes=[NodeInfo("", "gpu", "i-1", "10.0.0.7")],
    )
    reply = GetClusterStatusReply()
    state = reply.autoscaling_state
    state.infeasible_gang_resource_requests.add().requests.add().resources_bundle["GPU"] = 8
    state.infeasible_resource_requests.add().resources_bundle["CPU"] = 2
    unmet = list_unmet(reply)
    assert unmet == [{"CPU": 2.0}, {"GPU": 8.0}]
    assert parse_launches(status, unmet) == Launches(Counter({"gpu": 3}), {"spot": "none left"}, unmet)
