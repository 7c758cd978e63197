"""What the benchmarks found out, for a person to read."""

from collections.abc import Iterator

from corun_ray.bench.dehaze import DehazeReport
from corun_ray.bench.machine import Machine, Work
from corun_ray.bench.scaling import BYTES_PER_GBIT, FIT_BYTES, BackwardReport, RingReport, ScalingReport
from corun_ray.bench.scaling_model import MIB, ManyWorkersStep, stream_cores
from corun_ray.bench.step import StepReport


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


def scaling_table(report: ScalingReport) -> str:
    """What a person reads of a step on many GPUs, and of the check."""
    settings, alone, total = report.settings, report.alone, sum(report.buckets)
    lines = [
        f"\n{settings.method} on many GPUs: {settings.stages} stages, width {settings.width}, {total / 4e6:.2f} M "
        f"parameters, {total / MIB:.1f} MiB of gradients in buckets of {_mib(report.buckets)} MiB",
        f"  alone: {_ms(alone.step_s)} ms, images: {alone.images}; backward pass {_ms(alone.backward_s)} ms",
    ]
    if pool := settings.pool():
        lines.append(
            f"  labels of {pool.label_bytes / 1e3:.0f} kB are needed after {_ms(alone.before_labels_s)} ms, "
            f"shards: {pool.shards}; {pool.win_rate:.0%} of candidates win, rating one takes {_ms(alone.rating_s)} ms"
        )
    for link, steps in zip(settings.link_gbit, report.by_link, strict=True):
        lines += [
            f"\n  nodes of {settings.gpus_per_node} GPUs, {settings.node_gbit:g} Gbit/s in them, {link:g} between",
            *_steps_lines(steps, report),
        ]
    for ring in report.rings:
        lines += _ring_lines(ring)
    if report.backward is not None:
        lines += _backward_lines(report.backward, report.rings[0])
    return "\n".join(lines)


def _steps_lines(steps: list[ManyWorkersStep], report: ScalingReport) -> Iterator[str]:
    def cores(step: ManyWorkersStep) -> int:
        return stream_cores(step.workers, report.alone.images, step.step_s, report.settings.samples_per_s)

    rows: dict[str, list[str]] = {
        "GPUs": [str(step.workers) for step in steps],
        "all-reduce, ms": [_ms(step.all_reduce_s) for step in steps],
        "  after the backward pass": [_ms(step.exposed_s) for step in steps],
        "pool's last answer, ms": [_ms(step.pool_answers_s) for step in steps],
        "  after the teacher": [_ms(step.pool_wait_s) for step in steps],
        "wait for ratings, ms": [_ms(step.rating_wait_s) for step in steps],
        "step, ms": [_ms(step.step_s) for step in steps],
        "efficiency": [f"{step.efficiency:.1%}" for step in steps],
        "costs most": [(step.costs or ["nothing"])[0] for step in steps],
        "labels moved, Gbit/s": [f"{step.label_bytes_per_s / BYTES_PER_GBIT:.2f}" for step in steps],
        "cores for the stream": [str(cores(step)) for step in steps],
    }
    yield from (f"    {name:<24}" + "".join(f"{text:>11}" for text in texts) for name, texts in rows.items())
    remedies: dict[str, list[str]] = {}
    for step in steps:
        for cost in step.costs:
            remedies.setdefault(_remedy(cost, step), []).append(str(step.workers))
    yield from (f"    {remedy} ({', '.join(gpus)} GPUs)" for remedy, gpus in remedies.items())


def _remedy(cost: str, step: ManyWorkersStep) -> str:
    """Which key of a job helps."""
    match cost:
        case "gradients":
            return "gradients: train.accumulate or train.batch_per_worker, to average them once for more images"
        case "rating":
            return "rating: coherence.share_blocks, for workers to rate together; or more images a step, which even out"
        case "pool" if step.shards_needed:
            return f"pool: pool.shards: {step.shards_needed}, to answer in the teacher's time"
        case _:
            return "pool: pool.encoding: uint8 or a faster link, as no pool.shards answers in the teacher's time"


def _ring_lines(ring: RingReport) -> Iterator[str]:
    link = ring.link
    yield (
        f"\n  check: gloo between {ring.processes} processes of this machine, a link of "
        f"{link.latency_s * 1e6:.0f} us and {link.bytes_per_s / 1e9:.2f} GB/s fitted to {len(FIT_BYTES)} of the sizes"
    )
    yield f"    {'MiB':>10}{'measured, ms':>15}{'formula, ms':>15}"
    for size, seconds in ring.times_s.items():
        mark = "  fitted" if size in FIT_BYTES else f"  {ring.formula_s(size) / seconds - 1:+.0%}"
        yield f"    {size / MIB:>10.3f}{_ms(seconds):>15}{_ms(ring.formula_s(size)):>15}{mark}"


def _backward_lines(backward: BackwardReport, ring: RingReport) -> Iterator[str]:
    hidden_s, plain_s = backward.bounds_s(ring)
    buckets = _mib(backward.buckets)
    yield f"\n  check: backward pass of {backward.processes} processes, a thread each, buckets of {buckets} MiB"
    yield f"    alone {_ms(backward.alone_s)} ms, with all-reduce {_ms(backward.together_s)} ms"
    yield f"    formula: {_ms(hidden_s)} ms hidden as far as can be, {_ms(plain_s)} ms with nothing hidden"


def _mib(sizes: list[int]) -> str:
    return ", ".join(f"{size / MIB:.1f}" for size in sizes)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.{1 if seconds < 10 else 0}f}"
