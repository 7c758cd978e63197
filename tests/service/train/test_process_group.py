"""The interface that workers on several machines talk over; `tests/faults/test_two_machines.py` has them do so."""

import os

import psutil
import pytest
import ray.util

from corun_ray.service.train.process_group import GLOO_INTERFACE, use_interface_of_node


@pytest.fixture
def interface_at(monkeypatch):
    """The interface that gloo uses on a node of this address, or that a person chose."""

    def choose(address, chosen=None):
        monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: address)
        monkeypatch.delenv(GLOO_INTERFACE, raising=False)
        if chosen is not None:
            monkeypatch.setenv(GLOO_INTERFACE, chosen)
        use_interface_of_node()
        return os.environ.get(GLOO_INTERFACE)

    monkeypatch.setenv(GLOO_INTERFACE, "")  # so that what the function sets is undone
    return choose


def test_gloo_talks_over_the_interface_that_has_the_node_s_address(interface_at):
    for name, addresses in psutil.net_if_addrs().items():
        for one in addresses:
            if one.family.name == "AF_INET":
                assert interface_at(one.address) == name


def test_a_choice_in_the_node_s_environment_stays_and_an_unknown_address_changes_nothing(interface_at):
    assert interface_at("127.0.0.1", chosen="bond7") == "bond7"
    assert interface_at("203.0.113.77") is None
