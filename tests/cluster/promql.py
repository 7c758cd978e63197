"""What our Prometheus queries ask for: metrics, and the labels that they must have. Reads only what we write."""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

from tests import ROOT

CLUSTER = ROOT / "cluster"
DASHBOARD = json.loads((CLUSTER / "grafana" / "corun.json").read_text())
RULES = [rule for group in yaml.safe_load((CLUSTER / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]

_METRIC = re.compile(r"\b(ray_[a-z0-9_]+)\b(?:\{([^}]*)\})?")
_BY = re.compile(r"\b(?:sum|avg|max|min)\s+by\s*\(([^)]*)\)\s*\(")


class Use(NamedTuple):
    """A metric in a query, and the labels by which the query selects or groups it."""

    metric: str
    labels: frozenset[str]


def uses(expression: str) -> list[Use]:
    """Every metric of a query, histograms by the name of the whole."""
    groups = [(found.end(), _end(expression, found.end()), _names(found[1])) for found in _BY.finditer(expression)]
    found = []
    for match in _METRIC.finditer(expression):
        labels = set(re.findall(r"(\w+)\s*[=!]~?", match[2] or ""))
        for start, end, names in groups:
            if start <= match.start() < end:
                labels |= set(names) - {"le"}
        found.append(Use(match[1].removesuffix("_bucket"), frozenset(labels)))
    return found


def grouped_by(expression: str) -> set[str]:
    """Every label that a query groups by."""
    return {name for found in _BY.finditer(expression) for name in _names(found[1])}


def panels() -> list[dict[str, Any]]:
    """The dashboard's panels, without the headings of rows."""
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def queries() -> Iterator[tuple[str, str]]:
    """Where it stands, and the query: of every panel, variable and alert."""
    for panel in panels():
        yield from ((panel["title"], target["expr"]) for target in panel["targets"])
    yield from ((f"variable {one['name']}", one["definition"]) for one in DASHBOARD["templating"]["list"][1:])
    yield from ((rule["alert"], rule["expr"]) for rule in RULES)


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",")]


def _end(text: str, start: int) -> int:
    """Where the bracket that opens just before `start` closes."""
    depth = 1
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position
    raise ValueError(f"brackets of {text!r}")
