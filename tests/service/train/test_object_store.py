"""Everything on an S3 endpoint over HTTP, by environment alone: data in, checkpoints, snapshots and pictures out."""

import re
from collections import Counter
from pathlib import Path

import pytest
import ray

from corun_ray.config.tasks import DehazeSection
from corun_ray.core.networks.spec import NetworkSpec
from corun_ray.core.training.checkpoint_record import TRAINING_FILE, read_record
from corun_ray.service.inference.dehaze import dehaze
from corun_ray.service.models.sources import Model, fetch_model
from corun_ray.service.pool import snapshots
from corun_ray.service.pool.client import PoolClient
from corun_ray.service.pool.keeper import PoolKeeper, start_pool
from corun_ray.service.storage import StorageError, locate
from tests.conftest import PLANTED
from tests.service.labels import label


def test_a_bucket_reads_and_writes_as_a_folder_does(bucket, dataset):
    place = locate(f"{bucket}/hazy")
    assert place.list_files() == [f"photo_{i}.png" for i in range(6)]
    assert place.child("photo_0.png").read() == (dataset / "hazy/photo_0.png").read_bytes()
    locate(f"{bucket}/notes").child("a/b.txt").write(b"text")
    assert locate(f"{bucket}/notes").list_files() == ["a/b.txt"]
    assert locate(f"{bucket}/hazy").exists() and not locate(f"{bucket}/haze").exists()
    with pytest.raises(StorageError, match=f"cannot read {bucket}/hazy/none.png"):
        place.child("none.png").read()
    with pytest.raises(StorageError, match="cannot list s3://no-such-bucket/x"):
        locate("s3://no-such-bucket/x").list_files()


def test_the_pool_is_saved_to_a_bucket_and_restored(local_ray, bucket):
    pool = locate(f"{bucket}/pool")
    keeper = PoolKeeper(shards := start_pool(2, pool), pool)
    client = PoolClient(shards, keeper.restore(None))
    client.offer([label("a/b.png", 0.5, 0.5, 3), label("c.png", 0.5, 0.5, 3)])
    client.settle()
    keeper.finish(4, keeper.freeze())
    keeper.sweep([4])
    keeper = PoolKeeper(shards := start_pool(1, pool), pool)
    client = PoolClient(shards, keeper.restore("step_00000004.json"))
    client.offer([label("a/b.png", 0.4, 0.6, 5)])
    assert [found.step for found in client.prefetch(["a/b.png", "c.png"]).result()] == [3, 3]


def test_colabator_trains_from_a_bucket_into_a_bucket(bucket, watched_colabator, tmp_path):
    job, uri, *_ = watched_colabator
    assert fetch_model(uri, job.tracking.uri).spec.args["stages"] == 2

    files = locate(f"{bucket}/runs").list_files()
    assert any(file.endswith("pictures/restorations_00000006.png") for file in files)
    last = max(file for file in files if file.endswith(TRAINING_FILE))
    checkpoint = locate(f"{bucket}/runs").child(last.rpartition("/")[0])
    assert fetch_model(checkpoint.uri, "").spec.args["stages"] == 2
    record = read_record(checkpoint.download(tmp_path))
    pool = locate(f"{bucket}/runs").child(last.partition("/")[0]).child("pool")
    content = snapshots.read_index(pool, snapshots.read(pool.child(record["extra"]["pool_snapshot"])))
    assert sorted(content) == [f"photo_{i}.png" for i in range(6)]


def test_a_role_for_one_prefix_is_enough_for_a_run(team_role, watched_colabator):
    """No request is refused: not for the bucket, nor for folders above the prefix."""
    assert watched_colabator.uri and len(team_role.asked) > 100
    assert team_role.denied == []


def test_a_run_writes_nearly_every_object_once(team_role, watched_colabator):
    """A bucket with versioning keeps every version of an object."""
    written = Counter(request.split()[1] for request in team_role.asked if re.match("PUT [^?]+[^/]$", request))
    again = {path.rpartition("/")[2] for path, times in written.items() if times > 1}
    assert len(written) > 20 and any(path.endswith("/hazy.jpg") for path in written)
    # The driver shows every 15 s that it lives, in as many bytes.
    again.discard("000001.json")
    assert again == {"run.json", "validation.csv", "current.json", "checkpoint_manager_snapshot.json"}


def test_the_secret_key_that_the_run_used_is_nowhere(bucket, watched_colabator, tmp_path_factory):
    """Not in its folder, in the files and records of the MLflow server, in what it printed, or in Ray's logs."""
    runs, logs = locate(f"{bucket}/runs"), Path(ray._private.worker.global_worker.node.get_logs_dir_path())
    mlflow = next(tmp_path_factory.getbasetemp().glob("mlflow*/mlflow.db")).parent
    texts = {f"{runs.uri}/{name}": runs.child(name).read() for name in runs.list_files()}
    texts |= {str(path): path.read_bytes() for folder in (mlflow, logs) for path in folder.rglob("*") if path.is_file()}
    texts["output"] = watched_colabator.output.encode()
    assert len(texts) > 30 and any(name.endswith("job.yaml") for name in texts)
    assert any(name.endswith("report.html") and name.startswith(str(mlflow)) for name in texts)
    assert [name for name, text in texts.items() if PLANTED.encode() in text] == []


def test_an_error_of_a_store_that_refuses_names_no_key(bucket):
    with pytest.raises(StorageError) as caught:
        locate("s3://no-such-bucket/runs").child("a").write(b"")
    assert PLANTED not in str(caught.value)


def test_a_bucket_is_dehazed_into_a_bucket_and_what_is_there_is_passed_over(local_ray, bucket):
    for name in ("photo_0.png", "photo_1.png"):
        locate(f"{bucket}/photographs").child(name).write(locate(f"{bucket}/hazy").child(name).read())
    model = Model(NetworkSpec("corun", {"stages": 2, "width": 4}), None, {})
    section = DehazeSection(input=f"{bucket}/photographs", output=f"{bucket}/clean", model="x")
    assert dehaze(section, model).written == 2
    locate(f"{bucket}/clean/photo_1.png").delete()
    again = dehaze(section, model, resume=True)
    assert (again.written, again.already_written) == (1, 1)
    assert locate(f"{bucket}/clean").list_files() == [".model.json", "photo_0.png", "photo_1.png"]
