"""What several test files share: one real local Ray, and a small dataset on disk."""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest

from corun_ray.config.jobs import ClusterSection
from tests import ROOT

# Threads of torch sleep while they wait for each other. By default they spin, and on a busy machine a spinning thread
# keeps the processor from the thread that it waits for: a small network then takes fifty times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Two processes of tests have two cores: small tensors gain nothing from a second thread.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray reads it where it is imported: metrics are served after 1 s, not 10, and gauges that nobody sets go after 2.
os.environ.setdefault("RAY_metrics_report_interval_ms", "1000")
# Ray Train looks after its workers so often, not every 2 s: what a run of a few steps mostly waits for.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")

PLANTED = "planted-secret-7c1e5b"
"""A secret that must not turn up anywhere."""
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": PLANTED, "AWS_DEFAULT_REGION": "us-east-1"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow (over a minute each)")


def pytest_configure(config: pytest.Config) -> None:
    """Deal the tests out our way where pytest-xdist is installed; a bare GPU machine has pytest alone."""
    if config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.import_plugin("tests.scheduling")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip slow tests unless they are asked for, and say how."""
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason='slow; make test PYTEST="--slow" runs it'))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """An S3 endpoint over HTTP on loopback, which this process and all its children know by environment."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    environment = pytest.MonkeyPatch()
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": url}.items():
        environment.setenv(name, value)
    try:
        wait_for(url)
        yield url
    finally:
        environment.undo()
        server.terminate()
        server.wait()


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server over HTTP on loopback, which proxies its artifacts."""
    folder = tmp_path_factory.mktemp("mlflow")
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    places = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "kept")]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    # MLflow's own jobs would start eight more processes, which nothing here needs.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--serve-artifacts", *places], stdout=log, stderr=log, env=environment)
        try:
            wait_for(f"{uri}/health")
            yield uri
        finally:
            process.terminate()
            process.wait()


def free_port() -> int:
    """A port of loopback that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def load_evidence(name: str) -> ModuleType:
    """A script of docs/evidence as a module."""
    specification = importlib.util.spec_from_file_location(name, ROOT / "docs" / "evidence" / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    # Its dataclasses look their module up.
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


@contextlib.contextmanager
def heeding_ctrl_c() -> Iterator[None]:
    """Processes that are started within heed SIGINT, however the tests were started.

    A shell without job control has what it starts in the background (`make test &` in a script) ignore SIGINT, and
    what is ignored stays so in every process below; what has a handler is reset to the default.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def wait_for(url: str, timeout_s: float = 60.0) -> None:
    """Returns when something answers at `url`."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@pytest.fixture(scope="session")
def local_ray(s3_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One Ray for the whole session, with more logical CPUs than the machine may have."""
    import ray

    # Ray's processes inherit it: what they fetch is gone with the session.
    environment = pytest.MonkeyPatch()
    environment.setenv("CORUN_WEIGHTS_CACHE", str(tmp_path_factory.mktemp("weights_cache")))

    from corun_ray.service.cluster.connect import connect

    connect(ClusterSection(workers=2, data_cpus=1))
    yield
    ray.shutdown()
    environment.undo()


def photograph(rng: np.random.Generator, height_px: int, width_px: int) -> np.ndarray:
    """A smooth random picture with edges, uint8 H W 3."""
    coarse = rng.uniform(0, 255, (6, 8, 3)).astype(np.float32)
    smooth = cv2.resize(coarse, (width_px, height_px), interpolation=cv2.INTER_CUBIC)
    return (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)


def write_image(path: Path, image: np.ndarray) -> None:
    """Writes RGB uint8 H W 3 (or grey, or with alpha) in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if image.ndim == 3:
        image = image[..., [2, 1, 0, 3][: image.shape[2]]]
    assert cv2.imwrite(str(path), image)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `clear` (8), `depth` (8), `hazy` (6) and `hazy_truth` (6)."""
    return make_dataset(tmp_path_factory.mktemp("dataset"))


def make_dataset(root: Path) -> Path:
    """Writes it below `root`."""
    rng = np.random.default_rng(0)
    for i in range(8):
        clear = photograph(rng, 72, 96)
        write_image(root / "clear" / f"view_{i}.png", clear)
        depth = cv2.resize(rng.uniform(0, 1, (4, 5)).astype(np.float32), (96, 72))
        (root / "depth").mkdir(exist_ok=True)
        np.save(root / "depth" / f"view_{i}.npy", depth)
    for i in range(6):
        truth = photograph(rng, 60 + 4 * i, 80)
        write_image(root / "hazy_truth" / f"photo_{i}.png", truth)
        write_image(root / "hazy" / f"photo_{i}.png", (0.5 * truth + 110).astype(np.uint8))
    return root
