"""Which snapshot is meant, what it holds, and what changed from one to the next."""

import json
from collections import Counter
from dataclasses import asdict

import boto3
import numpy as np
import pytest
import torch

from corun_ray.core.training.checkpoint_record import TRAINING_FILE
from corun_ray.core.training.labels import Scores
from corun_ray.core.weights import write_tensors
from corun_ray.service.pool import segments, snapshots
from corun_ray.service.pool.index import Head, PoolCounters, Segment
from corun_ray.service.pool.source import find_saved_pool
from corun_ray.service.pool.summary import (
    Change,
    describe_changes,
    describe_summary,
    find_changes,
    format_bars,
    format_change_lines,
    format_step_bars,
    make_printable,
    summarise,
)
from corun_ray.service.storage import StorageError, locate
from tests.service.labels import label, photo_label


def save_pool(pool, step, *parts, counters=None):
    """A snapshot of these lists of labels, the later segment over the earlier."""
    made = []
    for order, labels in enumerate(parts):
        name = f"{order:08d}-{step}"
        segments.write(pool.child("segments"), name, labels)
        made.append(Segment(name, order, len(labels)))
    num_labels = len({one.key for part in parts for one in part})
    snapshots.write(pool, step, num_labels, [made], [counters or PoolCounters()])


def save_checkpoint(run, step, snapshot):
    """As much of a checkpoint as names its snapshot."""
    folder = run / f"checkpoint_{step:08d}"
    folder.mkdir()
    record = {"step": step, "num_images_seen": step, "param_groups": [], "extra": {"pool_snapshot": snapshot}}
    write_tensors(folder / TRAINING_FILE, {"weight": torch.zeros(1000)}, record)
    return folder


@pytest.fixture
def run(tmp_path):
    """A run with snapshots of steps 10, 20 and 30; the last has no checkpoint yet."""
    pool = locate(str(tmp_path / "run" / "pool"))
    for step in (10, 20, 30):
        save_pool(pool, step, [label("x", step=step - 1)])
    for step in (10, 20):
        save_checkpoint(tmp_path / "run", step, snapshots.format_name(step))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("source", "step"),
    [
        ("pool/step_00000010.json", 10),
        ("pool", 30),
        ("pool/", 30),
        ("", 20),
        ("checkpoint_00000010", 10),
        ("checkpoint_00000020/", 20),
    ],
)
def test_every_kind_of_source(run, source, step):
    found = find_saved_pool(f"{run}/{source}")
    assert found.snapshot.step == step and found.uri == f"{run}/pool/{snapshots.format_name(step)}"
    assert {head.step for head, _ in found.read_index().values()} == {step - 1}


def test_sources_in_a_bucket_are_the_same(run, s3_server):
    client = boto3.client("s3")
    client.create_bucket(Bucket="pools")
    for file in run.rglob("*.*"):
        client.upload_file(str(file), "pools", str(file.relative_to(run.parent)))
    uri = "s3://pools/run"
    for source, step in {f"{uri}/pool/step_00000010.json": 10, f"{uri}/pool": 30, uri: 20}.items():
        assert find_saved_pool(source).snapshot.step == step
    found = find_saved_pool(f"{uri}/checkpoint_00000010?region=us-east-1")
    assert found.uri == f"{uri}/pool/step_00000010.json?region=us-east-1"
    size_bytes = find_saved_pool(f"{run}/checkpoint_00000010").measure_storage_bytes()
    assert found.measure_storage_bytes() == size_bytes > 0
    assert found.read_label("x", found.read_index()["x"][1]).step == 9
    client.put_object(Bucket="pools", Key="run/checkpoint_00000010/training.safetensors", Body=b"\xff" * 64)
    with pytest.raises(StorageError, match="^s3://pools/run/checkpoint_00000010/training.safetensors: not a whole"):
        find_saved_pool(f"{uri}/checkpoint_00000010")


def test_without_a_whole_checkpoint_a_run_has_its_newest_snapshot(run):
    (run / "checkpoint_00000020" / TRAINING_FILE).unlink()
    assert find_saved_pool(str(run)).snapshot.step == 10
    (run / "checkpoint_00000010" / TRAINING_FILE).unlink()
    assert find_saved_pool(str(run)).snapshot.step == 30


def test_anything_else_is_one_line(run):
    save_checkpoint(run, 40, None)
    save_checkpoint(run, 50, "../../secret.json")
    save_checkpoint(run, 60, snapshots.format_name(60))
    (run / "notes.txt").write_text("mine")
    (run / "other" / "pool").mkdir(parents=True)
    for source, reason in {
        "nowhere": "no label pool there; expected a snapshot",
        "notes.txt": "no label pool there",
        "pool/segments": "no label pool there",
        "pool/step_00000099.json": "cannot read",
        "checkpoint_00000040": "a checkpoint without a label pool",
        "checkpoint_00000050": "names '../../secret.json' as its pool's snapshot",
        "checkpoint_00000060": "cannot read .*/run/pool/step_00000060.json",
        "checkpoint_00000070": "no such file",
        "other": "other/pool: no snapshot there",
    }.items():
        with pytest.raises(StorageError, match=reason) as error:
            find_saved_pool(f"{run}/{source}")
        assert "\n" not in str(error.value)


@pytest.fixture
def mixed(tmp_path):
    """Three labels in use of four; 16 x 24 px, and one without transmission."""
    pool = locate(str(tmp_path / "pool"))
    old = [photo_label("a.png", step=3), photo_label("b.png", step=3), photo_label("c.png", transmission=False, step=3)]
    counters = PoolCounters(offers=8, wins=4, wins_by_step=Counter({3: 3, 45: 1}))
    save_pool(pool, 50, old, [photo_label("b.png", step=45)], counters=counters)
    save_pool(pool, 10, [])
    return find_saved_pool(pool.uri)


def test_the_numbers_of_a_snapshot(mixed):
    summary = summarise(mixed, mixed.read_index(), {})
    assert (summary.step, summary.labels, summary.labels_noted) == (50, 3, 3)
    assert summary.clarity.mean == 0.25 and summary.clarity.histogram == [0, 0, 3] + 7 * [0]
    assert summary.quality.least == summary.quality.most == 0.75 and summary.quality.histogram[7] == 3
    assert summary.memory_bytes == 2 * (4 * 16 * 24 + 2 * 6 * 4) + 3 * 16 * 24 + 2 * 6 * 4
    files = [file for file in (mixed.pool.child("segments")).list_files() if "-50" in file]
    assert len(files) == 4
    assert summary.storage_bytes == sum(len(mixed.pool.child(f"segments/{file}").read()) for file in files)
    assert [(kind.labels, kind.with_transmission) for kind in summary.images] == [(2, True), (1, False)]
    assert {(kind.height_px, kind.width_px, kind.encoding) for kind in summary.images} == {(16, 24, "uint8")}
    assert summary.ages_steps == type(summary.ages_steps)(5, 47, 47)
    assert (summary.offers, summary.wins, summary.wins_by_step) == (8, 4, {3: 3, 45: 1})
    assert summary.held_by_step == {3: 2, 45: 1}
    assert (summary.segments, summary.segment_rows) == (2, 4)
    assert summary.other_snapshots == ["step_00000010.json"]
    assert json.loads(json.dumps(asdict(summary), allow_nan=False))["held_by_step"] == {"3": 2, "45": 1}


def test_the_text_of_a_snapshot(mixed):
    lines = describe_summary(summarise(mixed, mixed.read_index(), {}))
    text = "\n".join(lines)
    assert "3, as of step 50\n" in text and "mean 0.250, 0.250 to 0.250" in text
    assert "24 x 16 px, uint8, with transmission (2 labels); 24 x 16 px, uint8, without transmission (1 labels)" in text
    assert "min 5, median 47, max 47 steps" in text and "8, of which 4 won (50 %)" in text
    assert "2 with 4 labels, 3 of them in use (75 %)" in text and "others    step_00000010.json" in text
    assert "  scores   clarity                            quality" in lines
    assert f"  0.2-0.3        3  {24 * '#'}        0" in lines
    assert f"  0-4       3  {24 * '#'}     2  {24 * '#'}" in lines
    assert f"  45-49     1  {8 * '#':<24}     1  {12 * '#'}" in lines


def test_an_empty_pool_has_a_text_too(mixed):
    source = find_saved_pool(f"{mixed.pool.uri}/step_00000010.json")
    summary = summarise(source, source.read_index(), {})
    assert summary.clarity.mean is None and summary.ages_steps is None and summary.images == []
    assert "age       no labels" in "\n".join(describe_summary(summary))


def test_another_number_of_labels_than_noted_is_told(tmp_path):
    pool = locate(str(tmp_path))
    snapshots.write(pool, 1, 7, [[]], [PoolCounters()])
    source = find_saved_pool(str(tmp_path))
    text = "\n".join(describe_summary(summarise(source, source.read_index(), {})))
    assert "0, as of step 1 (but its file says 7)" in text


def test_scores_outside_their_range_are_counted_at_its_ends(tmp_path):
    pool = locate(str(tmp_path))
    save_pool(pool, 1, [label("a", -1.0, 2.0), label("b", 0.0, 1.0)])
    source = find_saved_pool(str(tmp_path))
    summary = summarise(source, source.read_index(), {})
    assert summary.clarity.histogram[0] == 2 and summary.quality.histogram[9] == 2


@pytest.mark.parametrize(
    ("last_step", "first", "last"),
    [(0, "0", "0"), (9, "0", "9"), (10, "0-1", "10-11"), (499, "0-49", "450-499"), (4999, "0-499", "4500-4999")],
)
def test_ranges_of_steps_are_round(last_step, first, last):
    _, *rows = format_step_bars("steps", 10, {"wins": {last_step: 1}})
    assert rows[0].split()[0] == first and rows[-1].split()[0] == last and len(rows) <= 10


def test_small_counts_still_have_a_bar():
    lines = format_bars("n", ["a", "b", "c"], {"labels": [10_000, 1, 0]})
    assert [line.count("#") for line in lines] == [0, 24, 1, 0]


def head(key, clarity=0.5, quality=0.5, step=0):
    return Head(key, Scores(clarity, quality), step, 100)


BEFORE = {h.key: h for h in (head("same"), head("gone"), head("better"), head("best", 0.2, 0.2, 1))}
AFTER = {h.key: h for h in (head("same"), head("new", 0.9), head("better", 0.5, 0.6, 7), head("best", 0.7, 0.3, 8))}


def test_what_changed():
    found = find_changes(BEFORE, AFTER)
    assert [c.key for c in found] == ["best", "better", "gone", "new"]
    assert [c.kind for c in found] == ["replaced", "replaced", "removed", "added"]
    np.testing.assert_allclose(found[0].gains, (0.5, 0.1))
    assert found[3].gains == (0, 0)
    assert find_changes(BEFORE, BEFORE) == []
    assert find_changes({"x": head("x", step=1)}, {"x": head("x", step=2)})[0].kind == "replaced"


def test_the_text_of_what_changed(run):
    a, b = find_saved_pool(f"{run}/pool/step_00000010.json"), find_saved_pool(f"{run}/pool")
    text = "\n".join(describe_changes(a, b, find_changes(BEFORE, AFTER), len(AFTER)))
    for line in ("added      1", "removed    1", "replaced   2", "unchanged  1"):
        assert f"\n  {line}\n" in text
    assert "clarity    of replaced labels: +0.2500 mean, +0.5000 best" in text
    *_, first, second = (" ".join(line.split()) for line in text.splitlines())
    assert first == "best 0.2000 -> 0.7000 +0.5000 0.2000 -> 0.3000 +0.1000 1 -> 8"
    assert second.startswith("better 0.5000 -> 0.5000")
    assert describe_changes(a, b, [], 4)[-1] == "  unchanged  4"


def test_every_change_is_a_line_of_tabs():
    found = [*find_changes(BEFORE, AFTER)[2:], Change("a\tb\nc", None, head("a\tb\nc"))]
    columns, *rows = (line.split("\t") for line in format_change_lines(found))
    assert dict(zip(columns, rows[0], strict=True)) == {
        **{"change": "removed", "key": "gone", "clarity_before": "0.5", "clarity_after": ""},
        **{"quality_before": "0.5", "quality_after": "", "step_before": "0", "step_after": ""},
    }
    assert rows[1] == ["added", "new", "", "0.9", "", "0.5", "", "0"]
    assert rows[2][1] == r"a\tb\nc"


def test_keys_cannot_write_on_the_terminal():
    assert make_printable("dunst/ä.png") == "dunst/ä.png"
    assert make_printable("a\x1b[2Jb\udc80") == r"a\x1b[2Jb\udc80"
