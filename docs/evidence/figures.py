"""Run the commands that a page shows, and put the tables that they print into the page.

A table stands below its command, between two marks. Its name is of your choice:

        python docs/evidence/network_speed.py --size 288

    <!-- figures: network -->
    ...
    <!-- end of figures -->

All tables of a page, or some of them, are made again by

    python docs/evidence/figures.py docs/performance.md
    python docs/evidence/figures.py docs/performance.md --only network step
    python docs/evidence/figures.py docs/performance.md --list

A table is the last one that its command prints; the line above it names the processor and the versions. Variables may
stand before a command (`NAME=value python ...`). With `ATEN_CPU_CAPABILITY=avx2` the line says so. The page is written
after each table, so a stop loses the one under way alone.
"""

import argparse
import datetime
import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- figures: {name} -->\n", "<!-- end of figures -->"
BLOCK = re.compile(r"<!-- figures: (?P<name>[\w-]+) -->\n(?P<table>.*?)<!-- end of figures -->", re.DOTALL)
COMMAND = re.compile(r"^    ((?:[A-Z_]+=\S+ )*python docs/evidence/\S+\.py.*?)(?:  +#.*)?$", re.MULTILINE)
INSTRUCTION_SETS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "avx512f": "AVX-512", "avx2": "AVX2"}
"""Flags of /proc/cpuinfo that matter here, the fastest first."""


@dataclass(frozen=True)
class Figures:
    """A table of a page, and the command that prints it."""

    name: str
    command: str


def main() -> None:
    """Make the tables again, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these tables alone")
    parser.add_argument("--list", action="store_true", help="list tables and commands, run nothing")
    arguments = parser.parse_args()

    found = find_figures(arguments.page.read_text())
    unknown = set(arguments.only or ()) - {figures.name for figures in found}
    if unknown:
        raise SystemExit(f"--only: {arguments.page} has no table {', '.join(sorted(unknown))}")

    for figures in found:
        if arguments.only and figures.name not in arguments.only:
            continue
        print(f"{figures.name}: {figures.command}", flush=True)
        if not arguments.list:
            table = f"{describe_machine(figures.command)}\n\n{run(figures.command)}"
            arguments.page.write_text(replace_table(arguments.page.read_text(), figures.name, table))
            print(table, flush=True)


def find_figures(page: str) -> list[Figures]:
    """Find the marked tables of a page, each with the last command above it.

    Raises `SystemExit` where a table has no command.
    """
    found = []
    for block in BLOCK.finditer(page):
        commands = COMMAND.findall(page, 0, block.start())
        if not commands:
            raise SystemExit(f"{block['name']}: expected a command of docs/evidence above the table")
        found.append(Figures(block["name"], commands[-1]))
    return found


def replace_table(page: str, name: str, table: str) -> str:
    """Return the page with another table of that name."""

    def write(block: re.Match[str]) -> str:
        return f"{BEGIN.format(name=name)}{table}\n{END}" if block["name"] == name else block[0]

    return BLOCK.sub(write, page)


def run(command: str) -> str:
    """Run a command; return the last table that it prints.

    Raises `SystemExit` where it fails, or prints none.
    """
    variables, words = split_variables(command)
    words[0] = sys.executable
    ran = subprocess.run(words, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{command}: exit code {ran.returncode}\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    return take_last_table(ran.stdout.splitlines(), command)


def split_variables(command: str) -> tuple[dict[str, str], list[str]]:
    """Split a command into the variables before it, and its words."""
    words, variables = shlex.split(command), {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    return variables, words


def take_last_table(lines: Sequence[str], command: str) -> str:
    """Return the last run of lines that begin with a bar."""
    table: list[str] = []
    for line in reversed(lines):
        if line.startswith("|"):
            table.insert(0, line)
        elif table:
            break
    if not table:
        raise SystemExit(f"{command}: expected a Markdown table in its output")
    return "\n".join(table)


def describe_machine(command: str) -> str:
    """Describe the processor, the kernels where the command names them, the versions and the day in one line."""
    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", text)
    flags = set(text.split())
    sets = [name for flag, name in INSTRUCTION_SETS.items() if flag in flags]
    missing = "" if "amx_bf16" in flags else ", no AMX"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "ray"))
    processor = f"{model[1] if model else 'a processor'} ({sets[0] if sets else 'no AVX2'}{missing})"
    if split_variables(command)[0].get("ATEN_CPU_CAPABILITY") == "avx2":
        processor += " with the kernels of an AVX2 processor"
    return f"{processor}, {os.cpu_count()} cores; {versions}; {datetime.date.today().isoformat()}:"


if __name__ == "__main__":
    main()
