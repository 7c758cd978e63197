"""The Grafana dashboard and the alerts, against what the package declares. What Ray serves: service/test_scrape.py."""

import re

import pytest
import yaml

from corun_ray.service.telemetry.prometheus import DECLARED
from tests.cluster.promql import CLUSTER, DASHBOARD, RULES, Use, grouped_by, panels, queries, uses

RAY_GPU = {"ray_node_gpus_utilization", "ray_node_gram_used"}
"""Ray's own metrics that only a node with a GPU has."""
OURS = {f"ray_{name}": metric for name, metric in DECLARED.items()}


def test_queries_are_read_as_they_are_meant() -> None:
    expression = 'sum by (a, b) (rate(ray_x_total{c=~"d", e="f"}[5m])) / ignoring (b) max by (a) (ray_y) > ray_z_bucket'
    found = [Use("ray_x_total", frozenset("abce")), Use("ray_y", frozenset("a")), Use("ray_z", frozenset())]
    assert uses(expression) == found and grouped_by(expression) == {"a", "b"}


@pytest.mark.parametrize(("where", "expression"), list(queries()))
def test_a_query_names_metrics_and_labels_that_are_declared(where: str, expression: str) -> None:
    found = [use for use in uses(expression) if use.metric.startswith("ray_corun_")]
    for use in found:
        assert use.metric in OURS, f"{where}: nobody records {use.metric}"
        assert use.labels <= set(OURS[use.metric].labels), f"{where}: {use}"
    assert uses(expression) or where.startswith("variable")
    named = set(re.findall(r"\bray_corun_\w+", expression))
    assert {name.removesuffix("_bucket") for name in named} <= OURS.keys()


def test_a_counter_is_only_asked_for_its_rate() -> None:
    """A counter restarts with its process, so its value means little; restores are those since a shard's start."""
    bare = {
        name
        for _, expression in queries()
        for name in re.findall(r"\bray_corun_\w+_total\b", re.sub(r"(rate|increase)\([^)]*\)", "", expression))
        if "label_values" not in expression
    }
    assert bare == {"ray_corun_pool_restores_total"}


def test_every_declared_metric_is_on_the_dashboard() -> None:
    shown = {use.metric for panel in panels() for target in panel["targets"] for use in uses(target["expr"])}
    assert shown >= OURS.keys()


def test_legends_name_labels_that_the_query_leaves() -> None:
    for panel in panels():
        for target in panel["targets"]:
            legend = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            left = grouped_by(target["expr"]) or {"ip", "GpuIndex"}
            assert legend <= left, panel["title"]


def test_panels_say_what_they_mean_and_which_need_a_gpu() -> None:
    for panel in panels():
        asked = {use.metric for target in panel["targets"] for use in uses(target["expr"])}
        needs_gpu = asked & RAY_GPU or any(OURS[name].needs_gpu for name in asked & OURS.keys())
        assert panel["description"].endswith(".")
        assert bool(needs_gpu) == panel["title"].endswith("(GPU)") == ("Only with a GPU." in panel["description"])


def test_it_imports_anywhere() -> None:
    datasource, *others = DASHBOARD["templating"]["list"]
    assert datasource["type"] == "datasource" and [one["name"] for one in others] == ["job", "run"]
    assert "__inputs" not in DASHBOARD and DASHBOARD["uid"]
    uid = {"type": "prometheus", "uid": "${datasource}"}
    for panel in panels():
        assert panel["datasource"] == uid and all(target["datasource"] == uid for target in panel["targets"])
    every = DASHBOARD["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    cells = [
        (x, y)
        for at in (panel["gridPos"] for panel in every)
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) == 23, "panels overlap, or leave the page"


def test_alerts_say_who_and_how_bad() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        (label,) = re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])
        asked = uses(rule["expr"])
        known = {name for use in asked if use.metric in OURS for name in OURS[use.metric].labels} | {"ip"}
        assert label in known and (label in grouped_by(rule["expr"]) or not grouped_by(rule["expr"]))


def test_the_page_on_operating_names_every_alert_and_only_metrics_that_exist() -> None:
    page = (CLUSTER.parent / "docs" / "operating.md").read_text()
    assert all(f"`{rule['alert']}`" in page for rule in RULES)
    assert {name for name in re.findall(r"`(corun_\w+)`", page) if name != "corun_ray"} <= DECLARED.keys()


def test_prometheus_reads_ray_s_own_list_of_nodes() -> None:
    config = yaml.safe_load((CLUSTER / "prometheus.yaml").read_text())
    assert config["rule_files"] == ["alerts.yaml"]
    (scrape,) = config["scrape_configs"]
    (discovery,) = scrape["file_sd_configs"]
    assert discovery["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
