"""A user's module on its way from beside the job file to other processes."""

import importlib
import sys

from corun_ray.service.models.user_code import collect_code, install_code, write_code


def test_a_module_or_package_beside_the_job_file_is_collected(tmp_path):
    (tmp_path / "single.py").write_text("A = 1\n")
    (tmp_path / "several" / "inner").mkdir(parents=True)
    (tmp_path / "several" / "__init__.py").write_text("")
    (tmp_path / "several" / "inner" / "net.py").write_text("B = 2\n")
    (tmp_path / "several" / "notes.txt").write_text("not code")
    assert collect_code("single:Net", tmp_path) == {"single.py": b"A = 1\n"}
    assert set(collect_code("several.inner.net:Net", tmp_path)) == {"several/__init__.py", "several/inner/net.py"}
    assert collect_code("NAFNet", tmp_path) == {} == collect_code("torch.nn:Identity", tmp_path)


def test_collected_code_is_importable_where_it_is_installed(tmp_path, monkeypatch):
    before = len(sys.path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    code = {"corun_test_module/__init__.py": b"", "corun_test_module/net.py": b"C = 3\n"}
    install_code(code)
    install_code(code)
    assert importlib.import_module("corun_test_module.net").C == 3
    assert len(sys.path) == before + 1, "installed once"
    assert [path.name for path in write_code(code, tmp_path)] == ["corun_test_module"]
