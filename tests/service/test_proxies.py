"""Loopback is never asked through a proxy, and a proxy is named where it is in the way."""

import os

import pytest
from requests.utils import should_bypass_proxies

from corun_ray.service.errors import format_reason
from corun_ray.service.proxies import EXCEPTIONS, PROXY_VARIABLES, describe_proxy, reach_loopback_directly

PROXY = "http://me:word@proxy:3128"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in (*PROXY_VARIABLES, "no_proxy"):
        monkeypatch.setenv(name, "")
        monkeypatch.setenv(name.upper(), "")


def test_loopback_is_reached_directly_and_the_users_exceptions_stay(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", PROXY)
    monkeypatch.setenv("NO_PROXY", "intern.example, 127.0.0.1")
    reach_loopback_directly()
    reach_loopback_directly()
    for url in ("http://127.0.0.1:8265", "http://localhost:5000", "http://127.0.1.1:1", "http://intern.example"):
        assert should_bypass_proxies(url, None), url
    assert not should_bypass_proxies("http://head:8265", None)
    assert describe_proxy("http://127.0.0.1:8265") == ""


def test_without_a_proxy_the_environment_stays(monkeypatch):
    for name in EXCEPTIONS:
        monkeypatch.delenv(name, raising=False)
    reach_loopback_directly()
    assert not any(name in os.environ for name in EXCEPTIONS)


def test_an_error_names_the_proxy_without_its_password(monkeypatch):
    monkeypatch.setenv("http_proxy", PROXY)
    said = format_reason(OSError("no answer"), "http://head:8265")
    assert (
        said == "no answer; asked through the proxy http://***@proxy:3128 of http_proxy (NO_PROXY=head goes around it)"
    )
    assert format_reason(OSError("no answer"), "sqlite:///a.db") == "no answer"
