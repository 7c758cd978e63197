"""Run `corun-ray bench pool` and print its figures as one Markdown table.

Each number of shards has a column. `--json` and `--plot` keep what the benchmark writes:

    python docs/evidence/pool_scale.py --labels 100000 --shards 1 2 4 --plot docs/pool_scale.png
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Figures = dict[str, Any]

KB, MB, GB = 1e3, 1e6, 1e9


def format_latency(latency: Figures) -> str:
    """Format median and p99: `1.7 / 2.8 ms`."""
    return f"{latency['median_ms']:.1f} / {latency['p99_ms']:.1f} ms"


def format_save(save: Figures) -> str:
    """Format the wait of a step, the time beside it, and the bytes: `0.9 / 71 s (33.3 GB)`."""
    written = save["written_bytes"]
    size = f"{written / GB:.1f} GB" if written >= GB else f"{written / MB:.3g} MB"
    return f"{save['freeze_s']:.2g} / {save['finish_s']:.2g} s ({size})"


def format_memory(memory: Figures) -> str:
    """Format what a label takes of memory and of the index: `333 / 4.2 kB`."""
    image, index = memory["counted_bytes_per_label"] / KB, memory["index_bytes_per_label"] / KB
    return f"{image:.0f} / {index:.2g} kB"


def format_delay(job: Figures | None) -> str:
    """Format the delay of a step by the pool: `0.23 ms (0.08 %) / 2.1 ms`."""
    if job is None:
        return "all labels are in memory"
    blocked, share = job["blocked"], job["blocked_share_of_step"]
    return f"{blocked['mean_ms']:.3g} ms ({100 * share:.2g} %) / {blocked['p99_ms']:.3g} ms"


LEVEL_ROWS: dict[str, Callable[[Figures], str]] = {
    "offers of 2 processes, labels/s": lambda level: f"{level['offers_per_s']:,.0f}",
    "one offer until it is decided, median / p99": lambda level: format_latency(level["offer"]),
    "reads from memory of 2 processes, 8 a read, labels/s": lambda level: (
        f"{level['from_memory']['labels_per_s']:,.0f}"
    ),
    "read of one label in memory, median / p99": lambda level: format_latency(level["from_memory"]["one"]),
    "reads from storage of 2 processes, 8 a read, labels/s": lambda level: (
        f"{level['from_storage']['labels_per_s']:,.0f}"
    ),
    "read of one label from storage, median / p99": lambda level: format_latency(level["from_storage"]["one"]),
    "full snapshot, sum of the rounds: step waits / written beside it": lambda level: format_save(level["full_save"]),
    "snapshot after 1 % was replaced: step waits / written beside it": lambda level: format_save(level["small_save"]),
    "a label in memory / its index": lambda level: format_memory(level["memory"]),
    "restore: index / first read": lambda level: (
        f"{level['restore']['index_s']:.2g} / {level['restore']['first_read_s']:.2g} s"
    ),
}
"""Name of a row → its cell for a full pool."""
JOB_ROWS = {
    "steps at different times": "job",
    "all steps at once": "job_in_lockstep",
    "any labels, also those in storage": "job_beyond_memory",
}
"""Name of a simulated job → its key in the report."""


def main() -> None:
    """Run the benchmark; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, default=100_000)
    parser.add_argument("--side", type=int, default=288, metavar="PX")
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--workers", type=int, default=64, help="of the simulated job (default 64)")
    parser.add_argument("--memory-mib", type=int, default=4096)
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the benchmark's report")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="keep the benchmark's plot")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        file = arguments.json or Path(folder) / "report.json"
        size = ["--labels", str(arguments.labels), "--side", str(arguments.side), "--workers", str(arguments.workers)]
        words = [*size, "--memory-mib", str(arguments.memory_mib), "--shards", *map(str, arguments.shards)]
        words += ["--json", str(file)] + (["--plot", str(arguments.plot)] if arguments.plot else [])
        subprocess.run([sys.executable, "-m", "corun_ray", "bench", "pool", *words], check=True, stdout=sys.stderr)
        print(format_table(json.loads(file.read_text())))


def format_table(report: Figures) -> str:
    """Format the Markdown table of a report of `bench pool --json`."""
    series = report["series"]
    names = ["1 shard" if one["shards"] == 1 else f"{one['shards']} shards" for one in series]
    lines = [format_row(f"{report['settings']['labels']:,} labels", names), format_row("---", ["---"] * len(series))]

    # The last level is the full pool.
    for name, format_cell in LEVEL_ROWS.items():
        lines.append(format_row(name, [format_cell(one["levels"][-1]) for one in series]))

    workers = report["settings"]["workers"]
    for name, key in JOB_ROWS.items():
        title = f"{workers} workers, {name}: a step waits, mean (share of the step) / p99"
        lines.append(format_row(title, [format_delay(one[key]) for one in series]))
    return "\n".join(lines)


def format_row(name: str, cells: list[str]) -> str:
    """Format a row of a Markdown table."""
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
