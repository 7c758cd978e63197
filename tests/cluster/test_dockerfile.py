"""The Dockerfile step by step, where no image can be built: what each step names exists, and the order is right."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.cluster.composed import ROOT
from tests.cluster.manifests import PROJECT

IMAGE_LOCK = ROOT / "requirements-image.lock"


class Step(NamedTuple):
    kind: str
    value: str


def steps() -> list[Step]:
    with (ROOT / "Dockerfile").open("rb") as file:
        structure = DockerfileParser(fileobj=file).structure
    return [Step(one["instruction"], one["value"]) for one in structure if one["instruction"] != "COMMENT"]


def stages() -> list[list[Step]]:
    """The steps from each FROM to the next."""
    found: list[list[Step]] = []
    for step in steps():
        if step.kind == "FROM":
            found.append([])
        if found:
            found[-1].append(step)
    return found


def values(kind: str, stage: list[Step]) -> list[str]:
    return [step.value for step in stage if step.kind == kind]


def is_left_out(path: str, rules: list[str]) -> bool:
    """Whether .dockerignore keeps a path out: the last rule that names it or a folder above it decides."""
    above = [str(Path(*Path(path).parts[: i + 1])) for i in range(len(Path(path).parts))]
    left_out = False
    for rule in rules:
        pattern = rule.removeprefix("!").strip("/")
        names = [part for one in above for part in ([one, Path(one).name] if pattern.startswith("**/") else [one])]
        if any(fnmatch(name, pattern.removeprefix("**/")) for name in names):
            left_out = not rule.startswith("!")
    return left_out


def ignore_rules() -> list[str]:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def locked(path: Path) -> dict[str, str]:
    """Requirement line → its block with the hashes."""
    blocks = re.split(r"\n(?=\S)", path.read_text().strip())
    return {block.split(" \\")[0]: block for block in blocks}


def names(lock: dict[str, str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in lock}


def test_stages_and_their_bases() -> None:
    arguments = dict(value.split("=", 1) for value in values("ARG", steps()[:1]))
    known = set()
    for stage in stages():
        base, *rest = stage[0].value.split()
        if base.startswith("$"):
            base = arguments[base.strip("${}")]
        assert base in known or re.fullmatch(r"[a-z0-9./-]+:[\w.-]+", base), "a base without a version"
        known |= {rest[1]} if rest else set()
    assert known == {"dependencies"}
    for source in re.findall(r"--from=(\w+)", " ".join(values("COPY", steps()))):
        assert source in known


def test_what_is_copied_is_there_and_let_through() -> None:
    sources = [shlex.split(value)[:-1] for value in values("COPY", steps()) if not value.startswith("--from")]
    assert len(sources) == 4
    for source in (name for names in sources for name in names):
        assert (ROOT / source).exists(), source
        assert not is_left_out(source, ignore_rules()), source
    assert not is_left_out("corun_ray/core/data/fade_models.json", ignore_rules())
    assert not is_left_out("corun_ray/service/models/shipped/corun-small/model.safetensors", ignore_rules())


@pytest.mark.parametrize(
    "path", [".git/config", "cluster/compose.env", "demo/x.png", "corun_ray/core/__pycache__/x.pyc", "runs/mlflow.db"]
)
def test_nothing_else_reaches_the_build(path: str) -> None:
    assert is_left_out(path, ignore_rules())


def test_the_accelerator_is_checked() -> None:
    (check,) = [value for value in values("RUN", stages()[0]) if value.startswith("case")]
    for accelerator, code in {"gpu": 0, "cpu": 0, "tpu": 1, "": 1}.items():
        done = subprocess.run(["sh", "-c", check], env={"ACCELERATOR": accelerator}, capture_output=True, text=True)
        assert done.returncode == code
        assert done.stderr == ("" if code == 0 else f"ACCELERATOR={accelerator}: expected gpu or cpu\n")


def packages_without(folder: Path, *left_out: str) -> Path:
    """Our installed packages by links, less the files whose path below site-packages matches one of the patterns.

    Real folders where libraries look for each other by `..`.
    """
    installed = Path(torch.__file__).parents[1]
    folders = {installed, installed / "torch", installed / "torch" / "lib"}
    folders |= {library.parent for library in installed.glob("nvidia/*/lib/*")}
    folders |= {library.parents[1] for library in installed.glob("nvidia/*/lib/*")} | {installed / "nvidia"}
    for source in (source for one in folders for source in one.iterdir()):
        path = source.relative_to(installed)
        if source not in folders and not any(fnmatch(str(path), pattern) for pattern in left_out):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).symlink_to(source)
    return folder


def test_the_cpu_image_leaves_out_what_torch_does_not_load(tmp_path: Path) -> None:
    (step,) = [value for value in values("RUN", stages()[0]) if "uninstall" in value]
    left_out = re.search(r"uninstall --yes ([\w -]+);", step)[1].split()  # type: ignore[index]
    assert left_out == ["triton", "nvidia-cusolver"] and set(left_out) <= names(locked(IMAGE_LOCK))
    code = "import sys; sys.path.append(sys.argv[1]); import torch, torchvision; print(torch.__file__)"
    for patterns, is_fine in ((["triton*", "*/libcusolver*"], True), (["triton*", "*/libcublas*"], False)):
        folder = packages_without(tmp_path / str(is_fine), *patterns)
        done = subprocess.run([sys.executable, "-S", "-c", code, str(folder)], capture_output=True, text=True)
        assert (done.returncode == 0) == is_fine, done.stderr
    assert not list((tmp_path / "True").rglob("libcusolver*"))


def test_debian_has_the_packages() -> None:
    packages = apt_packages()
    assert packages == ["g++", "wget"]
    if not shutil.which("apt-cache"):
        pytest.skip("no apt-cache")
    known = subprocess.run(["apt-cache", "policy", *packages], capture_output=True, text=True).stdout
    if "Candidate" not in known:
        pytest.skip("no package lists: apt-get update first")
    assert known.count("Candidate") - known.count("Candidate: (none)") == len(packages), known


def apt_packages() -> list[str]:
    (install,) = re.findall(r"apt-get install ([^&]*)", " ".join(values("RUN", steps())))
    return [word for word in install.split() if not word.startswith("-")]


def test_the_lock_is_pinned_hashed_and_part_of_the_whole() -> None:
    lock, whole = locked(IMAGE_LOCK), locked(ROOT / "requirements.lock")
    for line, block in lock.items():
        assert re.match(r"[a-z0-9.-]+(\[.*\])?==\S+", line), line
        assert "--hash=sha256:" in block, line
        assert whole.get(line) == block, f"{line}: other than in requirements.lock; run make lock"
    assert "://" not in IMAGE_LOCK.read_text(), "a host in the lock"


def test_the_lock_has_what_runs_and_no_more() -> None:
    extras = PROJECT["optional-dependencies"]
    needed = {canonicalize_name(Requirement(one).name) for one in PROJECT["dependencies"] + extras["server"]}
    found = names(locked(IMAGE_LOCK))
    assert needed <= found
    # pyiqa itself asks for some tools of development; its own licence has spandrel_extra_arches.
    assert not {"moto", "playwright", "mypy", "dockerfile-parse", "spandrel-extra-arches", "opencv-python"} & found


def test_dependencies_come_before_code() -> None:
    image = [f"{step.kind} {step.value}" for step in stages()[-1]]
    order = [
        next(i for i, step in enumerate(image) if mark in step)
        for mark in ("apt-get install", "COPY --from=dependencies", "COPY corun_ray", "COPY jobs", "USER", "CMD")
    ]
    assert order == sorted(order)
    (install,) = [value for value in values("RUN", stages()[0]) if "pip install" in value]
    assert "--require-hashes" in install and "--no-deps" in install and IMAGE_LOCK.name in install


def test_it_ends_as_a_user_without_rights() -> None:
    user = values("USER", stages()[-1])[-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "a number, so that Kubernetes can tell that it is not root"
    (account,) = re.findall(r"useradd [^&]*--uid (\d+)", " ".join(values("RUN", stages()[-1])))
    assert user.split(":")[0] == account


def test_no_secrets() -> None:
    for value in values("ENV", steps()) + values("ARG", steps()):
        for name in re.findall(r"(\w+)=", value):
            assert not re.search("TOKEN|SECRET|PASSW|KEY|CREDENTIAL", name), name
    assert "RAY_AUTH_MODE=token" in " ".join(values("ENV", stages()[-1]))


def test_what_it_runs_is_installed() -> None:
    (command,) = values("CMD", stages()[-1])
    (health,) = values("HEALTHCHECK", stages()[-1])
    program = json.loads(command)[0]
    assert (Path(sys.executable).parent / program).exists()
    assert json.loads(health.split("CMD", 1)[1])[0] in apt_packages()
    assert "PATH=/opt/venv/bin:" in " ".join(values("ENV", stages()[-1]))
