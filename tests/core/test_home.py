"""Processes without a home or a name, as containers run them."""

import getpass
import os
import subprocess
import sys
from pathlib import Path

import pytest

from corun_ray.core import home
from corun_ray.core.home import settle_in
from corun_ray.service.storage import StorageError, locate


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """A user without a name and a home; temporary files go to `tmp_path`."""

    def find_nothing(uid):
        raise KeyError(uid)

    monkeypatch.setattr(home.pwd, "getpwuid", find_nothing)
    left_out = {"HOME", *home.NAME_VARIABLES, *home.CACHES}
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name not in left_out})
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_a_user_without_a_home_gets_a_private_one_and_a_name(nobody, monkeypatch, tmp_path):
    with pytest.raises(RuntimeError):
        Path.home()
    settle_in()
    assert getpass.getuser() == f"uid-{os.getuid()}"
    assert Path.home() == tmp_path / f"corun-ray-home-{os.getuid()}"
    assert Path.home().stat().st_mode & 0o777 == 0o700

    # Another process of the user finds the same.
    monkeypatch.delenv("HOME")
    settle_in()
    assert Path.home().parent == tmp_path


def test_a_home_that_is_nowhere_is_none_and_what_must_last_is_not_written_there(nobody, monkeypatch):
    monkeypatch.setenv("HOME", "/nonexistent")
    settle_in()
    assert Path.home().is_dir()
    with pytest.raises(StorageError, match="~/runs: there is no such home folder here; expected an absolute path"):
        locate("~/runs")
    with pytest.raises(StorageError, match="~nobody-of-this-name/runs: there is no such home"):
        locate("~nobody-of-this-name/runs")


def test_a_home_that_cannot_be_written_stays_and_caches_go_elsewhere(nobody, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/proc")
    monkeypatch.setenv("HF_HOME", "/data/hub")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    settle_in()
    assert os.environ["HOME"] == "/proc"
    assert os.environ["HF_HOME"] == "/data/hub"
    assert os.environ["MPLCONFIGDIR"] == str(tmp_path / f"corun-ray-home-{os.getuid()}" / "matplotlib")


def test_a_folder_that_others_may_write_is_no_home(nobody, monkeypatch, tmp_path):
    (tmp_path / f"corun-ray-home-{os.getuid()}").mkdir(mode=0o777)
    (tmp_path / f"corun-ray-home-{os.getuid()}").chmod(0o777)
    settle_in()
    assert "HOME" not in os.environ


def test_without_a_folder_for_temporary_files_there_is_a_line(tmp_path):
    code = (
        "import tempfile; tempfile._candidate_tempdir_list = lambda: ['/nowhere']\n"
        "from corun_ray.cli.app import main; main(['dehaze', '.', 'out', '--model', 'corun-small'])"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.startswith("TMPDIR: No usable temporary directory found in ['/nowhere']; expected")
