"""Manifests of cluster/, and what their schemas say of them."""

import json
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator
from referencing import Registry
from referencing.jsonschema import DRAFT7

from tests.cluster.composed import ROOT

CLUSTER = ROOT / "cluster"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCHEMAS = ROOT / "tests" / "data" / "schemas"
KINDS = {
    **dict.fromkeys(("RayCluster", "RayJob"), "kuberay.json#/definitions/{}"),
    **dict.fromkeys(("ConfigMap", "Secret", "Service", "StatefulSet"), "kubernetes.json#/definitions/V1{}"),
}
REGISTRY = Registry().with_resources(
    (path.name, DRAFT7.create_resource(json.loads(path.read_text()))) for path in SCHEMAS.glob("*.json")
)


def documents(path: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one]


def plain(tree: Any) -> Any:
    """A copy in which no two places share a part, as YAML's anchors make them."""
    return json.loads(json.dumps(tree))


def rendered(folder: str) -> list[dict[str, Any]]:
    """What `kubectl apply --kustomize` would send."""
    if not shutil.which("kubectl"):
        pytest.skip("no kubectl")
    done = subprocess.run(["kubectl", "kustomize", str(CLUSTER / "kuberay" / folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def mistakes(manifest: Any, schema: str) -> list[str]:
    """What is wrong with it, innermost reasons first named; `schema`: file#/pointer in tests/data/schemas."""
    errors = Draft7Validator({"$ref": schema}, registry=REGISTRY).iter_errors(manifest)
    return [f"{'/'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]


def mistakes_of_kind(manifest: dict[str, Any]) -> list[str]:
    """The same for a Kubernetes object, by its kind."""
    kind = manifest["kind"]
    return mistakes(manifest, KINDS[kind].format(kind))


def walk(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield key, value
            yield from walk(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from walk(value)
