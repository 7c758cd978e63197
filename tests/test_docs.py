"""The commands of README and docs: each is run by a test, or says that it needs a GPU or a cloud."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from corun_ray.cli.app import parse
from corun_ray.config.loading import load_jobs
from corun_ray.core.errors import UserError
from tests import ROOT
from tests.naming import MAKERS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "cluster").glob("*.md"))]
COMMAND = re.compile(r"(corun-ray|make|ray|python3?|mlflow|docker|kubectl|curl|aws|pip|\.|export) ")
MARK = re.compile(r"<!-- (run|run, may say no|file: \S+|tested: .+|needs: .+) -->")
NEEDS = ("a GPU", "a cloud")
TUTORIAL_TIMEOUT_S = 900


@dataclass(frozen=True)
class Block:
    """Indented lines of a page, and the comment that stands before them."""

    page: str
    line: int
    mark: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The command lines among them, continued ones joined, without comments."""
        joined = self.text.replace("\\\n", " ")
        lines = (line.partition("  #")[0].partition("   ")[0].strip() for line in joined.splitlines())
        return [line for line in lines if COMMAND.match(f"{line} ")]


def blocks(page: Path) -> Iterator[Block]:
    """Every indented block of a page that is not part of a list."""
    lines = page.read_text().splitlines()
    mark, start = "", None
    for number, line in enumerate([*lines, "end"], 1):
        if line.startswith("    ") or (start is not None and not line):
            start = start or number
            continue
        if start is not None:
            text = "\n".join(one[4:] for one in lines[start - 1 : number - 1]).rstrip()
            yield Block(str(page.relative_to(ROOT)), start, mark, text + "\n")
            mark, start = "", None
        if found := MARK.fullmatch(line):
            mark = found[1]
        elif line:
            mark = ""


WITH_COMMANDS = [block for page in PAGES for block in blocks(page) if block.commands]
"""Blocks with a command in them."""


@pytest.mark.parametrize("block", WITH_COMMANDS, ids=lambda block: f"{block.page}:{block.line}")
def test_a_block_of_commands_says_what_runs_it_or_what_it_needs(block: Block) -> None:
    kind, _, rest = block.mark.partition(": ")
    assert kind in ("run", "run, may say no", "tested", "needs"), f"no mark before {block.text!r}"
    if kind == "needs":
        assert rest in NEEDS
    elif kind == "tested":
        for test in rest.split(", "):
            path, _, name = test.partition("::")
            text = (ROOT / path).read_text()
            assert re.search(rf"^(async )?def {name}\(", text, re.M) if name else "def test_" in text, test
    else:
        assert block.page == "docs/tutorial.md", "only the tutorial is run as it stands"


def _corun_commands() -> Iterator[tuple[str, str]]:
    for block in WITH_COMMANDS:
        for command in block.commands:
            if command.startswith("corun-ray ") and not re.search(r"[\[…|]|\.\.\.", command):
                yield f"{block.page}:{block.line}", command


@pytest.mark.parametrize(("where", "command"), list(_corun_commands()))
def test_a_command_has_the_options_that_the_page_says(where: str, command: str) -> None:
    words = shlex.split(command)[1:]
    try:
        parse(words)
    except (UserError, typer.Exit) as error:
        pytest.fail(f"{where}: {command}: {error}")


FILES = sorted({name for block in WITH_COMMANDS for name in re.findall(r"\b(?:jobs|cluster)/[\w/.-]+", block.text)})
MADE_BY_THE_READER = ("cluster/compose.env",)


@pytest.mark.parametrize("path", FILES)
def test_the_files_that_commands_name_are_there(path: str) -> None:
    assert path in MADE_BY_THE_READER or (ROOT / path.rstrip(".")).exists()


def test_make_has_the_targets() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    named = {name for block in WITH_COMMANDS for name in re.findall(r"^make ([a-z]+)", block.text, re.M)}
    assert named and named <= set(targets)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
def test_the_tutorial_runs_as_it_stands(tmp_path: Path) -> None:
    script = ["set -e"]
    for block in blocks(ROOT / "docs" / "tutorial.md"):
        kind, _, rest = block.mark.partition(": ")
        if kind == "file":
            assert [*yaml.safe_load_all(block.text)]
            script.append(f"cat > {rest} <<'END'\n{block.text}END")
        elif kind == "run":
            script += block.text.splitlines()
        elif kind == "run, may say no":
            script += [f"{line} || [ $? = 1 ]" for line in block.text.splitlines()]
    venv = Path(sys.prefix)
    (tmp_path / ".venv").symlink_to(venv)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{venv / 'bin'}:{os.environ['PATH']}"}
    environment.pop("RAY_ADDRESS", None)
    ran = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TUTORIAL_TIMEOUT_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert "resumes this run" in ran.stdout or "has ended before" in ran.stdout
    assert (tmp_path / "my_model" / "model.safetensors").exists()
    # The folder's own record is hidden.
    dehazed = [path.name for path in (tmp_path / "dehazed").iterdir() if path.name != ".model.json"]
    assert len(dehazed) == len([*(tmp_path / "mine" / "hazy").iterdir()])
    assert [*(tmp_path / "labels").rglob("*.png")]


KEYS_OF_DATA_SETS = [block for block in blocks(ROOT / "docs" / "datasets.md") if not block.commands]
PAIRING_KEYS = ("match", "match_clear", "crop_truth")


def _find_sections(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every mapping within a tree, and the tree."""
    yield tree
    for value in tree.values():
        if isinstance(value, dict):
            yield from _find_sections(value)


@pytest.mark.parametrize("block", KEYS_OF_DATA_SETS, ids=lambda block: f"line {block.line}")
def test_the_keys_that_read_public_data_sets_make_a_job(block: Block, tmp_path: Path) -> None:
    tree = yaml.safe_load(block.text)
    kind = "evaluate" if "evaluate" in tree else "colabator" if "hazy" in tree["data"] else "pretrain"
    file = tmp_path / "job.yaml"
    file.write_text(f"kind: {kind}\nname: page\n{block.text}")
    (job,) = load_jobs(file, env={})
    assert job.kind == kind

    # The patterns of the page are those that pair small sets of the same names.
    known = []
    for make in MAKERS.values():
        keys = make(tmp_path / make.__name__).keys
        known.append([keys.get(name) for name in PAIRING_KEYS])
    for section in _find_sections(tree):
        assert "match" not in section or [section.get(name) for name in PAIRING_KEYS] in known


def test_the_page_of_data_sets_uses_every_pattern_that_is_tried(tmp_path: Path) -> None:
    text = "".join(block.text for block in KEYS_OF_DATA_SETS)
    for make in MAKERS.values():
        assert f"match: '{make(tmp_path / make.__name__).keys['match']}'" in text


def _list_names_of_the_design() -> list[str]:
    """Return what stands between backticks in docs/design.md and looks like a file or a name of the code."""
    found = re.findall(r"`([\w./]+)`", (ROOT / "docs" / "design.md").read_text())
    return sorted({name for name in found if re.fullmatch(r"[\w/]+\.py|[a-z_]+_[a-z_]+|[A-Z]\w+(\.\w+)?", name)})


@pytest.mark.parametrize("name", _list_names_of_the_design())
def test_the_design_names_files_and_functions_that_are_there(name: str) -> None:
    files = [*(ROOT / "corun_ray").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    if name.endswith(".py"):
        assert any(f"/{path.relative_to(ROOT)}".endswith(f"/{name}") for path in files), name
        return
    code = "\n".join(path.read_text() for path in files if path.is_relative_to(ROOT / "corun_ray"))
    for part in name.split("."):
        assert re.search(rf"(def|class) {part}\b|\b{part}: |\b{part} = |\"{part}\"", code), name
