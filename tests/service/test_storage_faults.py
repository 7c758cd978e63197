"""Stores that are slow, failing, out of reach, read-only or full: ridden out, or one clear line and nothing broken."""

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import cv2
import numpy as np
import pytest
from pyarrow import fs

from corun_ray.service.data.manifest import build_manifest
from corun_ray.service.data.sample_maker import SampleMaker
from corun_ray.service.storage import PATIENCE_VARIABLE, Location, MissingFile, StorageError, locate
from tests.faulty_s3 import FaultyS3
from tests.service.jobs import small_job

OLD, NEW = os.urandom(3000), os.urandom(200_000)
SEVERAL_PARTS = os.urandom(24_000_000)  # of a multipart upload
FAILURES = ("500", "503", "reset", "cut")


@pytest.fixture(scope="module")
def proxy(s3_server):
    """A proxy before the session's store, with a bucket `faults`; every client of this module goes through it."""
    boto3.client("s3").create_bucket(Bucket="faults")
    with FaultyS3(s3_server, slow_s=3.5) as proxy, pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def store(proxy, request):
    """The proxy, healthy and with its count at zero, before a bucket of one file, `kept.bin`, which holds `OLD`."""
    locate.cache_clear()
    locate("s3://faults/kept.bin").write(OLD)
    locate.cache_clear()
    proxy.failed.clear()
    yield proxy
    proxy.fault(None)
    locate.cache_clear()


@pytest.fixture
def patient(monkeypatch):
    monkeypatch.setenv(PATIENCE_VARIABLE, "6")


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setenv(PATIENCE_VARIABLE, "0.4")


def kept() -> Location:
    return locate("s3://faults/kept.bin")


def one_line(error: pytest.ExceptionInfo) -> str:
    assert error.type is StorageError and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", FAILURES)
def test_uploads_outlast_a_few_failures(store, patient, kind):
    store.fault(kind, requests=4)
    kept().write(NEW)
    assert store.failed[kind] == 4
    assert kept().read() == NEW


@pytest.mark.parametrize("kind", ["500", "503", "reset", "cut-read"])
def test_reads_outlast_a_few_failures(store, patient, kind):
    store.fault(kind, requests=4)
    assert kept().read() == OLD
    assert store.failed[kind] == 4


def test_an_outage_is_waited_for(store, patient):
    store.fault("outage", seconds=0.5)
    kept().write(NEW)
    assert kept().read() == NEW


def test_many_readers_at_once_outlast_a_busy_store(store, patient):
    """They share no budget of retries that the first of them could use up."""
    place = kept()
    store.fault("503", requests=150)
    with ThreadPoolExecutor(32) as readers:
        assert set(readers.map(lambda _: place.read(), range(64))) == {OLD}
    assert store.failed["503"] == 150


def test_a_slow_store_is_waited_for_not_asked_again(store, patient):
    store.fault("slow", methods={"GET"})
    assert kept().read() == OLD
    assert store.failed["slow"] == 1


@pytest.mark.parametrize("kind", [*FAILURES, "outage"])
@pytest.mark.parametrize("data", [NEW, SEVERAL_PARTS], ids=["small", "large"])
def test_an_upload_that_fails_for_good_is_one_line_and_leaves_the_old_file(store, hasty, kind, data):
    store.fault(kind)
    with pytest.raises(StorageError, match="^cannot write s3://faults/kept.bin: ") as error:
        kept().write(data)
    one_line(error)
    store.fault(None)
    assert kept().read() == OLD
    assert locate("s3://faults").list_files() == ["kept.bin"]


@pytest.mark.parametrize("refused", [1, 4])
def test_an_upload_that_lacks_parts_leaves_the_old_file(store, hasty, refused):
    """The store takes the beginning of the upload and then refuses `refused` of its parts."""
    place = kept()
    store.fault("read-only", requests=refused, methods={"PUT"})
    with pytest.raises(StorageError, match="cannot write s3://faults/kept.bin: .*Access Denied"):
        place.write(SEVERAL_PARTS)
    store.fault(None)
    assert place.read() == OLD


@pytest.mark.parametrize("kind", ["500", "503", "reset", "outage", "cut-read"])
def test_a_read_that_fails_for_good_is_one_line(store, hasty, kind, tmp_path):
    store.fault(kind)
    with pytest.raises(StorageError, match="^cannot read s3://faults/kept.bin: ") as error:
        kept().read()
    one_line(error)
    with pytest.raises(StorageError) as error:
        kept().download(tmp_path)
    one_line(error)
    assert not list(tmp_path.iterdir())


def test_a_read_only_store_is_told_at_once(store):
    store.fault("read-only")
    with pytest.raises(StorageError, match="cannot write s3://faults/kept.bin: .*Access Denied") as error:
        kept().write(NEW)
    one_line(error)
    with pytest.raises(StorageError, match="cannot delete s3://faults/kept.bin: ") as error:
        kept().delete()
    one_line(error)
    assert kept().read() == OLD
    assert store.failed["read-only"] <= 4


def test_an_unpickled_place_is_the_same_and_as_patient_in_another_process(store, patient):
    place = kept()
    again = pickle.loads(pickle.dumps(place))
    assert again == place and isinstance(again.filesystem, fs.PyFileSystem)
    # pyarrow's own, unpickled, gives up after the third failure.
    store.fault("503", requests=5)
    code = "import pickle, sys; sys.stdout.buffer.write(pickle.load(sys.stdin.buffer).read())"
    reader = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(again), capture_output=True, timeout=120)
    assert reader.stdout == OLD, reader.stderr.decode()[-2000:]
    assert store.failed["503"] == 5


def test_the_patience_must_be_a_number(store, monkeypatch):
    monkeypatch.setenv(PATIENCE_VARIABLE, "long")
    with pytest.raises(StorageError, match=f"cannot open s3://faults/kept.bin: {PATIENCE_VARIABLE} must be"):
        kept()


def test_a_uri_may_name_its_store(store, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    place = locate(f"s3://faults/named?scheme=http&endpoint_override={store.url.removeprefix('http://')}")
    place.child("a/b.bin").write(NEW)
    assert place.list_files() == ["a/b.bin"]
    assert locate(place.child("a/b.bin").uri).read() == NEW
    place.delete()
    assert not place.exists()


def test_a_missing_file_is_set_aside_and_an_unreachable_store_is_not(store, tmp_path, hasty):
    """The store's silence says nothing about its images."""
    clear = locate("s3://faults/clear")
    picture = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    for name in ("a.png", "b.png"):
        clear.child(name).write(cv2.imencode(".png", picture)[1].tobytes())
    job = small_job("pretrain", tmp_path, tmp_path, data={"clear": clear.uri, "depth": None})
    bad: dict[str, str] = {}
    maker = SampleMaker(job, build_manifest(job), 32, bad.update)
    clear.child("a.png").delete()
    clear.child("a.png").delete()
    with pytest.raises(MissingFile, match="cannot read s3://faults/clear/a.png"):
        clear.child("a.png").read()
    assert [maker.sample(index)["clear"].shape for index in range(2)] == [(32, 32, 3)] * 2
    assert list(bad) == ["s3://faults/clear/a.png"]
    store.fault("outage")
    with pytest.raises(StorageError, match="cannot read s3://faults/clear/") as error:
        maker.sample(0)
    one_line(error)
    assert len(bad) == 1
    store.fault(None)
    clear.delete()


def test_a_local_file_that_may_not_be_read_counts_as_missing(tmp_path):
    place = locate(str(tmp_path)).child("secret.png")
    place.write(OLD)
    Path(place.path).chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root reads everything
        with pytest.raises(MissingFile, match=f"^cannot read {place.uri}: Permission denied$"):
            place.read()
    finally:
        os.seteuid(user)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 1 MiB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs to mount a small disk: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_one_line_and_leaves_the_old_file(small_disk, tmp_path):
    place = locate(str(small_disk)).child("kept.bin")
    place.write(OLD)
    with pytest.raises(StorageError, match=f"^cannot write {place.uri}: No space left on device$"):
        place.write(SEVERAL_PARTS)
    assert place.read() == OLD and os.listdir(small_disk) == ["kept.bin"]
    source = locate(str(tmp_path)).child("large.bin")
    source.write(SEVERAL_PARTS)
    with pytest.raises(StorageError, match=f"^cannot read {source.uri}: No space left on device$"):
        source.download(small_disk)
    assert os.listdir(small_disk) == ["kept.bin"]


def test_two_writers_of_one_file_leave_one_of_theirs(tmp_path):
    place = locate(str(tmp_path)).child("both.bin")
    contents = [bytes([number]) * 300_000 for number in range(4)]
    with ThreadPoolExecutor(4) as writers:
        list(writers.map(place.write, contents * 10))
    assert place.read() in contents and os.listdir(tmp_path) == ["both.bin"]
    # What a writer leaves that is killed is no file.
    (tmp_path / ".0123abcd.part").write_bytes(OLD)
    assert locate(str(tmp_path)).list_files() == ["both.bin"]
