"""What `--resume` finds, and what it refuses to resume."""

import json
import time
from datetime import UTC, datetime

import pytest

from corun_ray.config.loading import dump_job
from corun_ray.core.data.samples import SAMPLES_VERSION
from corun_ray.service.runs.record import (
    JOB_FILE,
    DataDigest,
    ResumeError,
    RunRecord,
    create_run_folder,
    describe_moved_data,
    find_last_run,
    list_step_size_changes,
    parse_begin,
    read_record,
    refuse_changes,
    write_record,
)
from corun_ray.service.storage import StorageError, locate
from tests.service.jobs import small_job

RECORD = RunRecord(state="running", mlflow_run="abc", data="digest", samples=SAMPLES_VERSION)
DATA = DataDigest("digest")


def begun(job, name):
    run = locate(job.storage).child(name)
    run.child(JOB_FILE).write(dump_job(job).encode())
    write_record(run, RECORD)
    return run


@pytest.fixture
def job(dataset, tmp_path):
    return small_job("colabator", dataset, tmp_path)


def test_the_last_run_of_this_name_that_has_a_record(job, tmp_path):
    assert find_last_run(job) is None
    for name in ("test-colabator-20260101-000000", "test-colabator-20260102-000000", "test-20270101-000000"):
        begun(job, name)
    begun(job, "test-colabator-more-20270101-000000")
    locate(job.storage).child("test-colabator-20260103-000000/job.yaml").write(b"")
    assert find_last_run(job).name == "test-colabator-20260102-000000"
    assert read_record(find_last_run(job)) == RECORD


def test_two_that_begin_in_one_second_have_a_folder_each(tmp_path, bucket):
    moment = datetime(2026, 1, 1, 12, tzinfo=UTC)
    names = [create_run_folder(locate(str(tmp_path)), "a", moment).name for _ in range(3)]
    assert names == ["a-20260101-120000Z", "a-20260101-120000Z-2", "a-20260101-120000Z-3"]

    names = [create_run_folder(locate(f"{bucket}/runs"), "a", moment).name for _ in range(3)]
    assert len(set(names)) == 3 and all(parse_begin("a", name) == moment for name in names)


def test_the_run_that_began_last_is_the_last_in_every_time_zone(job, monkeypatch):
    try:
        # An interrupted run of New York is younger than one of Tokyo, whose clocks are ahead.
        for zone, hour in (("Asia/Tokyo", 8), ("America/New_York", 9)):
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            moment = datetime(2026, 1, 1, hour, tzinfo=UTC)
            run = create_run_folder(locate(job.storage), job.name, moment)
            begun(job, run.name)
            assert find_last_run(job).name == run.name

        # Names of earlier versions are in local time: 4 o'clock in New York is 9 o'clock in UTC.
        begun(job, "test-colabator-20260101-043000")
        assert find_last_run(job).name == "test-colabator-20260101-043000"
        begun(job, "test-colabator-20260101-093100Z-2")
        assert find_last_run(job).name == "test-colabator-20260101-093100Z-2"
    finally:
        monkeypatch.undo()
        time.tzset()


def variant(dataset, folder, **sections):
    folder.mkdir(exist_ok=True)
    return small_job("colabator", dataset, folder, **sections)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"cluster": {"workers": 2}, "train": {"batch_per_worker": 2}},
        {"train": {"batch_per_worker": 4, "steps": 99, "checkpoint_every": 7}, "pool": {"shards": 3, "memory_mib": 5}},
        {"tracking": {"uri": "http://other"}, "train": {"batch_per_worker": 4}},
        {"cluster": {"workers": 2}, "train": {"batch_per_worker": 1, "accumulate": 2}},
        {
            "cluster": {"workers": 1, "gpus_per_worker": 1},
            "train": {"batch_per_worker": 4},
            "coherence": {"gpu": ["stream"]},
        },
    ],
)
def test_where_and_on_what_it_runs_may_change(dataset, tmp_path, sections):
    job = variant(dataset, tmp_path / "a", train={"batch_per_worker": 4})
    run = begun(job, "test-colabator-20260101-000000")
    sections = sections or {"train": {"batch_per_worker": 4}}
    refuse_changes(variant(dataset, tmp_path / "b", **sections), run, RECORD, DATA)


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"network": {"width": 8}}, "network.width: 8 now, 4 in the run to resume"),
        ({"optim": {"ema": 0.9}}, "optim.ema: 0.9 now, 0.5 in the run to resume"),
        ({"pool": {"encoding": "float16"}}, "pool.encoding: float16 now, uint8 in the run to resume"),
        ({"cluster": {"workers": 2}}, "train.batch_per_worker: 1 on 2 workers now, 1 on 1 in the run to resume"),
        ({"train": {"batch_per_worker": 2}, "cluster": {"workers": (1, 2)}}, "train.batch_per_worker: 2 on 1 to 2"),
        (
            {"coherence": {"clarity": "daclip", "weights": "w", "precision": "bf16"}},
            "coherence.precision: bf16 now, auto in the run to resume",
        ),
        ({"train": {"accumulate": 3}}, "train.batch_per_worker: 1 x train.accumulate 3 on 1 workers now, 1 on 1"),
    ],
)
def test_what_it_learns_from_may_not(dataset, tmp_path, sections, line):
    run = begun(variant(dataset, tmp_path / "a"), "test-colabator-20260101-000000")
    with pytest.raises(ResumeError) as error:
        refuse_changes(variant(dataset, tmp_path / "b", **sections), run, RECORD, DATA)
    assert any(text.startswith(line) for text in str(error.value).splitlines()), str(error.value)


def test_the_size_of_the_steps_may_change_and_is_named(dataset, tmp_path):
    run = begun(variant(dataset, tmp_path / "a"), "test-colabator-20260101-000000")
    assert list_step_size_changes(run, variant(dataset, tmp_path / "b")) == []

    # What a training that has diverged needs.
    smaller = variant(dataset, tmp_path / "b", optim={"lr": 1e-4, "min_lr": 1e-5, "clip_norm": 0.3})
    refuse_changes(smaller, run, RECORD, DATA)
    changes = list_step_size_changes(run, smaller)
    assert changes[0] == "optim.clip_norm 0.0 -> 0.3" and changes[1] == "optim.lr 0.001 -> 0.0001"
    assert all(change.startswith("optim.") for change in changes)

    # A finished run has learned already.
    with pytest.raises(ResumeError, match="optim.lr: 0.0001 now, 0.001 in the run to resume"):
        refuse_changes(smaller, run, RECORD.model_copy(update={"state": "finished"}), DATA)


def test_a_run_of_any_precision_resumes_as_auto(dataset, tmp_path):
    """Runs of earlier versions say fp32, which was the default."""
    run = begun(variant(dataset, tmp_path / "a", optim={"precision": "fp32"}), "test-colabator-20260101-000000")
    auto = variant(dataset, tmp_path / "b", optim={"precision": "auto"})
    finished = RECORD.model_copy(update={"state": "finished"})
    for record in (RECORD, finished):
        refuse_changes(auto, run, record, DATA)
    assert list_step_size_changes(run, auto) == ["optim.precision fp32 -> auto"]
    with pytest.raises(ResumeError, match="optim.precision: bf16 now, fp32 in the run to resume"):
        refuse_changes(variant(dataset, tmp_path / "b", optim={"precision": "bf16"}), run, finished, DATA)


def test_a_run_keeps_the_place_of_the_pixel_work(dataset, tmp_path):
    run = begun(variant(dataset, tmp_path / "a"), "test-colabator-20260101-000000")
    with pytest.raises(ResumeError, match="data.synthesis: worker now, stream in the run to resume"):
        refuse_changes(variant(dataset, tmp_path / "b", data={"synthesis": "worker"}), run, RECORD, DATA)


def test_other_data_is_refused(job):
    run = begun(job, "test-colabator-20260101-000000")
    with pytest.raises(ResumeError, match="data: not the files that the run began with"):
        refuse_changes(job, run, RECORD, DataDigest("other digest"))


def test_data_may_move_but_not_change(dataset, tmp_path):
    job = variant(dataset, tmp_path / "a")
    run = begun(job, "test-colabator-20260101-000000")
    record = RECORD.model_copy(update={"files": "names and sizes"})
    moved = variant(tmp_path / "elsewhere", tmp_path / "b")

    refuse_changes(moved, run, record, DataDigest("digest", "names and sizes"))
    said = describe_moved_data(moved, run, record)
    assert "names and sizes are the same" in said and f"data.hazy was {dataset}/hazy" in said
    assert describe_moved_data(job, run, record) == ""

    # A pack names its depth maps otherwise; its images are the same.
    refuse_changes(moved, run, record, DataDigest("of a pack", "names and sizes"))

    # Other images of the same names, elsewhere. A file that was mended where it was is welcome.
    with pytest.raises(
        ResumeError, match="data: other images of the same names than the run began with .data.clear, data.dep"
    ):
        refuse_changes(moved, run, record, DataDigest("digest", "other sizes"))
    refuse_changes(job, run, record, DataDigest("digest", "other sizes"))

    # Earlier versions noted names alone.
    refuse_changes(moved, run, RECORD, DataDigest("digest", "other sizes"))
    assert "where names are the same" in describe_moved_data(moved, run, RECORD)


def test_a_run_whose_samples_were_made_in_another_way_is_refused(job):
    run = begun(job, "test-colabator-20260101-000000")

    # A record of before has no such entry.
    record = read_record(run).model_dump()
    del record["samples"]
    run.child("run.json").write(json.dumps(record).encode())

    with pytest.raises(ResumeError, match="samples: made in another way by the version of corun_ray that the run beg"):
        refuse_changes(job, run, read_record(run), DATA)


def test_only_a_finished_run_that_takes_no_more_steps_may_have_other_samples(dataset, tmp_path):
    job = variant(dataset, tmp_path / "a")
    run = begun(job, "test-colabator-20260101-000000")
    finished = RECORD.model_copy(update={"state": "finished", "samples": 1})
    refuse_changes(job, run, finished, DATA)

    longer = variant(dataset, tmp_path / "b", train={"steps": 99})
    refuse_changes(longer, run, RECORD, DATA)
    with pytest.raises(ResumeError, match="samples: made in another way"):
        refuse_changes(longer, run, finished, DATA)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"state": "running", "mlflow_run": 1, "data": ""}'])
def test_other_records_are_refused(tmp_path, content):
    run = locate(str(tmp_path))
    run.child("run.json").write(content)
    with pytest.raises(StorageError, match="is no run's record"):
        read_record(run)
