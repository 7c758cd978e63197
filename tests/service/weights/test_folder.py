"""Weights folders on disk, in a bucket and behind a server that counts what is read of it."""

import gzip
import hashlib
import json
import multiprocessing
import pickle
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import numpy as np
import pytest

from corun_ray.cli.app import parse
from corun_ray.cli.data import format_weights
from corun_ray.core.errors import UserError
from corun_ray.core.weights import WeightsError, refuse_weights
from corun_ray.service.weights import folder as weights
from corun_ray.service.weights.folder import (
    CACHE_VARIABLE,
    INDEX,
    RecordingSource,
    WeightsFolder,
    describe_lacking,
    index_folder,
    read_index,
)

FILES = {
    # More than one chunk.
    "vgg19-dcbb9e9d.pth": np.random.default_rng(0).bytes(weights.CHUNK_BYTES + 12_345),
    "brisque.mat": b"the vectors of BRISQUE",
}


class Server(ThreadingHTTPServer):
    """Files over HTTP on loopback by URL path, in ranges if asked; counts the bytes sent of each."""

    def __init__(self, delay_s: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, str] = {}
        self.sent_bytes: dict[str, int] = {}
        self.delay_s = delay_s
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        data = self.server.files.get(self.path)
        if data is None:
            return self.send_error(404)
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(span[1]), min(int(span[2] or len(data)), len(data) - 1)) if span else (0, len(data) - 1)
        self.send_response(206 if span else 200)
        if span:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            time.sleep(self.server.delay_s)
            self.wfile.write(data[first : last + 1])
            self.server.sent_bytes[self.path] = self.server.sent_bytes.get(self.path, 0) + last + 1 - first

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An indexed local folder."""
    place = tmp_path / "weights"
    place.mkdir()
    for name, data in FILES.items():
        (place / name).write_bytes(data)
    index_folder(str(place))
    return place


@pytest.fixture
def bucket(s3_server: str, folder: Path) -> str:
    """The same folder in a bucket."""
    client = boto3.client("s3")
    client.create_bucket(Bucket="weights")
    for path in folder.iterdir():
        client.upload_file(str(path), "weights", f"all/{path.name}")
    return "s3://weights/all"


def put(uri: str, name: str, data: bytes) -> None:
    weights.locate(uri).child(name).write(data)


def test_a_folder_and_a_bucket_give_the_same_bytes(folder, bucket, tmp_path):
    here, there = WeightsFolder(str(folder)), pickle.loads(pickle.dumps(WeightsFolder(bucket, tmp_path / "cache")))
    for name, data in FILES.items():
        assert here(name) == folder / name
        cached = there(name)
        assert cached == tmp_path / "cache" / hashlib.sha256(data).hexdigest()[:16] / name
        assert cached.read_bytes() == data
    assert index_folder(bucket) == read_index(str(folder)) == read_index(bucket)


def test_the_cache_is_that_of_the_machine(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "node"))
    assert WeightsFolder(bucket)("brisque.mat").is_relative_to(tmp_path / "node")
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert WeightsFolder(bucket)("brisque.mat").is_relative_to(tmp_path / ".cache/corun_ray/weights")
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="Not a directory.*/file/"):
        WeightsFolder(bucket, tmp_path / "file")("brisque.mat")


@pytest.mark.parametrize("damage", [b"X" + FILES["brisque.mat"][1:], FILES["brisque.mat"] + b"more", b""])
def test_a_file_that_is_not_what_the_index_says_is_refused(folder, bucket, tmp_path, damage):
    put(str(folder), "brisque.mat", damage)
    put(bucket, "brisque.mat", damage)
    expected = f"expected {len(FILES['brisque.mat'])} bytes with SHA-256 .*, found {len(damage)} bytes"
    for source in (WeightsFolder(str(folder)), WeightsFolder(bucket, tmp_path / "cache")):
        with pytest.raises(WeightsError, match=f"weights.*/brisque.mat: {expected}") as refusal:
            source("brisque.mat")
        assert "\n" not in str(refusal.value)
    assert [path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [".lock"]

    put(bucket, "brisque.mat", FILES["brisque.mat"])
    assert WeightsFolder(bucket, tmp_path / "cache")("brisque.mat").read_bytes() == FILES["brisque.mat"]


@pytest.mark.parametrize("damage", [b"X" + FILES["brisque.mat"][1:], b"short"])
def test_a_damaged_file_in_the_cache_is_replaced(bucket, tmp_path, damage):
    source = WeightsFolder(bucket, tmp_path / "cache")
    source("brisque.mat").write_bytes(damage)
    # A `.part` that a killed process left is no obstacle either.
    source("brisque.mat").with_name("brisque.mat.part").write_bytes(b"half")
    source("brisque.mat").write_bytes(damage)
    assert source("brisque.mat").read_bytes() == FILES["brisque.mat"]
    assert sorted(path.suffix for path in source("brisque.mat").parent.iterdir()) == [".lock", ".mat"]


def test_a_cached_file_is_read_once_and_downloaded_once(folder, server, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    server.files = {f"/weights/{path.name}": path.read_bytes() for path in folder.iterdir()}
    source = WeightsFolder("s3://weights", tmp_path / "cache")
    weights.locate.cache_clear()
    path = source("brisque.mat")
    weights._compute_sha256.cache_clear()
    for _ in range(3):
        assert source("brisque.mat") == path
    assert weights._compute_sha256.cache_info().misses == 1
    assert server.sent_bytes["/weights/brisque.mat"] == len(FILES["brisque.mat"])
    weights.locate.cache_clear()


def test_a_packed_file_stays_packed(bucket, tmp_path):
    packed = gzip.compress(b"tensors")
    boto3.client("s3").put_object(Bucket="weights", Key="all/a.pth.gz", Body=packed)
    weights.write_index(bucket, {"a.pth.gz": weights.Content(len(packed), hashlib.sha256(packed).hexdigest())})
    assert WeightsFolder(bucket, tmp_path / "cache")("a.pth.gz").read_bytes() == packed


def _use(source: WeightsFolder, name: str, gate, results) -> None:
    gate.wait(60)
    began_s = time.monotonic()
    digest = hashlib.sha256(source(name).read_bytes()).hexdigest()
    results.put((digest, began_s, time.monotonic()))


def test_processes_that_ask_at_once_wait_for_one_download(folder, server, tmp_path, monkeypatch):
    name, data = "vgg19-dcbb9e9d.pth", FILES["vgg19-dcbb9e9d.pth"]
    for variable, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "a"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    server.files = {f"/weights/{path.name}": path.read_bytes() for path in folder.iterdir()}
    server.delay_s = 0.3
    spawn = multiprocessing.get_context("spawn")
    gate, results = spawn.Barrier(4), spawn.Queue()
    arguments = (WeightsFolder("s3://weights", tmp_path / "cache"), name, gate, results)
    processes = [spawn.Process(target=_use, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    used = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)

    assert {digest for digest, _, _ in used} == {hashlib.sha256(data).hexdigest()}
    assert max(began_s for _, began_s, _ in used) < min(ended_s for _, _, ended_s in used), (
        "all asked before any had it"
    )
    assert server.sent_bytes[f"/weights/{name}"] == len(data)
    assert server.sent_bytes[f"/weights/{INDEX}"] == 4 * len(server.files[f"/weights/{INDEX}"])


def test_a_lock_that_is_never_freed_is_an_error(bucket, tmp_path, monkeypatch):
    from filelock import FileLock

    source = WeightsFolder(bucket, tmp_path / "cache")
    path = source("brisque.mat")
    path.unlink()
    monkeypatch.setattr(weights, "LOCK_TIMEOUT_S", 0.1)
    with FileLock(f"{path}.lock"), pytest.raises(WeightsError, match=r"brisque.mat: another process has held .*\.lock"):
        source("brisque.mat")


def test_what_is_not_there_is_said(folder, bucket, tmp_path):
    for uri in (str(folder), bucket):
        source = WeightsFolder(uri, tmp_path / "cache")
        with pytest.raises(WeightsError, match=f"musiq.pth is not in {uri}/weights.json; `corun-ray weights fetch`"):
            source("musiq.pth")
        place = weights.locate(uri).child("brisque.mat")
        place.filesystem.delete_file(place.path)
        with pytest.raises(WeightsError, match="brisque.mat: no such file, though weights.json lists it"):
            source("brisque.mat")
        with pytest.raises(WeightsError, match=f"{uri}/none: no weights.json there; `corun-ray weights index"):
            WeightsFolder(f"{uri}/none")("brisque.mat")
    with pytest.raises(WeightsError, match="cannot open nothing://"):
        WeightsFolder("nothing://x")("brisque.mat")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"empty: no weight files there \(.pt .pth"):
        index_folder(str(tmp_path / "empty"))
    for uri in (str(tmp_path / "none"), f"{bucket}/none"):
        with pytest.raises(WeightsError, match=f"^cannot list {uri}: [Nn]o such "):
            index_folder(uri)


GOOD = {"size": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"files": {"../brisque.mat": GOOD}}, "'../brisque.mat' is no plain file name"),
        ({"files": {"a/b.pth": GOOD}}, "is no plain file name"),
        ({"files": {"/etc/passwd": GOOD}}, "is no plain file name"),
        ({"files": {"a\\b.pth": GOOD}}, "is no plain file name"),
        ({"files": {"..": GOOD}}, "is no plain file name"),
        ({"files": {"": GOOD}}, "is no plain file name"),
        ({"files": {"a\n.pth": GOOD}}, "is no plain file name"),
        ({"files": {INDEX: GOOD}}, "is no plain file name"),
        ({"files": {"a.pth": {**GOOD, "size": -1}}}, "a.pth: expected `size` in bytes"),
        ({"files": {"a.pth": {**GOOD, "size": True}}}, "a.pth: expected `size` in bytes"),
        ({"files": {"a.pth": {**GOOD, "sha256": "../" * 22}}}, "a.pth: expected `size` in bytes and `sha256`"),
        ({"files": {"a.pth": {**GOOD, "url": "x"}}}, "a.pth: expected"),
        ({"files": {"a.pth": []}}, "a.pth: expected"),
        ({"files": []}, "expected an object with `files` alone"),
        ([], "expected an object with `files` alone"),
    ],
)
def test_an_index_that_says_anything_else_is_refused(folder, index, message):
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=f"{folder}/{INDEX}: .*{re.escape(message)}"):
        WeightsFolder(str(folder))("brisque.mat")


def test_an_index_that_is_no_json_is_refused(folder):
    (folder / INDEX).write_text("files:")
    with pytest.raises(WeightsError, match="weights.json: not JSON"):
        WeightsFolder(str(folder))("brisque.mat")


def test_the_recorder_knows_what_was_asked_for_and_what_was_missing(folder):
    recorder = RecordingSource(WeightsFolder(str(folder)))
    assert recorder("brisque.mat") == recorder("brisque.mat") == folder / "brisque.mat"
    with pytest.raises(WeightsError):
        recorder("musiq.pth")
    assert recorder.asked == ["brisque.mat", "musiq.pth"]
    assert list(recorder.missing) == ["musiq.pth"] and "weights.json" in recorder.missing["musiq.pth"]
    with pytest.raises(WeightsError, match="names no weights folder"):
        RecordingSource(refuse_weights)("musiq.pth")


def test_the_listing_says_what_is_there_and_what_is_lacking(folder, bucket):
    wanted = {"brisque.mat": "quality brisque", "musiq.pth": "quality musiq", "new.pt": "clarity", "gone.pt": "loss"}
    index = json.loads((folder / INDEX).read_text())
    index["files"]["gone.pt"] = GOOD
    for uri in (str(folder), bucket):
        put(uri, INDEX, json.dumps(index).encode())
        put(uri, "new.pt", b"new")
        put(uri, "vgg19-dcbb9e9d.pth", b"other")
        header, *rows = format_weights(uri, wanted).splitlines()
        assert header.split() == ["file", "MB", "sha256", "state", "needed", "by"]
        digest = hashlib.sha256(FILES["brisque.mat"]).hexdigest()[:12]
        assert [re.split(r"\s{2,}", row) for row in rows] == [
            ["brisque.mat", "0.0", digest, "ok", "quality brisque"],
            ["gone.pt", "0.0", "0" * 12, "missing", "loss"],
            ["musiq.pth", "-", "-", "missing", "quality musiq"],
            ["new.pt", "0.0", "-", "not indexed", "clarity"],
            ["vgg19-dcbb9e9d.pth", "8.4", index["files"]["vgg19-dcbb9e9d.pth"]["sha256"][:12], "size differs"],
        ]
        assert describe_lacking(uri, wanted) == [
            f"gone.pt (for loss): missing ({uri})",
            f"musiq.pth (for quality musiq): missing ({uri})",
            f"new.pt (for clarity): not indexed ({uri})",
        ]
    assert describe_lacking(None, {"a.pt": "loss"}) == ["a.pt (for loss): missing (the job names no weights folder)"]


def test_the_commands(folder, capsys, monkeypatch):
    needs = [(str(folder), {"brisque.mat": "quality"}), (None, {"a.pt": "loss"})]
    monkeypatch.setattr("corun_ray.cli.data.find_needs", lambda job, set: needs[: int(set[0])] if set else needs)

    def run(*words: str) -> int:
        context = parse(["weights", *words])
        return context.command.invoke(context)

    assert run("ls", str(folder)) == run("ls", "job.yaml", "--set", "1") == 0
    assert "brisque.mat" in capsys.readouterr().out
    assert run("ls", "job.yaml") == 1
    assert "missing" in capsys.readouterr().out
    (folder / INDEX).unlink()
    assert run("index", str(folder)) == 0
    assert set(read_index(str(folder))) == set(FILES)
    with pytest.raises(UserError, match="fetch fills a local folder"):
        run("fetch", "s3://weights/all")
    with pytest.raises(UserError, match="none"):
        run("ls", str(folder / "none"))
