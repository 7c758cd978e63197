"""Whether a cluster adds nodes by itself."""

import json
from collections.abc import Mapping
from typing import Any

import ray
from ray._private.state import state
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.experimental.internal_kv import _internal_kv_get

STATUS_KEY = "__autoscaling_status"
"""Where Ray's autoscaler stores its status as JSON."""
FIXED_NODE = "node_"
"""How Ray names the type of a node that it has not started itself; the node's id follows."""


def can_autoscale() -> bool:
    """Tell whether the connected cluster may add nodes for a job that waits."""
    # Some services tell Ray the nodes that they could start.
    config = state.get_cluster_config()
    if config is not None and config.node_group_configs:
        return True

    # The second version of Ray's autoscaler answers by a call, the first by a stored status.
    if is_autoscaler_v2():
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        nodes = [*status.active_nodes, *status.idle_nodes]
        return any(not node.ray_node_type_name.startswith(FIXED_NODE) for node in nodes)

    content = _internal_kv_get(STATUS_KEY)
    return has_node_types(json.loads(content)) if content else False


def has_node_types(status: Mapping[str, Any]) -> bool:
    """Tell whether the autoscaler's status names nodes by types of a configuration.

    Every head runs an autoscaler. Without a configuration, each node has a type of its own.
    """
    report = status.get("autoscaler_report") or {}
    types = {*(report.get("node_type_mapping") or {}).values(), *(report.get("pending_launches") or {})}
    return any(not name.startswith(FIXED_NODE) for name in types)
