"""Folders in which a local Ray cannot start are told before it is tried."""

import os
import tempfile
from pathlib import Path

import pytest

from corun_ray.service.cluster import local_ray
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

    # The longest that is allowed, and a byte more.
    longest = int(said.partition("a folder of at most ")[2].split()[0])
    monkeypatch.setattr(local_ray, "TRIAL_BYTES", 0)
    monkeypatch.setattr(Path, "mkdir", lambda *args, **options: None)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: open(os.devnull, "wb"))
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * (longest - 1))
    check_folder()
    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * longest)
    assert "RAY_TMPDIR=/xx" in refused()


def test_a_folder_that_cannot_be_written_is_told(monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/proc")
    assert "cannot write below /proc/ray (RAY_TMPDIR=/proc): " in refused()


def test_the_paths_of_a_running_ray_are_as_long_as_is_thought(local_ray):
    import ray

    socket = ray._private.worker._global_node.plasma_store_socket_name
    folder, _ = find_folder()
    assert len(socket) == len(str(Path(folder, SESSION.format(pid=os.getpid()))))
