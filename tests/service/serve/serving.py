"""A small model served on the Ray of the tests, and what its answers should be."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
import torch

from corun_ray.config.jobs import ServeJob
from corun_ray.config.loading import build_job
from corun_ray.core.data.images import decode_pixels
from corun_ray.core.inference.restore import restore, to_image, to_tensor
from corun_ray.core.networks.corun import CORUN
from corun_ray.core.networks.spec import NetworkSpec
from corun_ray.service.inference.photos import Photo, write_photo
from corun_ray.service.models.sources import Model
from corun_ray.service.serve.deployment import Deployment
from corun_ray.service.serve.messages import ServedModel
from tests.conftest import free_port, heeding_ctrl_c
from tests.service.serve.serve_requests import Answer

SIZES = [(40, 64), (33, 47), (96, 80), (120, 90), (17, 200)]
MAX_MIB = 1
PNG = {"Content-Type": "image/png"}


@dataclass(frozen=True)
class Running:
    """A served model, and the network that it should answer like."""

    url: str
    model: Model

    def restored(self, pixels: np.ndarray) -> np.ndarray:
        with one_thread():
            return to_image(restore(self.model.build().eval(), to_tensor(pixels)).scene, pixels.dtype.type)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """As many as a replica has: the order of sums, and so the last bit, is the same then."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextlib.contextmanager
def running(**section: object) -> Iterator[Running]:
    torch.manual_seed(0)
    network = CORUN(2, 4)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model = Model(NetworkSpec("corun", {"stages": 2, "width": 4}), network.state_dict(), {})
    keys = {"model": "x", "port": free_port(), "max_upload_mib": MAX_MIB} | section
    job = build_job({"kind": "serve", "name": "dehazing", "serve": keys})
    assert isinstance(job, ServeJob)
    with Deployment(job, model, ServedModel("net", "7")) as deployment:
        deployment.start()
        yield Running(deployment.url.rstrip("/"), model)


def assert_is_restored(answer: Answer, expected: np.ndarray, suffix: str = ".png") -> None:
    """The very pixels where the image was restored alone; in a batch the last bit of a sum may differ."""
    assert answer.status == 200, answer.body
    if suffix == ".png" and answer.headers["x-corun-batch"] == "1":
        assert np.array_equal(decode_pixels(answer.body), expected)
        return
    found, wanted = decode_pixels(answer.body), decode_pixels(write_photo(Photo(expected), suffix))
    difference = np.abs(found.astype(int) - wanted)
    assert difference.max() <= (1 if suffix == ".png" else 12) and (difference > 0).mean() < 0.01


def replicas() -> set[str]:
    """Actors of the application; one that is lost is replaced by one of another name."""
    named = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    return {name for name in named if name.startswith("SERVE_REPLICA::dehazing#")}


@contextlib.contextmanager
def command(folder: Path, served: Running, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`corun-ray serve` on the cluster of the tests, and the line that says it is ready."""
    torch.save(served.model.params, folder / "net.pth")
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    line = [sys.executable, "-m", "corun_ray", "serve", str(folder / "net.pth"), *options]
    with heeding_ctrl_c():
        process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    watch = threading.Timer(120, process.kill)
    watch.start()
    try:
        lines = []
        while "ready" not in (line_read := process.stdout.readline()):
            assert line_read, "".join(lines)
            lines.append(line_read)
        yield process, line_read.split()[1]
    finally:
        watch.cancel()
        process.kill()
        process.wait()


def interrupted(process: subprocess.Popen[str]) -> str:
    """What it prints after Ctrl-C."""
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    output = process.stdout.read()
    assert process.wait() == 0, output
    return output
