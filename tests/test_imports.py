"""Who imports whom: rooms and the directions between them, no circle, and a core that stands alone."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from corun_ray import PACKAGE

CORE_FILES = sorted((PACKAGE / "core").rglob("*.py"))
ALL_FILES = sorted(PACKAGE.rglob("*.py"))

WINGS = ("cli", "bench", "service", "config", "core")
"""A wing may import the wings after it; `demo` stands alone."""

GROUND = {
    "core": {"core.errors", "core.choices", "core.foreign", "core.home", "core.timing", "core.weights"},
    "service": {
        "service.environment",
        "service.errors",
        "service.places",
        "service.proxies",
        "service.s3",
        "service.start_times",
        "service.storage",
        "service.trust",
        "service.waiting",
    },
}
"""Files of a wing that all of its rooms may import."""

SERVICE_TABLE = """
    telemetry:
    report:
    cluster:
    runs:
    weights:
    data:       runs telemetry
    pool:       data runs telemetry
    models:     data runs report
    check:      cluster data models weights
    train:      pool models data runs weights report cluster telemetry
    inference:  models data runs weights report cluster telemetry
    serve:      inference models cluster telemetry
    tune:       train models runs report cluster telemetry
    doctor:     train models weights cluster
    jobs:       telemetry report cluster runs weights data pool models check train inference serve tune
"""
CORE_TABLE = """
    networks:
    data:
    metrics:
    inference:  networks data
    scoring:    metrics inference networks
    training:   scoring networks
"""


def read_table(wing: str, table: str) -> dict[str, set[str]]:
    """Return room → rooms of the same wing that it may import."""
    rows = [line.partition(":") for line in table.split("\n") if line.strip()]
    return {f"{wing}.{room.strip()}": {f"{wing}.{name}" for name in names.split()} for room, _, names in rows}


ALLOWED = read_table("service", SERVICE_TABLE) | read_table("core", CORE_TABLE)
"""Room → rooms of its wing that it may import, beside the ground and the wings below."""

NARROWER = {
    "config": {"config", "core.choices", "core.errors", "core.metrics.catalog"},
    "demo": {"demo"},
    "bench": {
        "bench",
        "core",
        "config",
        "demo",
        "service.errors",
        "service.s3",
        "service.storage",
        "service.trust",
        "service.waiting",
        "service.telemetry",
        "service.data",
        "service.pool",
    },
    **{
        f"bench.{name}": {"bench", "core"}
        for name in ("step", "dehaze", "scaling", "scaling_model", "machine", "tables", "run")
    },
}
"""Modules and rooms that may import less than their wing: only what lies within these."""


class Import(NamedTuple):
    module: str
    is_lazy: bool
    """Within a function."""


def read_imports(path: Path) -> Iterator[Import]:
    """Yield every module that a file imports anywhere, `from a import b` as `a.b`, which may be a module as well."""
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


def name_module(path: Path) -> str:
    """Return a file's module without `corun_ray`: `core.data.depth`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__").removesuffix("__init__")


def find_room(module: str) -> str:
    """Return the room of a module: `service.pool`, or the wing where a wing has no rooms."""
    wing, *rest = module.split(".")
    return f"{wing}.{rest[0]}" if rest and wing in ("core", "service") else wing


def read_graph(files: list[Path]) -> dict[str, set[str]]:
    """Return module → modules of this package that it imports, imports in functions included."""
    modules = {name_module(path): path for path in files}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        graph[module] = set()
        for found in read_imports(path):
            if not is_within(found.module, "corun_ray"):
                continue
            name = found.module.removeprefix("corun_ray").removeprefix(".")
            target = name if name in modules else name.rpartition(".")[0]
            graph[module] |= {target} - {module}
    return graph


def find_trespasses(graph: Mapping[str, set[str]]) -> list[str]:
    """Return `module imports other` for every import that the tables do not allow."""
    return sorted(
        f"{module} imports {other}" for module, others in graph.items() for other in others if not may(module, other)
    )


def may(module: str, other: str) -> bool:
    """Return whether the tables allow `module` to import `other`."""
    # The package's own file holds a constant; __main__ starts the command line.
    if other == "" or module in ("", "__main__"):
        return True

    wing, other_wing = module.split(".")[0], other.split(".")[0]
    room, other_room = find_room(module), find_room(other)
    narrow = NARROWER.get(module, NARROWER.get(room))
    if narrow is not None:
        return any(is_within(other, one) for one in narrow)

    if wing != other_wing:
        # Downwards only; the demo's scenes are drawn by the command line and the benchmarks alone.
        return other_wing in WINGS[WINGS.index(wing) + 1 :] or (other_wing == "demo" and wing == "cli")
    if wing == "cli" or room == other_room or other in GROUND[wing]:
        return True
    return other_room in ALLOWED.get(room, set())


def find_circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the modules of one circle of imports; empty where there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def join_rooms(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Return the graph between rooms of a graph between modules; the ground's files stand for themselves."""
    ground = set().union(*GROUND.values())

    def place(module: str) -> str:
        return module if module in ground or not module else find_room(module)

    rooms: dict[str, set[str]] = {}
    for module, others in graph.items():
        rooms.setdefault(place(module), set()).update(place(other) for other in others if place(other) != place(module))
    return rooms


def test_imports_go_one_way() -> None:
    assert find_trespasses(read_graph(ALL_FILES)) == []


def test_there_is_no_circle() -> None:
    graph = read_graph(ALL_FILES)
    assert find_circle(graph) == []
    assert find_circle(join_rooms(graph)) == []


def test_every_room_stands_in_the_table() -> None:
    rooms = {find_room(name_module(path)) for path in ALL_FILES}
    known = {*WINGS, "demo", "", "__main__", *ALLOWED, *(find_room(one) for one in set().union(*GROUND.values()))}
    assert rooms == known


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("core/data/depth.py", "from corun_ray.config.types import Section"),
        ("core/networks/spec.py", "def f():\n    from corun_ray.core.training.steps import Colabator"),
        ("service/pool/shard.py", "import corun_ray.service.train.worker"),
        ("config/jobs.py", "from corun_ray.core.networks import corun"),
        ("bench/step.py", "from corun_ray.service.storage import locate"),
        ("demo/haze.py", "from corun_ray.core.data.haze import Haze"),
        ("service/jobs.py", "from ..cli.common import DONE"),
    ],
)
def test_a_planted_import_that_goes_up_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, line: str
) -> None:
    for path in ALL_FILES:
        copy = tmp_path / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text("utf-8"))
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    planted = tmp_path / module
    planted.write_text(f"{planted.read_text()}\n{line}\n")
    (found,) = find_trespasses(read_graph(sorted(tmp_path.rglob("*.py"))))
    assert found.startswith(name_module(planted) + " imports ")


def test_a_circle_is_found() -> None:
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) != []


def third_party(path: Path) -> set[Import]:
    """Return what a file imports from neither this project nor the standard library, by its top name."""
    tops = {Import(found.module.partition(".")[0], found.is_lazy) for found in read_imports(path)}
    return {found for found in tops if found.module not in sys.stdlib_module_names and found.module != "corun_ray"}


def test_the_reading_of_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    path = tmp_path / "core" / "x.py"
    path.parent.mkdir()
    path.write_text(
        "import a, b.c\nfrom ..service import pool\nfrom . import y\n"
        "class K:\n    from d import e\n    def f(self):\n        import g.h as i\n"
    )
    assert list(read_imports(path)) == [
        ("a", False),
        ("b.c", False),
        ("corun_ray.service.pool", False),
        ("corun_ray.core.y", False),
        ("d.e", False),
        ("g.h", True),
    ]


# What a user who does not use these networks need not have: imported by the functions that build them.
LAZY = {
    name: {Import(package, True) for package in packages}
    for name, packages in {
        "timing": ("torch",),
        "weights": ("torch", "safetensors"),
        "scoring.daclip": ("open_clip",),
        "metrics.detection": ("pycocotools",),
        "metrics.detector": ("torchvision",),
        "metrics.pyiqa": ("pyiqa", "timm", "clip", "packaging"),
        "networks.spandrel": ("spandrel",),
        "inference.depth": ("transformers",),
        "data.formats": ("tifffile", "PIL"),
        "data.images": ("h5py", "scipy"),
    }.items()
}


@pytest.mark.parametrize("path", CORE_FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_core_needs_numpy_torch_and_opencv(path: Path) -> None:
    allowed = {Import(name, False) for name in ("numpy", "torch", "cv2")}
    assert third_party(path) - allowed - LAZY.get(name_module(path).removeprefix("core."), set()) == set()


def test_h5py_is_imported_in_one_place() -> None:
    users = [path.name for path in CORE_FILES if Import("h5py", True) in third_party(path)]
    assert len(users) <= 1


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


@pytest.mark.parametrize("module", ["cli", "config.jobs", "config.loading", "config.reference"])
def test_the_front_door_is_light(module: str) -> None:
    heavy = "torch", "ray", "mlflow", "numpy", "cv2", "pyarrow"
    assert run(f"import sys, corun_ray.{module}; print(*(name for name in {heavy} if name in sys.modules))") == []


@pytest.mark.parametrize(
    "module",
    ["data.cache", "data.manifest", "data.sample_maker", "pool.shard", "pool.keeper", "train.board", "storage", "jobs"],
)
def test_the_many_small_processes_of_a_run_do_without_torch(module: str) -> None:
    """Each task of the stream, cache, shard and board is a process: torch would cost it seconds and half a gigabyte.

    `jobs` stands for what the driver imports before Ray starts.
    """
    heavy = "torch", "mlflow", "ray.data", "ray.train"
    code = f"import sys, corun_ray.service.{module}; print(*(name for name in {heavy} if name in sys.modules))"
    assert run(code) == []


@pytest.mark.parametrize("module", ["train.controller", "train.process_group", "data.stream"])
def test_ray_s_own_processes_of_a_training_do_without_torch(module: str) -> None:
    """The controller starts before any worker, and the stream's coordinator before the first sample."""
    code = (
        f"import sys, corun_ray.service.{module}; print(*(name for name in ('torch', 'mlflow') if name in sys.modules))"
    )
    assert run(code) == []
