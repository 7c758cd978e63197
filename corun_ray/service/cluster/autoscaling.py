"""Whether a cluster adds nodes by itself, of which types, and what its autoscaler is at.

Ray has two autoscalers. The first stores its status as JSON, the second answers a call. Neither tells a client what its
nodes will have; some services do, and where the autoscaler runs on this machine its own configuration can be read.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import psutil
import ray
import yaml
from ray._private.state import state
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
from ray.autoscaler.v2.schema import ClusterStatus
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.core.generated.autoscaler_pb2 import (  # type: ignore[attr-defined]  # made at import
    ClusterConfig,
    GetClusterStatusReply,
)
from ray.experimental.internal_kv import _internal_kv_get

STATUS_KEY = "__autoscaling_status"
"""Where Ray's first autoscaler stores its status as JSON."""
FIXED_NODE = "node_"
"""How Ray names the type of a node that it has not started itself; the node's id follows."""
MONITORS = ("autoscaler/_private/monitor.py", "autoscaler/v2/monitor.py")
"""The programs of the two autoscalers."""
CONFIG_OPTION = "--autoscaling-config="


class NodeType(NamedTuple):
    """A type of node that the autoscaler may add."""

    name: str
    resources: Mapping[str, float]
    max_nodes: float
    """The most nodes of the type; infinite where there is no limit."""


@dataclass(frozen=True)
class Launches:
    """What the autoscaler is at."""

    starting: Counter[str] = field(default_factory=Counter)
    """Node type → nodes that are on their way."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Node type → why its last node did not start."""
    unmet: Sequence[Mapping[str, float]] = ()
    """Resources of processes for which it can add no node, as far as it says."""

    def __str__(self) -> str:
        texts = []
        if self.starting:
            nodes = ", ".join(f"{count} {name}" for name, count in sorted(self.starting.items()))
            texts.append(f"starting now: {nodes}")
        for name, reason in sorted(self.failed.items()):
            texts.append(f"{name} did not start: {reason}")
        return "; ".join(texts)


# --- Whether nodes may come ---


def can_autoscale() -> bool:
    """Tell whether the connected cluster may add nodes for a job that waits."""
    # Its node types may be known, as some services tell them, and as the head's own machine does.
    types = read_node_types()
    if types is not None:
        return bool(types)

    # Every head runs an autoscaler. Without a configuration, each node has a type of its own.
    if is_autoscaler_v2():
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        nodes = [*status.active_nodes, *status.idle_nodes]
        return any(not node.ray_node_type_name.startswith(FIXED_NODE) for node in nodes)
    return has_node_types(_read_stored_status())


def has_node_types(status: Mapping[str, Any]) -> bool:
    """Tell whether the first autoscaler's status names nodes by types of a configuration."""
    report = status.get("autoscaler_report") or {}
    types = {*(report.get("node_type_mapping") or {}).values(), *(report.get("pending_launches") or {})}
    return any(not name.startswith(FIXED_NODE) for name in types)


def _read_stored_status() -> dict[str, Any]:
    """Read the status of Ray's first autoscaler; it is empty where there is none."""
    content = _internal_kv_get(STATUS_KEY)
    return json.loads(content) if content else {}


# --- Which nodes may come ---


def read_node_types() -> list[NodeType] | None:
    """Read the types of nodes that the connected cluster may add; None where nothing here tells them."""
    config = state.get_cluster_config()
    if config is not None and config.node_group_configs:
        return list_group_types(config)

    content = _read_autoscaler_config(ray.get_runtime_context().get_session_name())
    return None if content is None else list_config_types(content)


def list_group_types(config: ClusterConfig) -> list[NodeType]:
    """List the node types that a service has told Ray."""
    types = []
    for group in config.node_group_configs:
        max_nodes = math.inf if group.max_count < 0 else group.max_count
        if max_nodes:
            types.append(NodeType(group.name, dict(group.resources), max_nodes))
    return types


def list_config_types(config: Mapping[str, Any]) -> list[NodeType] | None:
    """List the node types of an autoscaler's configuration; None where one names neither CPUs nor GPUs."""
    most = config.get("max_workers", math.inf)
    types = []
    for name, entry in config["available_node_types"].items():
        max_nodes = min(entry.get("max_workers", most), most)
        if name == config.get("head_node_type") or not max_nodes:
            continue
        resources = entry.get("resources") or {}
        if not resources.keys() & {"CPU", "GPU"}:
            return None
        types.append(NodeType(name, resources, max_nodes))
    return types


def _read_autoscaler_config(session: str) -> dict[str, Any] | None:
    """Read the configuration of the autoscaler of Ray's session, if it runs on this machine and was given one."""
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        is_monitor = any(part.endswith(MONITORS) for part in command)
        if not is_monitor or not any(part.endswith(f"/{session}/logs") for part in command):
            continue

        path = next((part.removeprefix(CONFIG_OPTION) for part in command if part.startswith(CONFIG_OPTION)), None)
        try:
            with open(path or "", encoding="utf-8") as file:
                content = yaml.safe_load(file)
        except (OSError, UnicodeError, yaml.YAMLError):
            # No configuration, or one that only another user may read.
            return None
        return content if isinstance(content, dict) and content.get("available_node_types") else None
    return None


# --- What the autoscaler is at ---


def read_launches() -> Launches:
    """Read which nodes the connected cluster's autoscaler starts now, and which it could not start."""
    if not is_autoscaler_v2():
        return parse_stored_launches(_read_stored_status())

    gcs_address = ray.get_runtime_context().gcs_address
    reply = GetClusterStatusReply.FromString(GcsClient(gcs_address).get_cluster_status())
    return parse_launches(get_cluster_status(gcs_address), list_unmet(reply))


def parse_stored_launches(status: Mapping[str, Any]) -> Launches:
    """Return what the status of the first autoscaler says of launches."""
    report = status.get("autoscaler_report") or {}
    starting = Counter[str](report.get("pending_launches") or {})
    starting.update(node_type for _, node_type, _ in report.get("pending_nodes") or ())

    failed = {}
    records = (report.get("node_availability_summary") or {}).get("node_availabilities") or {}
    for name, record in records.items():
        trouble = record.get("unavailable_node_information")
        if trouble:
            failed[name] = f"{trouble['category']}: {trouble['description']}"
    return Launches(starting, failed)


def parse_launches(status: ClusterStatus, unmet: Sequence[Mapping[str, float]]) -> Launches:
    """Return what the status of the second autoscaler says of launches."""
    starting = Counter[str]()
    for launch in status.pending_launches:
        starting[launch.ray_node_type_name] += launch.count
    for node in status.pending_nodes:
        starting[node.ray_node_type_name] += 1
    failed = {launch.ray_node_type_name: launch.details or "no reason given" for launch in status.failed_launches}
    return Launches(starting, failed, unmet)


def list_unmet(reply: GetClusterStatusReply) -> list[dict[str, float]]:
    """List the resources for which the second autoscaler can add no node now."""
    autoscaler = reply.autoscaling_state
    requests = [*autoscaler.infeasible_resource_requests]
    for gang in autoscaler.infeasible_gang_resource_requests:
        requests += gang.requests
    return [dict(request.resources_bundle) for request in requests]
