"""Format the reports of the benchmarks that need torch and numpy alone.

The columns are aligned here, because these benchmarks import `core` only, and the tables are no plain grids: rows of
different kinds share one alignment.
"""

from collections.abc import Iterator

from corun_ray.bench.dehaze import DehazeReport
from corun_ray.bench.machine import Machine, Work
from corun_ray.bench.scaling import FIT_BYTES, BackwardReport, RingReport, ScalingReport
from corun_ray.bench.scaling_model import BYTES_PER_GBIT, MIB, ManyWorkersStep, count_stream_cores
from corun_ray.bench.step import StepReport

NAME_WIDTH = 24
"""Characters of a row's name."""
FIGURE_WIDTH = 10
"""Characters of a figure of a step or photograph."""
GPUS_WIDTH = 11
"""Characters of a column for one number of GPUs."""
RING_WIDTHS = (10, 15, 15)
"""Characters of the columns of the all-reduce check."""


def format_step(report: StepReport) -> str:
    """Format a step's parts, floor and memory."""
    settings = report.settings
    lines = [
        f"\n{settings.method} step: {settings.stages} stages, {settings.size_px} px, batch {settings.batch}, "
        f"{settings.precision}, {_name_mode(settings.compile)}; {settings.win_rate:.0%} of candidates win",
        f"  {'whole step, median':<{NAME_WIDTH}}{report.step_s * 1000:>{FIGURE_WIDTH}.1f} ms",
    ]

    # The parts, indented below the whole step, with their shares of the sum.
    total_s = sum(report.parts_s.values())
    for name, part_s in report.parts_s.items():
        figure = f"{part_s * 1000:>{FIGURE_WIDTH}.1f} ms  {part_s / total_s:>4.0%}"
        lines.append(f"    {name:<{NAME_WIDTH - 2}}{figure}")

    lines += _format_floor(report.work, report.machine, report.step_s, report.peak_bytes)
    return "\n".join(lines)


def format_dehaze(report: DehazeReport) -> str:
    """Format a restoration's speed, floor and memory."""
    settings = report.settings
    memory = f"in {settings.memory_mib} MiB" if settings.memory_mib else "as a whole"
    speed = settings.megapixels / report.image_s
    lines = [
        f"\ndehaze {settings.width_px} x {settings.height_px} px, {memory}: {settings.stages} stages, "
        f"{settings.precision}, {_name_mode(settings.compile)}",
        f"  {'an image, median':<{NAME_WIDTH}}{report.image_s * 1000:>{FIGURE_WIDTH}.1f} ms",
        f"  {'speed':<{NAME_WIDTH}}{speed:>{FIGURE_WIDTH}.3f} megapixels/s",
    ]

    lines += _format_floor(report.work, report.machine, report.image_s, report.peak_bytes)
    return "\n".join(lines)


def _name_mode(is_compiled: bool) -> str:
    """Name the way the network runs."""
    return "compiled" if is_compiled else "eager"


def _format_floor(work: Work, machine: Machine, measured_s: float, peak_bytes: int) -> list[str]:
    """Format the floor of the time and the memory.

    The floor is the least time that the work can take; it is given relative to the measured time too.
    """
    arithmetic_s, traffic_s = work.compute_floor_s(machine)
    floors = {
        "floor, arithmetic": (
            arithmetic_s,
            f"{work.flops / 1e9:.1f} GFLOP at {machine.flops_per_s / 1e12:.2f} TFLOP/s",
        ),
        "floor, memory traffic": (
            traffic_s,
            f"{work.bytes / 1e9:.2f} GB at {machine.bytes_per_s / 1e9:.0f} GB/s",
        ),
    }

    # Each floor with its share of the measured time and its source.
    lines = []
    for name, (floor_s, source) in floors.items():
        figure = f"{floor_s * 1000:>{FIGURE_WIDTH}.1f} ms  {floor_s / measured_s:>4.0%}"
        lines.append(f"  {name:<{NAME_WIDTH}}{figure}  ({source})")
    lines.append(f"  {'most memory':<{NAME_WIDTH}}{peak_bytes / MIB:>{FIGURE_WIDTH}.0f} MiB")
    return lines


def format_scaling(report: ScalingReport) -> str:
    """Format the forecast and the results of the check."""
    settings = report.settings
    alone = report.alone

    # The network and the step of one GPU. A parameter has four bytes.
    total_bytes = sum(report.buckets)
    lines = [
        f"\n{settings.method} on many GPUs: {settings.stages} stages, width {settings.width}, "
        f"{total_bytes / 4e6:.2f} M parameters, {total_bytes / MIB:.1f} MiB of gradients in buckets of "
        f"{_format_mib(report.buckets)} MiB",
        f"  alone: {_format_ms(alone.step_s)} ms, images: {alone.images}; "
        f"backward pass {_format_ms(alone.backward_s)} ms",
    ]
    pool = settings.build_pool()
    if pool is not None:
        lines.append(
            f"  labels of {pool.label_bytes / 1e3:.0f} kB are needed after {_format_ms(alone.before_labels_s)} ms, "
            f"shards: {pool.shards}; {pool.win_rate:.0%} of candidates win, "
            f"rating one takes {_format_ms(alone.rating_s)} ms"
        )

    # The forecast: a table for each link between nodes.
    for link_gbit, steps in zip(settings.link_gbit, report.by_link, strict=True):
        lines.append(
            f"\n  nodes of {settings.gpus_per_node} GPUs, {settings.node_gbit:g} Gbit/s in them, {link_gbit:g} between"
        )
        lines += _format_many_workers(steps, report)
        lines += _format_remedies(steps)

    # The check, where there was one.
    for ring in report.rings:
        lines += _format_ring(ring)
    if report.backward is not None:
        lines += _format_backward(report.backward, report.rings[0])
    return "\n".join(lines)


def _format_many_workers(steps: list[ManyWorkersStep], report: ScalingReport) -> Iterator[str]:
    """Yield the rows of a forecast.

    Each number of GPUs has a column.
    """
    # All columns have the same rows.
    columns = [_list_cells(step, report) for step in steps]
    for name in columns[0]:
        cells = [f"{column[name]:>{GPUS_WIDTH}}" for column in columns]
        yield f"    {name:<{NAME_WIDTH}}{''.join(cells)}"


def _list_cells(step: ManyWorkersStep, report: ScalingReport) -> dict[str, str]:
    """Return a column as row name → cell."""
    cores = count_stream_cores(step.workers, report.alone.images, step.step_s, report.settings.samples_per_s)
    return {
        "GPUs": str(step.workers),
        "all-reduce, ms": _format_ms(step.all_reduce_s),
        "  after the backward pass": _format_ms(step.exposed_s),
        "pool's last answer, ms": _format_ms(step.pool_answers_s),
        "  after the teacher": _format_ms(step.pool_wait_s),
        "wait for ratings, ms": _format_ms(step.rating_wait_s),
        "step, ms": _format_ms(step.step_s),
        "efficiency": f"{step.efficiency:.1%}",
        "costs most": step.costs[0] if step.costs else "nothing",
        "labels moved, Gbit/s": f"{step.label_bytes_per_s / BYTES_PER_GBIT:.2f}",
        "cores for the stream": str(cores),
    }


def _format_remedies(steps: list[ManyWorkersStep]) -> Iterator[str]:
    """Yield remedies, each with its numbers of GPUs."""
    # Several numbers of GPUs may need the same remedy.
    gpus_by_remedy: dict[str, list[str]] = {}
    for step in steps:
        for cost in step.costs:
            gpus_by_remedy.setdefault(_choose_remedy(cost, step), []).append(str(step.workers))

    for remedy, gpus in gpus_by_remedy.items():
        yield f"    {remedy} ({', '.join(gpus)} GPUs)"


def _choose_remedy(cost: str, step: ManyWorkersStep) -> str:
    """Return the key that lowers a cost, with reason."""
    match cost:
        case "gradients":
            return "gradients: train.accumulate or train.batch_per_worker, to average them once for more images"
        case "rating":
            return "rating: coherence.share_blocks, for workers to rate together; or more images a step, which even out"
        case "pool" if step.shards_needed:
            return f"pool: pool.shards: {step.shards_needed}, to answer in the teacher's time"
        case _:
            return "pool: pool.encoding: uint8 or a faster link, as no pool.shards answers in the teacher's time"


def _format_ring(ring: RingReport) -> Iterator[str]:
    """Yield a heading and the measured and predicted all-reduces by size."""
    yield (
        f"\n  check: gloo between {ring.processes} processes of this machine, a link of "
        f"{ring.link.latency_s * 1e6:.0f} us and {ring.link.bytes_per_s / 1e9:.2f} GB/s fitted to {len(FIT_BYTES)} of "
        "the sizes"
    )

    # The header.
    size_width, measured_width, formula_width = RING_WIDTHS
    yield f"    {'MiB':>{size_width}}{'measured, ms':>{measured_width}}{'formula, ms':>{formula_width}}"

    # Sizes that the link was not fitted to show the error of the formula.
    for num_bytes, measured_s in ring.times_s.items():
        predicted_s = ring.predict_s(num_bytes)
        remark = "fitted" if num_bytes in FIT_BYTES else f"{predicted_s / measured_s - 1:+.0%}"
        measured, predicted = _format_ms(measured_s), _format_ms(predicted_s)
        cells = f"{num_bytes / MIB:>{size_width}.3f}{measured:>{measured_width}}{predicted:>{formula_width}}"
        yield f"    {cells}  {remark}"


def _format_backward(backward: BackwardReport, ring: RingReport) -> Iterator[str]:
    """Yield the measured backward passes and the bounds of the formula."""
    hidden_s, plain_s = backward.predict_bounds_s(ring)
    buckets = _format_mib(backward.buckets)
    yield f"\n  check: backward pass of {backward.processes} processes, a thread each, buckets of {buckets} MiB"
    yield f"    alone {_format_ms(backward.alone_s)} ms, with all-reduce {_format_ms(backward.together_s)} ms"
    yield f"    formula: {_format_ms(hidden_s)} ms with the most hidden, {_format_ms(plain_s)} ms with nothing hidden"


def _format_mib(sizes: list[int]) -> str:
    """Return sizes in bytes as MiB, parted by commas."""
    return ", ".join(f"{size / MIB:.1f}" for size in sizes)


def _format_ms(duration_s: float) -> str:
    """Return seconds as milliseconds, from 10 s on without decimals."""
    decimals = 1 if duration_s < 10 else 0
    return f"{duration_s * 1000:,.{decimals}f}"
