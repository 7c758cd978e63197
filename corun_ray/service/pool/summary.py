"""Summarise a saved label pool, and compare two snapshots: as numbers, and as text for the terminal."""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from corun_ray.core.training.labels import Scores
from corun_ray.service.pool import snapshots
from corun_ray.service.pool.index import Head, is_rejected
from corun_ray.service.pool.snapshots import Index
from corun_ray.service.pool.source import ImageKind, SavedPool, list_snapshots
from corun_ray.service.telemetry.tables import format_table

SCORE_BINS = 10
MAX_STEP_RANGES = 10
"""The most rows of the table of labels by step."""
MAX_AGE_RANGES = 6
"""The most rows of the table of labels by age."""
BAR_CHARACTERS = 24
"""Length of the longest bar of a column."""
GAINS_SHOWN = 10
MIB = 2**20
CHANGE_COLUMNS = (
    "change",
    "key",
    "clarity_before",
    "clarity_after",
    "quality_before",
    "quality_after",
    "step_before",
    "step_after",
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
    """Steps from the making of each label to the snapshot, for at least one label."""

    least: int
    median: float
    most: int


@dataclass(frozen=True)
class PoolSummary:
    """The numbers of `pool ls`; `dataclasses.asdict` of them is plain JSON."""

    snapshot: str
    step: int
    labels: int
    labels_noted: int
    """Number of labels by the snapshot's file; another number than `labels` is damage."""
    clarity: ScoreSpread
    quality: ScoreSpread
    memory_bytes: int
    storage_bytes: int
    """Size of this snapshot's segment files, indexes included."""
    ages_steps: Ages | None
    offers: int
    wins: int
    wins_by_step: dict[int, int]
    held_by_step: dict[int, int]
    """Labels of the snapshot, by the step that made them."""
    segments: int
    segment_rows: int
    """Labels in the segments; `labels` of them are still in use."""
    other_snapshots: list[str]
    images: list[ImageKind]
    rejected: int
    """Images whose label was rejected in review and has left the pool."""
    rejected_waiting: int
    """Those of them that have no better label yet."""
    rejected_in_review: int
    """Labels of the snapshot that were rejected in review and leave the pool when it is restored."""


@dataclass(frozen=True)
class Change:
    """A key whose label differs between two snapshots; `before` or `after` is None where there is no label."""

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
        """The rise of clarity and quality; 0 unless the label was replaced."""
        if self.before is None or self.after is None:
            return 0.0, 0.0
        old, new = self.before.scores, self.after.scores
        return new.clarity - old.clarity, new.quality - old.quality


# --- One snapshot ---


def summarise(source: SavedPool, index: Index, rejections: Mapping[str, Scores]) -> PoolSummary:
    """Summarise a snapshot.

    `rejections` are those of the pool's review.

    Raises `StorageError`.
    """
    heads = [head for head, _ in index.values()]
    content = source.snapshot
    counters = snapshots.sum_counters(content)

    ages = None
    if heads:
        steps = [content.step - head.step for head in heads]
        ages = Ages(min(steps), statistics.median(steps), max(steps))

    other_snapshots = []
    for name in list_snapshots(source.pool):
        if name != source.name:
            other_snapshots.append(name)

    return PoolSummary(
        snapshot=source.uri,
        step=content.step,
        labels=len(heads),
        labels_noted=content.labels,
        clarity=_measure_spread([head.scores.clarity for head in heads]),
        quality=_measure_spread([head.scores.quality for head in heads]),
        memory_bytes=sum(head.size_bytes for head in heads),
        storage_bytes=source.measure_storage_bytes(),
        ages_steps=ages,
        offers=counters.offers,
        wins=counters.wins,
        wins_by_step=dict(sorted(counters.wins_by_step.items())),
        held_by_step=dict(sorted(Counter(head.step for head in heads).items())),
        segments=len(content.segments),
        segment_rows=sum(segment.rows for segment in content.segments),
        other_snapshots=other_snapshots,
        images=source.list_image_kinds(index),
        rejected=len(content.rejected),
        rejected_waiting=sum(record.key not in index for record in content.rejected),
        rejected_in_review=sum(is_rejected(head, rejections) for head in heads),
    )


def _measure_spread(scores: Sequence[float]) -> ScoreSpread:
    """Measure one score of all labels.

    Scores outside [0, 1] count in the first or last bin.
    """
    counts, _ = np.histogram(np.clip(scores, 0, 1), SCORE_BINS, (0, 1))
    if not scores:
        return ScoreSpread(None, None, None, counts.tolist())
    return ScoreSpread(statistics.fmean(scores), min(scores), max(scores), counts.tolist())


def describe_summary(summary: PoolSummary) -> list[str]:
    """Return the lines of `pool ls`."""
    # The facts, one a line.
    lines = [summary.snapshot]
    lines += format_table(list(_list_facts(summary).items()), indent="  ").splitlines()

    # How many labels have which score.
    bins = [f"{low / SCORE_BINS:.1f}-{(low + 1) / SCORE_BINS:.1f}" for low in range(SCORE_BINS)]
    histograms = {"clarity": summary.clarity.histogram, "quality": summary.quality.histogram}
    lines += ["", *format_bars("scores", bins, histograms)]

    # How old the labels are, in steps.
    by_age = {summary.step - step: count for step, count in summary.held_by_step.items()}
    lines += ["", *format_step_bars("age", MAX_AGE_RANGES, {"labels": by_age})]

    # In which steps labels won, and in which those were made that the pool still holds.
    by_step = {"wins": summary.wins_by_step, "held": summary.held_by_step}
    return [*lines, "", *format_step_bars("steps", MAX_STEP_RANGES, by_step)]


def _list_facts(summary: PoolSummary) -> dict[str, str]:
    """Return the facts of `pool ls`, by name."""
    facts = {"labels": f"{summary.labels}, as of step {summary.step}"}
    if summary.labels != summary.labels_noted:
        facts["labels"] += f" (but its file says {summary.labels_noted})"

    # Without a review there is nothing to say about rejected labels.
    rejected = []
    if summary.rejected_in_review:
        rejected.append(f"{summary.rejected_in_review} leave at the next resume")
    if summary.rejected:
        rejected.append(f"{summary.rejected} have left, {summary.rejected_waiting} images have no better label yet")
    if rejected:
        facts["rejected"] = "; ".join(rejected)

    # An empty pool has no scores.
    for name, spread in (("clarity", summary.clarity), ("quality", summary.quality)):
        if spread.mean is not None:
            facts[name] = f"mean {spread.mean:.3f}, {spread.least:.3f} to {spread.most:.3f}"

    facts["images"] = "; ".join(_list_image_texts(summary.images)) or "none"
    memory_mib, storage_mib = summary.memory_bytes / MIB, summary.storage_bytes / MIB
    facts["size"] = f"{memory_mib:.2f} MiB in memory, {storage_mib:.2f} MiB on storage"

    ages = summary.ages_steps
    facts["age"] = "no labels"
    if ages is not None:
        facts["age"] = f"min {ages.least}, median {ages.median:g}, max {ages.most} steps"

    won = _format_percent(summary.wins, summary.offers)
    facts["offers"] = f"{summary.offers}, of which {summary.wins} won ({won})"
    in_use = _format_percent(summary.labels, summary.segment_rows)
    rows = f"{summary.segment_rows} labels, {summary.labels} of them in use ({in_use})"
    facts["segments"] = f"{summary.segments} with {rows}"
    facts["others"] = ", ".join(summary.other_snapshots) or "no other snapshot in this pool"
    return facts


def _list_image_texts(kinds: Sequence[ImageKind]) -> list[str]:
    """Describe each kind of images.

    The number of labels is given where there are several kinds.
    """
    texts = []
    for kind in kinds:
        transmission = "with transmission" if kind.with_transmission else "without transmission"
        text = f"{kind.width_px} x {kind.height_px} px, {kind.encoding}, {transmission}"
        if len(kinds) > 1:
            text += f" ({kind.labels} labels)"
        texts.append(text)
    return texts


# --- Bars ---


def format_step_bars(title: str, max_ranges: int, columns: Mapping[str, Mapping[int, int]]) -> list[str]:
    """Format counts by step as bars.

    There are at most `max_ranges` ranges of steps, round and from 0 on.
    """
    # The end of the ranges, past the last step.
    end = 1
    for counts in columns.values():
        for step in counts:
            end = max(end, step + 1)

    # The least width of 1, 2 or 5 times a power of ten that needs no more ranges.
    least_width = -(-end // max_ranges)
    power = 10 ** (len(str(least_width)) - 1)
    width = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least_width)
    starts = range(0, end, width)

    # Add up the counts of each range. Labels from after the snapshot's step have a negative age: they count as 0.
    totals = {}
    for name, counts in columns.items():
        totals[name] = [0] * len(starts)
        for step, count in counts.items():
            totals[name][max(step, 0) // width] += count

    ranges = []
    for start in starts:
        ranges.append(str(start) if width == 1 else f"{start}-{start + width - 1}")
    return format_bars(title, ranges, totals)


def format_bars(title: str, rows: Sequence[str], columns: Mapping[str, Sequence[int]]) -> list[str]:
    """Format counts with a bar each, one line a row.

    The longest bar of a column has `BAR_CHARACTERS`.
    """
    # Two cells a column: the count, flush right below the column's name, and its bar.
    header = [title]
    for name in columns:
        header += [name, ""]
    counts_at = range(1, len(header), 2)

    table = []
    for number, row in enumerate(rows):
        cells = [row]
        for counts in columns.values():
            cells += [str(counts[number]), _draw_bar(counts[number], max(counts))]
        table.append(cells)
    return format_table(table, header, right=counts_at, indent="  ").splitlines()


def _draw_bar(count: int, most: int) -> str:
    """Draw a bar in proportion to the column's largest count.

    Any count above 0 has at least one character.
    """
    return "#" * -(-count * BAR_CHARACTERS // most) if count else ""


def _format_percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "none"


# --- Two snapshots ---


def find_changes(before: Mapping[str, Head], after: Mapping[str, Head]) -> list[Change]:
    """Find the labels that differ between two snapshots.

    Scores or step differ, or one snapshot alone has the label. Sorted by key.
    """
    changes = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if old is None or new is None or (old.scores, old.step) != (new.scores, new.step):
            changes.append(Change(key, old, new))
    return changes


def describe_changes(a: SavedPool, b: SavedPool, changes: Sequence[Change], num_after: int) -> list[str]:
    """Return the lines of `pool diff`; `num_after` labels are in `b`."""
    lines = []
    for name, source in (("A", a), ("B", b)):
        lines.append(f"{name} {source.uri}  (step {source.snapshot.step})")

    # How many labels changed, and how.
    kinds = Counter(change.kind for change in changes)
    facts = [
        ("added", str(kinds["added"])),
        ("removed", str(kinds["removed"])),
        ("replaced", str(kinds["replaced"])),
        ("unchanged", str(num_after - kinds["added"] - kinds["replaced"])),
    ]

    # How much the replaced labels gained in each score.
    replaced = [change for change in changes if change.kind == "replaced"]
    if replaced:
        for number, name in enumerate(("clarity", "quality")):
            gains = [change.gains[number] for change in replaced]
            text = f"of replaced labels: {statistics.fmean(gains):+.4f} mean, {max(gains):+.4f} best"
            facts.append((name, text))
    lines += format_table(facts, indent="  ").splitlines()
    if not replaced:
        return lines

    # The largest gains.
    best = sorted(replaced, key=lambda change: (-sum(change.gains), change.key))[:GAINS_SHOWN]
    rows = [_list_gain_cells(change) for change in best]
    header = ("largest gains", "clarity", "quality", "step")
    return [*lines, "", *format_table(rows, header, indent="  ").splitlines()]


def _list_gain_cells(change: Change) -> list[str]:
    """Return the cells of a replaced label.

    They are its key, both scores, and its steps.
    """
    assert change.before is not None and change.after is not None
    cells = [make_printable(change.key)]
    for old, new, gain in zip(change.before.scores, change.after.scores, change.gains, strict=True):
        cells.append(f"{old:.4f} -> {new:.4f} {gain:+.4f}")
    cells.append(f"{change.before.step} -> {change.after.step}")
    return cells


def format_change_lines(changes: Iterable[Change]) -> list[str]:
    """Return the lines of `pool diff --all`.

    `CHANGE_COLUMNS` are tab-separated, and empty where a snapshot lacks the key.
    """
    lines = ["\t".join(CHANGE_COLUMNS)]
    for change in changes:
        cells = [change.kind, make_printable(change.key)]
        for before, after in zip(_list_values(change.before), _list_values(change.after), strict=True):
            cells += [before, after]
        lines.append("\t".join(cells))
    return lines


def _list_values(head: Head | None) -> list[str]:
    """Return clarity, quality and step of a label.

    As text, empty where there is no label.
    """
    if head is None:
        return ["", "", ""]
    return [str(head.scores.clarity), str(head.scores.quality), str(head.step)]


def make_printable(key: str) -> str:
    """Return a key as one line for a terminal.

    Characters that would move the cursor are escaped.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in key)
