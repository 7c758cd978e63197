"""What a saved label pool holds, and what changed between two snapshots: numbers, and the text that shows them."""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from corun_ray.service.pool import snapshots
from corun_ray.service.pool.index import Head
from corun_ray.service.pool.source import ImageKind, Index, SavedPool, snapshots_in

SCORE_BINS = 10
STEP_RANGES, AGE_RANGES = 10, 6
"""Ranges of steps that a table has at most."""
BAR_WIDTH = 24
GAINS_SHOWN = 10
CHANGE_COLUMNS = (
    *("change", "key", "clarity_before", "clarity_after"),
    *("quality_before", "quality_after", "step_before", "step_after"),
)


@dataclass(frozen=True)
class ScoreSpread:
    """One score of all labels; `histogram` has `SCORE_BINS` equal bins over [0, 1]. None where there are no labels."""

    mean: float | None
    least: float | None
    most: float | None
    histogram: list[int]


@dataclass(frozen=True)
class Ages:
    """Steps from the making of a label to the snapshot, of all labels, of which there is at least one."""

    least: int
    median: float
    most: int


@dataclass(frozen=True)
class PoolSummary:
    """What `pool ls` shows; `dataclasses.asdict` of it is plain JSON."""

    snapshot: str
    step: int
    labels: int
    labels_noted: int
    """As the snapshot's file says; another number than `labels` is damage."""
    clarity: ScoreSpread
    quality: ScoreSpread
    memory_bytes: int
    storage_bytes: int
    """Of the files of this snapshot's segments, indices included."""
    ages_steps: Ages | None
    offers: int
    wins: int
    wins_by_step: dict[int, int]
    held_by_step: dict[int, int]
    """Labels of the snapshot by the step that made them."""
    segments: int
    segment_rows: int
    """Labels in the segments, `labels` of them still in use."""
    other_snapshots: list[str]
    images: list[ImageKind]


@dataclass(frozen=True)
class Change:
    """A key whose label is not the same in two snapshots; at least one of `before` and `after` is there."""

    key: str
    before: Head | None
    after: Head | None

    @property
    def kind(self) -> str:
        """`added`, `removed` or `replaced`."""
        if self.before and self.after:
            return "replaced"
        return "added" if self.after else "removed"

    @property
    def gains(self) -> tuple[float, float]:
        """How much clarity and quality have risen; 0 unless the label was replaced."""
        if self.before is None or self.after is None:
            return 0.0, 0.0
        old, new = self.before.scores, self.after.scores
        return new.clarity - old.clarity, new.quality - old.quality


def summarise(source: SavedPool, index: Index) -> PoolSummary:
    """What a snapshot holds; raises `StorageError`."""
    heads = [head for head, _ in index.values()]
    content, counters = source.snapshot, snapshots.sum_counters(source.snapshot)
    ages = [content.step - head.step for head in heads]
    return PoolSummary(
        snapshot=source.uri,
        step=content.step,
        labels=len(heads),
        labels_noted=content.labels,
        clarity=_spread([head.scores.clarity for head in heads]),
        quality=_spread([head.scores.quality for head in heads]),
        memory_bytes=sum(head.size_bytes for head in heads),
        storage_bytes=source.storage_bytes(),
        ages_steps=Ages(min(ages), statistics.median(ages), max(ages)) if ages else None,
        offers=counters.offers,
        wins=counters.wins,
        wins_by_step=dict(sorted(counters.wins_by_step.items())),
        held_by_step=dict(sorted(Counter(head.step for head in heads).items())),
        segments=len(content.segments),
        segment_rows=sum(segment.rows for segment in content.segments),
        other_snapshots=[name for name in snapshots_in(source.pool) if name != source.name],
        images=source.image_kinds(index),
    )


def _spread(scores: Sequence[float]) -> ScoreSpread:
    counts, _ = np.histogram(np.clip(scores, 0, 1), SCORE_BINS, (0, 1))
    if not scores:
        return ScoreSpread(None, None, None, counts.tolist())
    return ScoreSpread(statistics.fmean(scores), min(scores), max(scores), counts.tolist())


def describe(summary: PoolSummary) -> list[str]:
    """The lines of `pool ls`."""
    lines = [summary.snapshot, *(f"  {name:<9} {text}" for name, text in _facts(summary).items())]
    spreads = {"clarity": summary.clarity, "quality": summary.quality}
    bins = [f"{low / SCORE_BINS:.1f}-{(low + 1) / SCORE_BINS:.1f}" for low in range(SCORE_BINS)]
    lines += ["", *bar_table("scores", bins, {name: spread.histogram for name, spread in spreads.items()})]
    by_age = {summary.step - step: count for step, count in summary.held_by_step.items()}
    lines += ["", *step_table("age", AGE_RANGES, {"labels": by_age})]
    return [*lines, "", *step_table("steps", STEP_RANGES, {"wins": summary.wins_by_step, "held": summary.held_by_step})]


def _facts(summary: PoolSummary) -> dict[str, str]:
    noted = "" if summary.labels == summary.labels_noted else f" (but its file says {summary.labels_noted})"
    kinds = [
        f"{kind.width_px} x {kind.height_px} px, {kind.encoding}, "
        f"{'with' if kind.with_transmission else 'without'} transmission"
        + (f" ({kind.labels} labels)" if len(summary.images) > 1 else "")
        for kind in summary.images
    ]
    memory, storage = (f"{size / 2**20:.2f} MiB" for size in (summary.memory_bytes, summary.storage_bytes))
    ages = summary.ages_steps
    in_use = f"{summary.labels} of them in use ({_percent(summary.labels, summary.segment_rows)})"
    facts = {"labels": f"{summary.labels}, as of step {summary.step}{noted}"}
    for name, spread in (("clarity", summary.clarity), ("quality", summary.quality)):
        if spread.mean is not None:
            facts[name] = f"mean {spread.mean:.3f}, {spread.least:.3f} to {spread.most:.3f}"
    return facts | {
        "images": "; ".join(kinds) or "none",
        "size": f"{memory} in memory, {storage} on storage",
        "age": f"min {ages.least}, median {ages.median:g}, max {ages.most} steps" if ages else "no labels",
        "offers": f"{summary.offers}, of which {summary.wins} won ({_percent(summary.wins, summary.offers)})",
        "segments": f"{summary.segments} with {summary.segment_rows} labels, {in_use}",
        "others": ", ".join(summary.other_snapshots) or "no other snapshot in this pool",
    }


def step_table(title: str, num_ranges: int, columns: Mapping[str, Mapping[int, int]]) -> list[str]:
    """A `bar_table` of counts by step, over at most `num_ranges` round ranges from 0 on."""
    end = 1 + max((step for counts in columns.values() for step in counts), default=0)
    least = -(-end // num_ranges)
    power = 10 ** (len(str(least)) - 1)
    width = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
    starts = range(0, end, width)
    totals = {name: [0] * len(starts) for name in columns}
    for name, counts in columns.items():
        for step, count in counts.items():
            totals[name][max(step, 0) // width] += count
    ranges = [str(start) if width == 1 else f"{start}-{start + width - 1}" for start in starts]
    return bar_table(title, ranges, totals)


def bar_table(title: str, rows: Sequence[str], columns: Mapping[str, Sequence[int]]) -> list[str]:
    """Counts with a bar each, one line a row, aligned; the longest bar of a column is `BAR_WIDTH`."""
    width = max(map(len, [title, *rows]))
    lines = [f"  {title:<{width}}" + "".join(f"{name:>9} {'':<{BAR_WIDTH}}" for name in columns)]
    for number, row in enumerate(rows):
        cells = [f"{counts[number]:>9} {_bar(counts[number], max(counts)):<{BAR_WIDTH}}" for counts in columns.values()]
        lines.append(f"  {row:<{width}}" + "".join(cells))
    return [line.rstrip() for line in lines]


def _bar(count: int, most: int) -> str:
    return "#" * -(-count * BAR_WIDTH // most) if count else ""


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "none"


def changes(before: Mapping[str, Head], after: Mapping[str, Head]) -> list[Change]:
    """What became of the labels, by key: those whose scores or step differ, or that only one of both has."""

    def content(head: Head | None) -> Any:
        return head and (head.scores, head.step)

    pairs = ((key, before.get(key), after.get(key)) for key in sorted({*before, *after}))
    return [Change(*pair) for pair in pairs if content(pair[1]) != content(pair[2])]


def diff_summary(a: SavedPool, b: SavedPool, found: Sequence[Change], num_after: int) -> list[str]:
    """The lines of `pool diff`; `num_after` labels are in `b`."""
    kinds = Counter(change.kind for change in found)
    replaced = [change for change in found if change.kind == "replaced"]
    lines = [f"{name} {source.uri}  (step {source.snapshot.step})" for name, source in (("A", a), ("B", b))]
    lines += [f"  {kind:<9} {kinds[kind]}" for kind in ("added", "removed", "replaced")]
    lines.append(f"  unchanged {num_after - kinds['added'] - kinds['replaced']}")
    if not replaced:
        return lines
    for name, gains in zip(("clarity", "quality"), zip(*(c.gains for c in replaced), strict=True), strict=True):
        lines.append(f"  {name:<9} of replaced labels: {statistics.fmean(gains):+.4f} mean, {max(gains):+.4f} best")
    best = sorted(replaced, key=lambda change: (-sum(change.gains), change.key))[:GAINS_SHOWN]
    width = max(len(printable(change.key)) for change in best)
    lines += ["", f"  {'largest gains':<{max(width, 13)}}  {'clarity':<24}  {'quality':<24}  step"]
    return lines + [_gain(change, max(width, 13)) for change in best]


def _gain(change: Change, width: int) -> str:
    assert change.before is not None and change.after is not None
    cells = [
        f"{old:.4f} -> {new:.4f} {gain:+.4f}"
        for old, new, gain in zip(change.before.scores, change.after.scores, change.gains, strict=True)
    ]
    steps = f"{change.before.step} -> {change.after.step}"
    return "  ".join([f"  {printable(change.key):<{width}}", *(f"{cell:<24}" for cell in cells), steps])


def change_lines(found: Iterable[Change]) -> list[str]:
    """The lines of `pool diff --all`: `CHANGE_COLUMNS` tab-separated, empty where a snapshot lacks the key."""
    lines = ["\t".join(CHANGE_COLUMNS)]
    for change in found:
        before, after = ([*head.scores, head.step] if head else [""] * 3 for head in (change.before, change.after))
        values = (str(value) for pair in zip(before, after, strict=True) for value in pair)
        lines.append("\t".join([change.kind, printable(change.key), *values]))
    return lines


def printable(key: str) -> str:
    """A key on one line of a terminal: whatever would move the cursor is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in key)
