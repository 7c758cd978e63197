"""A process that Ray starts before it is asked for."""

from types import SimpleNamespace

import ray

from corun_ray.service.cluster.connect import LOCAL_MARK
from corun_ray.service.cluster.warm_up import warm_up


def test_a_process_starts_early_on_a_local_ray_alone(monkeypatch):
    asked = []
    task = SimpleNamespace(remote=asked.append)
    monkeypatch.setattr(ray, "remote", lambda **options: lambda function: task)

    for name in (LOCAL_MARK, "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    warm_up("json")
    assert asked == []

    monkeypatch.setenv(LOCAL_MARK, "1")
    warm_up("json")
    assert asked == ["json"]
