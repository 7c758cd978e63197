"""Folders in which a local Ray cannot start are told before it is tried."""

import os
from pathlib import Path

import pytest

from corun_ray.service.cluster.local_ray import MAX_SOCKET_BYTES, SESSION, LocalRayError, check_folder, find_folder


def refused() -> str:
    with pytest.raises(LocalRayError) as caught:
        check_folder()
    assert "\n" not in str(caught.value) and "RAY_TMPDIR" in str(caught.value)
    return str(caught.value)


def test_a_folder_that_is_too_long_for_sockets_is_told_with_its_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("long" * 30)))
    said = refused()
    assert f"TMPDIR={tmp_path}" in said and f"at most {MAX_SOCKET_BYTES} bytes" in said
    assert [*tmp_path.iterdir()] == []

    # A byte more than the longest that is allowed.
    longest = int(said.partition("a folder of at most ")[2].split()[0])
    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * longest)
    assert "RAY_TMPDIR=/xx" in refused() and f"have {MAX_SOCKET_BYTES + 1};" in refused()


def test_a_folder_that_cannot_be_written_is_told(monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/proc")
    assert "cannot write below /proc/ray (RAY_TMPDIR=/proc): " in refused()


def test_the_paths_of_a_running_ray_are_as_long_as_is_thought(local_ray):
    import ray

    socket = ray._private.worker._global_node.plasma_store_socket_name
    folder, _ = find_folder()
    assert len(socket) == len(str(Path(folder, SESSION.format(pid=os.getpid()))))
