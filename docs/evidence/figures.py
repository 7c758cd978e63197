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

A table is the last one that its command prints; the line above it names the processor and the versions. The page is
written after each table, so a stop loses the one under way alone.
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
COMMAND = re.compile(r"^    (python docs/evidence/\S+\.py.*?)(?:  +#.*)?$", re.MULTILINE)
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
            table = f"{describe_machine()}\n\n{run(figures.command)}"
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
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{command}: exit code {ran.returncode}\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    return take_last_table(ran.stdout.splitlines(), command)


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


def describe_machine() -> str:
    """Describe the processor, the versions and the day in one line."""
    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", text)
    flags = set(text.split())
    sets = [name for flag, name in INSTRUCTION_SETS.items() if flag in flags]
    missing = "" if "amx_bf16" in flags else ", no AMX"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "ray"))
    processor = f"{model[1] if model else 'a processor'} ({sets[0] if sets else 'no AVX2'}{missing})"
    return f"{processor}, {os.cpu_count()} cores; {versions}; {datetime.date.today().isoformat()}:"


if __name__ == "__main__":
    main()
