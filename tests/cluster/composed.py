"""A compose file as docker compose reads it: variables filled in, each service's command as one list."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from tests import ROOT

COMPOSE = ROOT / "cluster" / "compose.yaml"
EXAMPLE = ROOT / "cluster" / "compose.env.example"
# ${NAME}, ${NAME:-default}, ${NAME:?message}; $$ is a dollar.
VARIABLE = re.compile(r"\$(?:(\$)|\{(\w+)(?::([-?])([^}]*))?\})")


@dataclass(frozen=True)
class Service:
    """What of a service matters where it runs without Docker."""

    name: str
    command: list[str]
    """Entry point included."""
    environment: dict[str, str]
    health: list[str] | None
    """The health check's command."""
    health_timeout_s: float
    volumes: dict[str, str]
    """Path in the container → volume."""
    needs: dict[str, str]
    """Service → condition."""


def variables() -> dict[str, str]:
    """The names that compose.env.example sets, and their values there."""
    lines = [line for line in EXAMPLE.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def fill(tree: Any, values: Mapping[str, str]) -> Any:
    """The tree with its variables replaced; raises `KeyError` where one has neither value nor default."""
    if isinstance(tree, dict):
        return {key: fill(value, values) for key, value in tree.items()}
    if isinstance(tree, list):
        return [fill(value, values) for value in tree]
    return VARIABLE.sub(lambda found: _value(found, values), tree) if isinstance(tree, str) else tree


def _value(found: re.Match[str], values: Mapping[str, str]) -> str:
    dollar, name, kind, default = found.groups()
    if dollar:
        return "$"
    if value := values.get(name):
        return value
    if kind == "-":
        return default
    raise KeyError(f"{name}: {default or 'not set'}")


def services(values: Mapping[str, str]) -> dict[str, Service]:
    """The services of cluster/compose.yaml by name."""
    tree = fill(yaml.safe_load(COMPOSE.read_text()), values)
    return {name: _service(name, one) for name, one in tree["services"].items()}


def _service(name: str, tree: dict[str, Any]) -> Service:
    check = tree.get("healthcheck", {"test": ["CMD"], "timeout": "0s"})
    kind, *health = check["test"]
    assert kind == "CMD", f"{name}: a health check by way of a shell"
    return Service(
        name,
        [*tree.get("entrypoint", []), *tree["command"]],
        tree.get("environment", {}),
        health or None,
        float(check["timeout"].removesuffix("s")),
        {target: volume for volume, target in (mount.split(":") for mount in tree.get("volumes", []))},
        {needed: how["condition"] for needed, how in tree.get("depends_on", {}).items()},
    )
