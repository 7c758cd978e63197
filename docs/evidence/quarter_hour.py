"""Measure on a GPU what is asked of one, most wanted first, in a quarter of an hour or less.

    make gpu OUT=gpu                                                  # where packages can be installed
    PYTHONPATH=/opt/site python3 docs/evidence/quarter_hour.py gpu --minutes 9       # a bare machine (see below)
    python docs/evidence/quarter_hour.py gpu --device cpu --tiny      # proves the script: all parts, tiny sizes
    python docs/evidence/quarter_hour.py gpu --table                  # the results as Markdown
    python docs/evidence/quarter_hour.py gpu --write docs/performance.md             # into that page

Parts, in their order: `tests` that need a GPU, `step` (each way to train beside the published one, and each switch for
GPUs beside none, by turns), `dehaze` (1, 12 and 48 megapixels), `stream` (samples a second and core), `service` (both
trainings through Ray, with a worker killed) and `training` (`corun-small` trained on, with `--photographs`, as long as
time is left).

Each part has a JSON file in OUT, which is written again after each of its runs: a stop loses the run under way alone.
Runs that are done are not repeated; `--again` forgets them. A run has a limit of seconds, and fails alone.

A bare machine needs the packages of `requirements-image.lock` for its Python in a folder on PYTHONPATH.
"""

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
EVIDENCE = ROOT / "docs" / "evidence"
PARTS = ("tests", "step", "dehaze", "stream", "service", "training")
SYNTHESIS = "data.synthesis, by turns"
FIGURES = "FIGURES.json"
"""Stands for the file of a run's figures in its command."""
BEGIN, END = "<!-- results of a GPU -->", "<!-- end of results -->"
"""Marks of a page between which the tables are written."""
SWITCHES = "switches, bf16"
"""The run of our step with each switch for GPUs and without any."""
KEPT_CHARACTERS = 3000
"""Of a run's output, from its end."""
LEAST_S = 15.0
"""With less time left, no run is begun."""
END_S = 20.0
"""For a command to end after SIGTERM."""
ADAPTED_PYTEST = ("-o", "addopts=", "-o", "strict_config=false")
"""An older pytest does not know all our settings."""


@dataclass(frozen=True)
class Run:
    """A command, and the most seconds that it may take."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    takes_rest: bool = False
    """Whether the run goes on until the time is up, and is then ended."""


@dataclass
class Outcome:
    """What a run came to."""

    name: str
    command: str
    state: str
    """done, failed, or stopped at its limit."""
    seconds: float
    figures: Any = None
    output: str = ""


@dataclass
class PartReport:
    """The outcomes of a part, and what they were measured on."""

    part: str
    device: str
    versions: dict[str, str]
    runs: list[Outcome] = field(default_factory=list)


# --- What is run ---


@dataclass(frozen=True)
class Wish:
    """What is measured where, and at which size."""

    device: str
    is_tiny: bool
    photographs: Path | None
    """The folder `corun_small`, if any."""
    output: Path

    def choose(self, real: str, tiny: str) -> list[str]:
        """Return the options of one of both sizes, as words."""
        return (tiny if self.is_tiny else real).split()


def plan_parts(wish: Wish) -> dict[str, list[Run]]:
    """Return the runs of each part, in the order in which they are wanted."""
    return {
        "tests": plan_tests(),
        "step": plan_steps(wish),
        "dehaze": plan_photographs(wish),
        "stream": plan_streams(wish),
        "service": plan_service(wish),
        "training": plan_training(wish),
    }


def plan_tests() -> list[Run]:
    """Return the run of the tests that need a GPU."""
    marked = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    files = [str(path.relative_to(ROOT)) for path in marked]
    return [Run("tests marked gpu", (sys.executable, "-m", "pytest", *ADAPTED_PYTEST, "-rs", "-m", "gpu", *files), 90)]


def plan_steps(wish: Wish) -> list[Run]:
    """Return the runs of the published step beside each way of ours, of our switches, and of parts and floor."""
    sizes = wish.choose("--size 288 --steps 23 --warm 8", "--size 64 --steps 3 --warm 2")
    ways = {"float32": "", "bf16": "--precision bf16"}
    # Compiling takes minutes on a CPU.
    if not wish.is_tiny:
        ways["bf16, compiled"] = "--precision bf16 --compile"
        ways["bf16, CUDA graphs"] = "--precision bf16 --compile --cuda-graphs"
    runs = []
    for name, options in ways.items():
        common = ("--plain", "--device", wish.device, *sizes, "--json", FIGURES)
        limit_s = 600 if wish.is_tiny else 150
        runs.append(Run(name, script_command("lazy_coherence.py", *common, *options.split()), limit_s))

    # Each switch for GPUs, beside none.
    common = ("--device", wish.device, *sizes, "--precision", "bf16", "--json", FIGURES)
    few = wish.choose("", "--switches copies+stream+graphs bf16")
    runs.append(Run(SWITCHES, script_command("gpu_switches.py", *common, *few), 600 if wish.is_tiny else 120))

    sizes = wish.choose("--size 288 --repeats 20", "--size 64 --stages 2 --repeats 1")
    for precision in ("fp32", "bf16"):
        command = bench("step", "--device", wish.device, "--precision", precision, *sizes, "--json", FIGURES)
        runs.append(Run(f"floor, {precision}", command, 60))
    return runs


def plan_photographs(wish: Wish) -> list[Run]:
    """Return a run for each size of photograph and precision."""
    sizes = {"1 MP": "1216x832", "12 MP": "12mp", "48 MP": "8000x6000 --memory-mib 65536"}
    if wish.is_tiny:
        sizes = {"0.01 MP": "128x96"}
    network = wish.choose("--repeats 3", "--stages 2 --width 8 --repeats 1")
    runs = []
    for size, options in sizes.items():
        for precision in ("fp32", "bf16"):
            rest = ("--device", wish.device, "--precision", precision, *network, "--json", FIGURES)
            runs.append(Run(f"{size}, {precision}", bench("dehaze", "--sizes", *options.split(), *rest), 90))
    return runs


def plan_streams(wish: Wish) -> list[Run]:
    """Return the run of the stream alone, and that of both places of a sample's pixel work, by turns."""
    sizes = wish.choose(
        "--batch 4 --samples 40 --steps 12 --stages 4 --width 30 --precision bf16",
        "--batch 1 --samples 2 --steps 1 --size 64",
    )
    places = script_command("synthesis_place.py", "--device", wish.device, *sizes, "--json", FIGURES)
    alone = bench("stream", *wish.choose("", "--samples 4"), "--json", FIGURES)
    return [Run("stream", alone, 90), Run(SYNTHESIS, places, 120)]


def plan_service(wish: Wish) -> list[Run]:
    """Return the run of both trainings through Ray."""
    tiny = "--steps 24 --size 64 --stages 2 --width 8 --precision fp32 --no-weights"
    common = ("--device", wish.device, "--timeout", "300")
    command = script_command("gpu_service.py", FIGURES, *common, *wish.choose("--steps 60", tiny))
    return [Run("pre-training, then Colabator", command, 330)]


def plan_training(wish: Wish) -> list[Run]:
    """Return the run that trains `corun-small` on; none without its photographs."""
    if wish.photographs is None:
        return []
    tiny = "--set train.steps=4 --set optim.precision=fp32 --set optim.compile=false"
    keys = ("--set", f"cluster.gpus_per_worker={int(wish.device == 'cuda')}", *wish.choose("", tiny))
    weights = ("--weights", str(wish.output.absolute() / "corun_small.pth"))
    command = script_command("gpu_training.py", FIGURES, str(wish.photographs.absolute()), *weights, *keys)
    return [Run("corun-small", command, 900, takes_rest=True)]


def script_command(script: str, *options: str) -> tuple[str, ...]:
    """Return the command of a script beside this one."""
    return (sys.executable, str(EVIDENCE / script), *options)


def bench(*options: str) -> tuple[str, ...]:
    """Return a command of `corun-ray bench`."""
    return (sys.executable, "-m", "corun_ray", "bench", *options)


# --- Running ---


def main() -> None:
    """Run what is not done yet, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of the results, a JSON file a part")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=13, help="for all of it (default 13)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to prove the script")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts alone")
    parser.add_argument("--photographs", type=Path, help="the folder corun_small, of gather_corun_small.py")
    parser.add_argument("--again", action="store_true", help="forget what is done")
    parser.add_argument("--table", action="store_true", help="print the results, run nothing")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the results into a page, run nothing")
    arguments = parser.parse_args()

    if arguments.write is not None:
        write_tables(arguments.write, format_tables(arguments.output))
        return
    if arguments.table:
        print(format_tables(arguments.output))
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU here (--device cpu --tiny proves the script without one)")

    deadline_s = time.monotonic() + 60 * arguments.minutes
    arguments.output.mkdir(parents=True, exist_ok=True)
    wish = Wish(arguments.device, arguments.tiny, arguments.photographs, arguments.output)
    plan = plan_parts(wish)
    for part in arguments.only:
        report = None if arguments.again else read_report(arguments.output, part)
        if report is None:
            report = PartReport(part, *describe_machine(arguments.device))
        run_part(report, plan[part], arguments.output, deadline_s)
    print(format_tables(arguments.output))


def run_part(report: PartReport, runs: list[Run], output: Path, deadline_s: float) -> None:
    """Run what a part lacks, as long as time is left; save the part after each run."""
    done = {outcome.name for outcome in report.runs if outcome.state == "done"}
    for run in runs:
        left_s = deadline_s - time.monotonic()
        if run.name in done or left_s < LEAST_S:
            print(f"{report.part}: {run.name}: {'done before' if run.name in done else 'no time left'}", flush=True)
            continue
        print(f"{report.part}: {run.name} (at most {min(run.limit_s, left_s):.0f} s)", flush=True)
        outcome = execute(run, left_s)
        print(f"  {outcome.state} after {outcome.seconds:.1f} s", flush=True)

        report.runs = [other for other in report.runs if other.name != run.name] + [outcome]
        save_report(report, output)


def execute(run: Run, left_s: float) -> Outcome:
    """Run a command until it ends, or until its limit; return what it came to."""
    with tempfile.TemporaryDirectory() as folder:
        figures, log = Path(folder) / FIGURES, Path(folder) / "log"
        command = [str(figures) if argument == FIGURES else argument for argument in run.command]
        # The code of this folder, a Ray of its own without a token, and threads that sleep while they wait.
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": path, "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": "local"}
        environment["OMP_WAIT_POLICY"] = "PASSIVE"

        started_s = time.monotonic()
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
            )
            limit_s = max(1.0, left_s - END_S if run.takes_rest else min(run.limit_s, left_s))
            try:
                state = "failed" if process.wait(limit_s) else "done"
            except subprocess.TimeoutExpired:
                state = "done" if end_group(process) == 0 and run.takes_rest else "stopped at its limit"
        seconds = time.monotonic() - started_s

        found = json.loads(figures.read_text()) if figures.exists() else None
        said = log.read_text(errors="replace")[-KEPT_CHARACTERS:]
        return Outcome(run.name, shlex.join(run.command), state, seconds, found, said)


def end_group(process: subprocess.Popen[bytes]) -> int:
    """End a command and all that it started: by SIGTERM, after some seconds by SIGKILL; return its exit code."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        return process.wait(END_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def describe_machine(device: str) -> tuple[str, dict[str, str]]:
    """Return the name of the GPU, or of the processor, and the versions of what computes."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if device == "cuda":
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
        return torch.cuda.get_device_name(), versions
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip(), versions


# --- Results ---


def save_report(report: PartReport, output: Path) -> None:
    """Write a part's file; it is whole at any moment."""
    file = output / f"{report.part}.json"
    scratch = file.with_suffix(".new")
    scratch.write_text(json.dumps(asdict(report), indent=1))
    scratch.replace(file)


def read_report(output: Path, part: str) -> PartReport | None:
    """Read a part's file; None where there is none."""
    file = output / f"{part}.json"
    if not file.exists():
        return None
    content = json.loads(file.read_text())
    runs = [Outcome(**outcome) for outcome in content.pop("runs")]
    return PartReport(runs=runs, **content)


def format_tables(output: Path) -> str:
    """Format all results as Markdown: the machine, then a table for each part."""
    reports = {}
    for part in PARTS:
        report = read_report(output, part)
        if report is not None:
            reports[part] = report
    if not reports:
        raise SystemExit(f"{output}: no results yet")

    first = next(iter(reports.values()))
    lines = [f"{first.device}; {', '.join(f'{name} {version}' for name, version in first.versions.items())}."]
    for part, report in reports.items():
        lines += ["", *FORMATS[part]([run for run in report.runs if run.state == "done"])]
        for run in report.runs:
            if run.state != "done":
                lines += ["", f"{part}, {run.name}: {run.state} after {run.seconds:.0f} s"]
    return "\n".join(lines)


def write_tables(page: Path, tables: str) -> None:
    """Put the tables between a page's marks.

    Raises `SystemExit` where the page has none.
    """
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"--write: {page}: expected the marks {BEGIN} and {END}")
    page.write_text(f"{before}{begin}\n{tables}\n{end}{after}")


def format_grid(head: list[str], rows: list[list[str]]) -> list[str]:
    """Format a Markdown table."""
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def format_tests(runs: list[Outcome]) -> list[str]:
    """Format the closing line of pytest."""
    return [f"Tests marked `gpu`: {run.output.strip().splitlines()[-1].strip('= ')}" for run in runs]


def format_steps(runs: list[Outcome]) -> list[str]:
    """Format the published step beside each of ours, our switches, and the floors of ours."""
    rows, floors, switches = [], [], []
    for run in runs:
        found = run.figures
        if run.name == SWITCHES:
            switches = ["", *format_switches(found)]
            continue
        if run.name.startswith("floor"):
            floors.append(format_floor(run.name, found[0]))
            continue
        scoring_s = sum(seconds for name, seconds in found["parts_s"].items() if "scores" in name)
        share = scoring_s / sum(found["parts_s"].values())
        ratio = found["published_s"] / found["ours_s"]
        memory = [f"{found[key]:.0f}" for key in ("published_mib", "ours_mib")]
        row = [run.name, f"{1000 * found['published_s']:.1f}", f"{1000 * found['ours_s']:.1f}", f"{ratio:.2f}"]
        rows.append([*row, f"{share:.0%}", *memory])
    head = ["ours", "published, ms", "ours, ms", "times as fast", "of ours: scoring", "published, MiB", "ours, MiB"]
    floor_head = ["step, scorers without weights", "ms", "arithmetic, ms", "traffic, ms", "TFLOP/s", "GB/s", "MiB"]
    return [*format_grid(head, rows), *switches, "", *format_grid(floor_head, floors)]


def format_switches(found: dict[str, dict[str, float]]) -> list[str]:
    """Format our step with each switch, the first without any."""
    plain_s, rows = next(iter(found.values()))["step_s"], []
    for name, way in found.items():
        times = [f"{1000 * way['step_s']:.1f}", f"{plain_s / way['step_s']:.2f}"]
        rows.append([name, *times, f"{way['mib']:.0f}", f"{way['first_loss_moved']:.1g}"])
    return format_grid(["ours in bf16 with", "ms", "times as fast", "MiB", "first loss moved by"], rows)


def format_floor(name: str, report: dict[str, Any]) -> list[str]:
    """Format a time, its floors, the device's limits that they follow from, and the memory."""
    work, machine = report["work"], report["machine"]
    arithmetic_s, traffic_s = work["flops"] / machine["flops_per_s"], work["bytes"] / machine["bytes_per_s"]
    measured_s = report.get("step_s") or report["image_s"]
    times = [f"{1000 * measured_s:.1f}"]
    times += [f"{1000 * floor_s:.1f} ({floor_s / measured_s:.0%})" for floor_s in (arithmetic_s, traffic_s)]
    limits = [f"{machine['flops_per_s'] / 1e12:.2f}", f"{machine['bytes_per_s'] / 1e9:.0f}"]
    return [name, *times, *limits, f"{report['peak_bytes'] / 2**20:.0f}"]


def format_photographs(runs: list[Outcome]) -> list[str]:
    """Format the restoration of photographs by size."""
    head = ["photograph", "ms", "arithmetic, ms", "traffic, ms", "TFLOP/s", "GB/s", "MiB"]
    return format_grid(head, [format_floor(run.name, run.figures[0]) for run in runs])


def format_stream(runs: list[Outcome]) -> list[str]:
    """Format images a second and core by kind of sample, and both places of a sample's pixel work."""
    rows = []
    for run in runs:
        if run.name == SYNTHESIS:
            continue
        for kind, result in run.figures["kinds"].items():
            rows.append([kind, f"{result['images_per_s']:.1f}", f"{1000 * result['sample_s']:.1f}"])
    places = [run for run in runs if run.name == SYNTHESIS]
    return [*format_grid(["samples", "images/s and core", "ms a sample"], rows), "", *format_figures(places)]


def format_figures(runs: list[Outcome]) -> list[str]:
    """Format a part whose figures have names."""
    rows = []
    for run in runs:
        for name, value in run.figures.items():
            rows.append([run.name, name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value)])
    return format_grid(["run", "what", "figure"], rows)


FORMATS = {
    "tests": format_tests,
    "step": format_steps,
    "dehaze": format_photographs,
    "stream": format_stream,
    "service": format_figures,
    "training": format_figures,
}

if __name__ == "__main__":
    main()
