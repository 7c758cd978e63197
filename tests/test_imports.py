"""Who imports whom: the core stands alone, the service builds on it, the front door is light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import corun_ray

PACKAGE = Path(corun_ray.__file__).parent
CORE_FILES = sorted((PACKAGE / "core").rglob("*.py"))


class Import(NamedTuple):
    module: str
    is_lazy: bool
    """Within a function."""


def imports_of(path: Path) -> Iterator[Import]:
    """Every module that a file imports anywhere, `from a import b` as `a.b`, which may be a module as well."""
    package = ("corun_ray", *path.relative_to(PACKAGE).parts[:-1])

    def visit(node: ast.AST, is_lazy: bool) -> Iterator[Import]:
        is_lazy = is_lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, is_lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = [*package[: len(package) + 1 - node.level]] if node.level else []
            origin += [node.module] if node.module else []
            yield from (Import(".".join([*origin, alias.name]), is_lazy) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, is_lazy)

    return visit(ast.parse(path.read_text("utf-8")), False)


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def third_party(path: Path) -> set[Import]:
    """What a file imports from neither this project nor the standard library, by its top name."""
    tops = {Import(found.module.partition(".")[0], found.is_lazy) for found in imports_of(path)}
    return {found for found in tops if found.module not in sys.stdlib_module_names and found.module != "corun_ray"}


def test_the_reading_of_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    path = tmp_path / "core" / "x.py"
    path.parent.mkdir()
    path.write_text(
        "import a, b.c\nfrom ..service import pool\nfrom . import y\n"
        "class K:\n    from d import e\n    def f(self):\n        import g.h as i\n"
    )
    assert list(imports_of(path)) == [
        ("a", False),
        ("b.c", False),
        ("corun_ray.service.pool.client", False),
        ("corun_ray.core.y", False),
        ("d.e", False),
        ("g.h", True),
    ]


# What a user who does not use these networks need not have: imported by the functions that build them.
LAZY = {
    name: {Import(package, True) for package in packages}
    for name, packages in {
        "weights.py": ("torch", "safetensors"),
        "tensorfile.py": ("safetensors",),
        "daclip.py": ("open_clip",),
        "iqa.py": ("pyiqa",),
        "iqa_offline.py": ("pyiqa", "timm", "clip", "packaging"),
        "spandrel_networks.py": ("spandrel",),
        "images.py": ("h5py",),
    }.items()
}


@pytest.mark.parametrize("path", CORE_FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_core_imports_nothing_above_it(path: Path) -> None:
    ours = {found.module for found in imports_of(path) if is_within(found.module, "corun_ray")}
    assert {module for module in ours if not is_within(module, "corun_ray.core")} == set()
    allowed = {Import(name, False) for name in ("numpy", "torch", "cv2")}
    assert third_party(path) - allowed - LAZY.get(path.name, set()) == set()


def test_h5py_is_imported_in_one_place() -> None:
    users = [path.name for path in CORE_FILES if Import("h5py", True) in third_party(path)]
    assert len(users) <= 1


def test_only_the_command_line_reaches_into_the_service() -> None:
    outside = [path for path in PACKAGE.glob("*.py") if not path.name.startswith("cli")]
    assert len(outside) > 3
    users = [
        path.name for path in outside for found in imports_of(path) if is_within(found.module, "corun_ray.service")
    ]
    assert users == []


LONE_CORE = """
import importlib, importlib.metadata as metadata, pkgutil, re, sys

def closure(names):
    found, waiting = set(), list(names)
    while waiting:
        name = re.sub("[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        found.add(name)
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # for another platform or Python
        waiting += [re.match("[A-Za-z0-9._-]+", need)[0] for need in needs if "extra ==" not in need]
    return found

allowed = closure(["numpy", "torch", "opencv-python-headless"])
owners = metadata.packages_distributions()

class Refuse:
    def find_spec(self, name, path=None, target=None):
        top, _, rest = name.partition(".")
        if top == "corun_ray":
            if rest and rest.partition(".")[0] != "core":
                raise ModuleNotFoundError(f"{name} is above the core", name=name)
        elif top in owners and not {re.sub("[-_.]+", "-", owner).lower() for owner in owners[top]} & allowed:
            raise ModuleNotFoundError(f"{name} is not of the core's", name=name)

sys.meta_path.insert(0, Refuse())
for refused in ("yaml", "ray", "pydantic", "corun_ray.config.jobs"):
    try:
        importlib.import_module(refused)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{refused} was not refused: this proves nothing")

import corun_ray.core
for module in pkgutil.walk_packages(corun_ray.core.__path__, "corun_ray.core."):
    importlib.import_module(module.name)
    print(module.name)
"""


def run(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_core_runs_with_numpy_torch_and_opencv_alone() -> None:
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in CORE_FILES}
    packages = {name.removesuffix(".__init__") for name in names}
    assert set(run(LONE_CORE)) == packages - {"corun_ray.core"}


@pytest.mark.parametrize("module", ["cli", "config", "jobfile", "jobkeys"])
def test_the_front_door_is_light(module: str) -> None:
    heavy = "torch", "ray", "mlflow", "numpy", "cv2", "pyarrow"
    assert run(f"import sys, corun_ray.{module}; print(*(name for name in {heavy} if name in sys.modules))") == []
