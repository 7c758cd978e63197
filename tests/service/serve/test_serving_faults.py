"""A served model under many requests, good and bad, and when its driver or its replica is killed."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import ray
from ray import serve

from corun_ray.service.inference.photos import Photo, write_photo
from tests.conftest import photograph
from tests.service.serve.bad_uploads import bad_uploads
from tests.service.serve.serve_requests import Answer, ask
from tests.service.serve.serving import (
    MAX_MIB,
    PNG,
    SIZES,
    Running,
    assert_is_restored,
    command,
    interrupted,
    replicas,
    running,
)

BAD = bad_uploads(MAX_MIB)


@pytest.fixture(scope="module")
def served(local_ray) -> Iterator[Running]:
    with running() as here:
        yield here


@pytest.mark.slow
def test_a_killed_driver_leaves_an_application_that_the_next_command_replaces(served, tmp_path):
    options = ("--name", "other", "--path", "/other")
    with command(tmp_path, served, *options) as (process, url):
        process.kill()
    assert ask(f"{url}/healthz").status == 200
    done, answers = threading.Event(), []
    photo = write_photo(Photo(photograph(np.random.default_rng(3), 40, 64)), ".png")

    def watch() -> None:
        while not done.wait(0.2):
            answers.append(ask(f"{url}/dehaze", photo))

    watching = threading.Thread(target=watch)
    with command(tmp_path, served, *options) as (first, url):
        watching.start()
        with command(tmp_path, served, *options) as (second, _):
            assert first.stdout is not None
            assert "another deployment has taken the name other" in first.stdout.read() and first.wait() == 0
            done.set()
            watching.join()
            assert len(answers) > 5 and {answer.status for answer in answers} == {200}, answers
            assert "stopped" in interrupted(second)
    assert set(serve.status().applications) == {"dehazing"}


@pytest.mark.slow
def test_a_lost_replica_costs_the_requests_that_it_worked_on_and_is_replaced(served):
    large = write_photo(Photo(photograph(np.random.default_rng(0), 900, 1200)), ".jpg")
    before = replicas()
    (restorer,) = (name for name in before if "#restorer#" in name)
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(ask, f"{served.url}/dehaze", large)
        while "corun_serve_in_flight 1.0" not in ask(f"{served.url}/metrics").body.decode():
            assert not working.done()
        time.sleep(1)  # the network is at it by then
        ray.kill(ray.get_actor(restorer, namespace="serve"))
        lost = working.result()
    assert lost.status == 503 and "retry-after" in lost.headers, lost
    deadline = time.monotonic() + 60
    while ask(f"{served.url}/healthz").status != 200 or restorer in replicas():
        assert time.monotonic() < deadline
        time.sleep(0.5)
    image = photograph(np.random.default_rng(3), 40, 64)
    assert_is_restored(ask(f"{served.url}/dehaze", write_photo(Photo(image), ".png")), served.restored(image))


@pytest.mark.slow
def test_two_hundred_requests_good_and_bad_by_eight_clients(local_ray):
    """Five sizes mixed with bad uploads: good ones are restored, bad ones get a reason, no replica is lost."""
    rng = np.random.default_rng(0)
    with running(replicas=2) as served:
        before = replicas()
        images = {size: photograph(rng, *size) for size in SIZES}
        files = {size: write_photo(Photo(image), ".png") for size, image in images.items()}
        expected = {size: served.restored(image) for size, image in images.items()}
        wanted = [("good", SIZES[n % len(SIZES)]) for n in range(100)]
        wanted += [("bad", list(BAD)[n % len(BAD)]) for n in range(100)]
        order = [wanted[n] for n in rng.permutation(len(wanted))]

        def request(one: tuple[str, object]) -> Answer:
            kind, key = one
            if kind == "good":
                return ask(f"{served.url}/dehaze", files[key], PNG)
            bad = BAD[key]
            return ask(f"{served.url}/dehaze{bad.query}", bad.body, {"Content-Type": bad.media_type, **bad.headers})

        started = time.monotonic()
        with ThreadPoolExecutor(8) as clients:
            answers = list(clients.map(request, order))
        took_s = time.monotonic() - started
        for (kind, key), answer in zip(order, answers, strict=True):
            if kind == "good":
                assert_is_restored(answer, expected[key])
            else:
                assert answer.status == BAD[key].status and json.loads(answer.body)["error"], (key, answer)
        assert replicas() == before and len(before) == 3
        alone = sum(answer.headers.get("x-corun-batch") == "1" for answer in answers)
        print(f"200 requests in {took_s:.1f} s; {alone} images restored alone, {100 - alone} in batches")
