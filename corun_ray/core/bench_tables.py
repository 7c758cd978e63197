"""What the benchmarks found out, for a person to read."""

from corun_ray.core.bench_dehaze import DehazeReport
from corun_ray.core.bench_machine import Machine, Work
from corun_ray.core.bench_step import StepReport


def step_table(report: StepReport) -> str:
    """What a person reads of a step."""
    settings, total_s = report.settings, sum(report.parts_s.values())
    kind = "compiled" if settings.compile else "eager"
    lines = [
        f"\n{settings.method} step: {settings.stages} stages, {settings.size_px} px, batch {settings.batch}, "
        f"{settings.precision}, {kind}; {settings.win_rate:.0%} of candidates win",
        f"  {'whole step, median':<24}{report.step_s * 1000:>10.1f} ms",
    ]
    lines += [
        f"    {name:<22}{seconds * 1000:>10.1f} ms  {seconds / total_s:>4.0%}"
        for name, seconds in report.parts_s.items()
    ]
    return "\n".join([*lines, *_floor_lines(report.work, report.machine, report.step_s, report.peak_bytes)])


def dehaze_table(report: DehazeReport) -> str:
    """What a person reads of a restoration."""
    settings = report.settings
    kind = "compiled" if settings.compile else "eager"
    memory = f"in {settings.memory_mib} MiB" if settings.memory_mib else "as a whole"
    lines = [
        f"\ndehaze {settings.width_px} x {settings.height_px} px, {memory}: {settings.stages} stages, "
        f"{settings.precision}, {kind}",
        f"  {'an image, median':<24}{report.image_s * 1000:>10.1f} ms",
        f"  {'speed':<24}{settings.megapixels / report.image_s:>10.3f} megapixels/s",
    ]
    return "\n".join([*lines, *_floor_lines(report.work, report.machine, report.image_s, report.peak_bytes)])


def _floor_lines(work: Work, machine: Machine, measured_s: float, peak_bytes: int) -> list[str]:
    arithmetic_s, traffic_s = work.floor_s(machine)
    return [
        f"  {'floor, arithmetic':<24}{arithmetic_s * 1000:>10.1f} ms  {arithmetic_s / measured_s:>4.0%}  "
        f"({work.flops / 1e9:.1f} GFLOP at {machine.flops_per_s / 1e12:.2f} TFLOP/s)",
        f"  {'floor, memory traffic':<24}{traffic_s * 1000:>10.1f} ms  {traffic_s / measured_s:>4.0%}  "
        f"({work.bytes / 1e9:.2f} GB at {machine.bytes_per_s / 1e9:.0f} GB/s)",
        f"  {'most memory':<24}{peak_bytes / 2**20:>10.0f} MiB",
    ]
