"""The door of a served model, without Ray: what it answers when replicas are slow, lost or broken."""

import asyncio

import pytest
from ray.exceptions import RayActorError
from starlette.testclient import TestClient

from corun_ray.service.serve.app import HttpApp, RequestLimits
from corun_ray.service.serve.messages import DehazedImage, ReplicaHealth, ServedModel
from corun_ray.service.serve.uploads import Refusal, UploadLimits
from tests.service.serve.bad_uploads import encoded

JPEG = {"Content-Type": "image/jpeg"}


class Replica:
    """Stands for a handle: `behaviour` is called with the file and the suffix."""

    def __init__(self, behaviour) -> None:
        self.behaviour, self.cancelled, self.seen = behaviour, False, []
        self.dehaze = self.report_health = self

    def remote(self, *args) -> "Replica":
        self.seen.append(args)
        return self

    def __await__(self):
        return self.behaviour(*self.seen[-1]).__await__()

    def cancel(self) -> None:
        self.cancelled = True


def door(behaviour, max_in_flight: int = 4, timeout_s: float = 5.0) -> tuple[TestClient, Replica]:
    replica = Replica(behaviour)
    limits = RequestLimits(UploadLimits(max_upload_mib=1, max_megapixels=1.5, min_side_px=16), max_in_flight, timeout_s)
    app = HttpApp(replica, ServedModel("haze<b>", "3"), limits).__serve_build_asgi_app__()
    return TestClient(app, raise_server_exceptions=False), replica


async def echo(data: bytes, suffix: str) -> DehazedImage:
    return DehazedImage(data, 10, 2, 0.5)


def test_a_good_request_is_passed_on_and_its_answer_names_model_and_time():
    client, replica = door(echo)
    photo = encoded(".jpg")
    answer = client.post("/dehaze", content=photo, headers=JPEG)
    assert answer.status_code == 200 and answer.content == photo
    assert replica.seen == [(photo, ".jpg")]
    assert answer.headers["content-type"] == "image/jpeg"
    assert answer.headers["x-corun-model"] == "haze<b>/3" and answer.headers["x-corun-batch"] == "2"
    assert "restore;dur=500" in answer.headers["server-timing"]
    assert client.post("/dehaze?format=webp", content=photo).headers["content-type"] == "image/webp"
    assert replica.seen[-1] == (photo, ".webp")


def test_what_the_door_refuses_reaches_no_replica():
    client, replica = door(echo)
    for content, headers, status in ((b"x", {"Content-Type": "text/plain"}, 415), (b"x", JPEG, 400), (b"", JPEG, 400)):
        answer = client.post("/dehaze", content=content, headers=headers)
        assert answer.status_code == status and set(answer.json()) == {"error"}
    assert replica.seen == []


def test_when_too_many_wait_the_next_is_told_to_come_back():
    client, replica = door(echo, max_in_flight=0)
    answer = client.post("/dehaze", content=encoded(".jpg"), headers=JPEG)
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0 and replica.seen == []


def test_a_slow_replica_is_given_up():
    async def sleep(*_):
        await asyncio.sleep(60)

    client, replica = door(sleep, timeout_s=0.05)
    answer = client.post("/dehaze", content=encoded(".jpg"), headers=JPEG)
    assert answer.status_code == 504 and "0.05 s" in answer.json()["error"] and replica.cancelled


def test_a_lost_replica_and_a_fault_of_our_own_tell_nothing_of_the_inside():
    async def lost(*_):
        raise RayActorError(error_msg="/secret/path")

    client, _ = door(lost)
    answer = client.post("/dehaze", content=encoded(".jpg"), headers=JPEG)
    assert answer.status_code == 503 and "retry-after" in answer.headers and "secret" not in answer.text
    health = client.get("/healthz")
    assert health.status_code == 503 and health.json()["error"] == "no replica answers"

    async def broken(*_):
        raise RuntimeError("/secret/path")

    client, _ = door(broken)
    answer = client.post("/dehaze", content=encoded(".jpg"), headers=JPEG)
    assert answer.status_code == 500 and "secret" not in answer.text and answer.json()["error"]


def test_a_replicas_refusal_is_the_answer():
    async def refuse(*_):
        return Refusal(422, "too hazy")

    client, _ = door(refuse)
    answer = client.post("/dehaze", content=encoded(".png"))
    assert (answer.status_code, answer.json()) == (422, {"error": "too hazy"})


def test_health_names_the_model():
    async def alive(*_):
        return ReplicaHealth("cpu")

    client, _ = door(alive)
    answer = client.get("/healthz")
    assert answer.status_code == 200
    assert answer.json() == {"status": "ok", "model": "haze<b>", "version": "3", "device": "cpu"}


def test_unknown_paths_and_methods_are_one_line_of_json():
    client, _ = door(echo)
    assert client.get("/nowhere").status_code == 404 and "/dehaze" in client.get("/nowhere").json()["error"]
    answer = client.get("/dehaze")
    assert answer.status_code == 405 and answer.json()["error"].endswith("expected POST")
    assert answer.headers["allow"] == "POST"


def test_the_page_shows_limits_and_escapes():
    client, _ = door(echo)
    page = client.get("/")
    assert "1 MiB and 1.5 megapixels" in " ".join(page.text.split()) and "haze&lt;b&gt;/3" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]


@pytest.mark.parametrize("status, photo", [(200, encoded(".jpg")), (400, b"x")])
def test_metrics_count_every_request(status, photo):
    client, _ = door(echo)
    for _ in range(3):
        assert client.post("/dehaze", content=photo, headers=JPEG).status_code == status
    lines = client.get("/metrics").text.splitlines()
    assert f'corun_serve_requests_total{{status="{status}"}} 3.0' in lines
    assert "corun_serve_in_flight 0.0" in lines and "corun_serve_seconds_count 3.0" in lines
    assert f"corun_serve_batch_images_sum {6.0 if status == 200 else 0.0}" in lines
    assert 'corun_serve_model_info{model="haze<b>",version="3"} 1.0' in lines
