"""Measure the restoration of photographs: as a whole, and within a memory, each in a process of its own.

A photograph is `WIDTHxHEIGHT:CHANNELS` (of the network), and `:MIB` of memory where it is not restored as a whole.
Prints a Markdown table; memory is the most that the process had:

    python docs/evidence/photographs.py
    python docs/evidence/photographs.py --photographs 1920x1088:8 1920x1088:8:1100 --repeats 3
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PHOTOGRAPHS = ("1920x1088:8", "1920x1088:8:2816", "4000x3008:8:2816", "1920x1088:30", "1920x1088:30:2816")
MIB = 2**20


@dataclass(frozen=True)
class Photograph:
    """A photograph, the network's width, and the memory for it; None: as a whole."""

    size: str
    width: int
    memory_mib: int | None

    @classmethod
    def parse(cls, text: str) -> "Photograph":
        """Parse `1920x1088:30` or `1920x1088:30:2816`."""
        size, width, *memory_mib = text.split(":")
        return cls(size, int(width), int(memory_mib[0]) if memory_mib else None)


def measure(photograph: Photograph, stages: int, repeats: int) -> dict[str, Any]:
    """Measure one photograph by `corun-ray bench dehaze`; return its report."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        network = ["--width", str(photograph.width), "--stages", str(stages)]
        words = ["--sizes", photograph.size, *network, "--repeats", str(repeats), "--json", str(file)]
        if photograph.memory_mib is not None:
            words += ["--memory-mib", str(photograph.memory_mib)]
        subprocess.run([sys.executable, "-m", "corun_ray", "bench", "dehaze", *words], check=True, stdout=sys.stderr)
        report: dict[str, Any]
        (report,) = json.loads(file.read_text())
        return report


def main() -> None:
    """Measure all photographs; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--photographs", nargs="+", type=Photograph.parse, default=[*map(Photograph.parse, PHOTOGRAPHS)]
    )
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()

    lines = [
        "| photograph | width | way | time, s | megapixels/s | memory, MiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for photograph in arguments.photographs:
        report = measure(photograph, arguments.stages, arguments.repeats)
        columns, rows = map(int, photograph.size.split("x"))
        way = "as a whole" if photograph.memory_mib is None else f"in {photograph.memory_mib} MiB"
        speed = columns * rows / 1e6 / report["image_s"]
        figures = f"{report['image_s']:.1f} | {speed:.3f} | {report['peak_bytes'] / MIB:.0f}"
        lines.append(f"| {columns} x {rows} px | {photograph.width} | {way} | {figures} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
