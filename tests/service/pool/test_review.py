"""Decisions about labels, the page that takes them, and the page in a real browser, also on a phone."""

import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from datetime import timedelta

import numpy as np
import pytest
from playwright.sync_api import Page, expect, sync_playwright
from starlette.testclient import TestClient

from corun_ray.config.loading import dump_job
from corun_ray.core.data.images import encode_png
from corun_ray.core.training.labels import Scores
from corun_ray.service.pool.index import Head
from corun_ray.service.pool.review import Review, ReviewFile, find_rejections, read_decisions
from corun_ray.service.pool.review_app import TOKEN_HEADER, LabelImages, ReviewApp, listen
from corun_ray.service.storage import StorageError, locate
from tests import ROOT
from tests.conftest import heeding_ctrl_c
from tests.service.jobs import small_job
from tests.service.labels import label
from tests.service.pool.test_summary import save_pool
from tests.service.report.test_page import CHROMIUM

KEYS = ["town/good.png", "bad.png", "so <b> so.png"]
SCORES = [(0.9, 0.8), (0.2, 0.3), (0.5, 0.5)]


def head(key="a", clarity=0.1 + 0.2, quality=0.5, step=3):
    return Head(key, Scores(clarity, quality), step, 100)


@pytest.fixture
def pool(tmp_path):
    return locate(str(tmp_path / "run" / "pool"))


# --- Decisions ---


def test_a_decision_is_about_one_label_and_may_be_taken_back(pool):
    review = Review(pool)
    assert read_decisions(pool) == {} and not review.place.exists()
    review.decide(head(), "reject")
    review.decide(head("b"), "keep")
    again = Review(pool)
    assert [again.get_choice(head(key)) for key in "abc"] == ["reject", "keep", "undecided"]
    assert again.get_choice(head(step=4)) == again.get_choice(head(quality=0.6)) == "undecided"
    assert find_rejections(read_decisions(pool)) == {"a": (0.1 + 0.2, 0.5)}, "to the last bit"
    review.decide(head(), "undecided")
    assert find_rejections(read_decisions(pool)) == {}


def test_two_reviewers_do_not_lose_each_others_decisions(pool):
    one, other = Review(pool), Review(pool)
    one.decide(head("a"), "reject")
    other.decide(head("b"), "reject")
    other.decide(head("a"), "keep")
    one.decide(head("c"), "keep")
    one.refresh()
    assert [one.get_choice(head(key)) for key in "abc"] == ["keep", "reject", "keep"]


def test_a_clock_that_is_behind_does_not_lose_a_decision(pool):
    review = Review(pool)
    review.decide(head(), "reject")
    ahead = read_decisions(pool)["a"]
    ahead = ahead.model_copy(update={"time": ahead.time + timedelta(hours=1)})
    pool.child("review/other.json").write(ReviewFile(decisions=(ahead,)).model_dump_json().encode())
    review.refresh()
    review.decide(head(), "undecided")
    assert Review(pool).get_choice(head()) == "undecided"


def test_a_decision_that_cannot_be_saved_is_none(pool, monkeypatch):
    review = Review(pool)
    pool.child("review").write(b"a file is in the way")
    with pytest.raises(StorageError, match="cannot write"):
        review.decide(head(), "reject")
    assert review.get_choice(head()) == "undecided"


def test_a_damaged_review_is_one_line(pool):
    pool.child("review/x.json").write(b'{"format": 1, "decisions": [{"key": "a"}]}')
    pool.child("review/.part.part").write(b"half of a file")
    with pytest.raises(StorageError, match="review/x.json is no review of a label pool: decisions.0.clarity") as error:
        read_decisions(pool)
    assert "\n" not in str(error.value)


# --- The app ---


def make_run(folder):
    """A run of three labels, with its job and hazy images."""
    labels = [
        label(key, *scores, step=5 * number) for number, (key, scores) in enumerate(zip(KEYS, SCORES, strict=True))
    ]
    save_pool(locate(str(folder / "run" / "pool")), 20, labels)
    for key in KEYS[:2]:
        locate(str(folder / "hazy")).child(key).write(encode_png(np.full((16, 16, 3), 200, np.uint8)))
    (folder / "run" / "job.yaml").write_text(dump_job(small_job("colabator", folder, folder)))
    return folder / "run"


@pytest.fixture
def app(tmp_path):
    run = make_run(tmp_path)
    return ReviewApp(str(run), LabelImages("addition", str(tmp_path / "hazy")))


@pytest.fixture
def client(app):
    return TestClient(app.build(), base_url="http://127.0.0.1:8000")


def token_of(client):
    return {TOKEN_HEADER: re.search(r'TOKEN = "([^"]+)"', client.get("/").text)[1]}


def test_the_labels_and_their_pictures(client):
    listed = client.get("/labels").json()
    assert listed["step"] == 20 and [one["key"] for one in listed["labels"]] == KEYS
    good, _, lost = listed["labels"]
    assert (good["clarity"], good["quality"], good["step"], good["choice"]) == (0.9, 0.8, 0, "undecided")
    assert good["trust"] == pytest.approx(0.85)
    assert client.get(f"/labels/{good['id']}").json() == {"height_px": 8, "width_px": 8, "trust_mean": 0.5}
    for picture, start in {
        "hazy": b"\x89PNG",
        "label": b"\x89PNG",
        "trust": b"\x89PNG",
        "thumbnail": b"\xff\xd8",
    }.items():
        assert client.get(f"/labels/{good['id']}/{picture}").content.startswith(start)
    gone = client.get(f"/labels/{lost['id']}/hazy")
    assert gone.status_code == 503 and "cannot read" in gone.json()["error"]
    assert client.get(f"/labels/{good['id']}/other").status_code == client.get("/labels/none/label").status_code == 404


def test_a_decision_is_saved_and_shown(client, app):
    token, bad = token_of(client), client.get("/labels").json()["labels"][1]
    own = {**token, "Origin": "http://127.0.0.1:8000"}
    assert client.post("/decisions", headers=own, json={"id": bad["id"], "choice": "reject"}).status_code == 200
    assert find_rejections(read_decisions(app.pool.pool)) == {"bad.png": (0.2, 0.3)}
    assert client.get("/labels").json()["labels"][1]["choice"] == "reject" and app.count_choices()["reject"] == 1


def test_only_the_page_itself_decides(client, app):
    token, body = token_of(client), {"id": client.get("/labels").json()["labels"][0]["id"], "choice": "reject"}
    for headers in (
        {},
        {TOKEN_HEADER: "ä".encode()},
        {**token, "Origin": "http://elsewhere"},
        {**token, "Origin": "null"},
    ):
        assert client.post("/decisions", headers=headers, json=body).status_code == 403
    assert client.get("/labels", headers={"Host": "elsewhere.example:8000"}).status_code == 400
    for content, status in ((b"{}", 400), (b'{"id": "x", "choice": "keep"}', 404), (b"x" * 2000, 413)):
        assert client.post("/decisions", headers=token, content=content).status_code == status
    assert read_decisions(app.pool.pool) == {}


def test_a_run_that_went_on_shows_its_new_labels(client, app):
    token, old = token_of(client), client.get("/labels").json()["labels"]
    save_pool(app.pool.pool, 30, [label(KEYS[0], *SCORES[0], step=0), label(KEYS[1], 0.6, 0.6, step=25)])
    new = client.get("/labels").json()["labels"]
    assert new[0]["id"] == old[0]["id"] and new[1]["id"] != old[1]["id"]
    stale = client.post("/decisions", headers=token, json={"id": old[1]["id"], "choice": "reject"})
    assert stale.status_code == 404 and "no longer in the run's last checkpoint" in stale.json()["error"]


def test_a_port_that_is_taken_is_one_line():
    with listen(0) as door, pytest.raises(StorageError, match="cannot listen at 127.0.0.1:.* in use") as error:
        listen(door.getsockname()[1])
    assert "\n" not in str(error.value)


# --- The command, in a browser ---


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[str, ReviewApp]]:
    """The command's address, and a view of what it saves. It ends by Ctrl-C with exit code 0."""
    run = make_run(tmp_path_factory.mktemp("review"))
    command = [sys.executable, "-m", "corun_ray", "pool", "review", str(run), "--no-open"]
    with heeding_ctrl_c():
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = []
    while "Ctrl-C" not in "".join(lines):
        lines.append(process.stdout.readline())
        assert lines[-1], process.stderr.read()
    address = re.search(r"http://127\.0\.0\.1:\d+/", "".join(lines))[0]
    yield address, ReviewApp(str(run), LabelImages("addition", None))

    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "") and "done: " in out


@pytest.fixture(params=[(1200, 900), (390, 844)], ids=["desktop", "phone"])
def page(request, served) -> Iterator[Page]:
    """The page in a browser that reports no error and asks for nothing elsewhere."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    width, height = request.param
    asked, problems = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page(viewport={"width": width, "height": height}, has_touch=width < 500)
        page.on("request", lambda one: asked.append(one.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto(served[0])
        yield page
        browser.close()
    # One label has no hazy image: that a request failed is the browser's own line.
    assert [text for text in problems if "status of 503" not in text] == []
    assert all(url.startswith((served[0], "data:")) for url in asked)


def read_choices(served):
    app = served[1]
    app.review.refresh()
    return app.count_choices()


def test_a_person_reviews_the_labels(page, served):
    said, key = page.locator("#said"), page.locator("#key")
    expect(said).to_have_text("1 of 3 · 0 kept, 0 rejected, 3 undecided")
    expect(key).to_have_text("bad.png")
    expect(page.locator("#clarity")).to_have_text("0.2000")
    expect(page.locator("#mean")).to_have_text("0.5000")
    for picture in ("hazy", "label", "trust"):
        assert page.locator(f"#{picture}").evaluate("image => image.decode().then(() => image.naturalWidth)") == 8
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    # Reject the worst, keep the next by its button, look at the last, and come back.
    page.keyboard.press("r")
    expect(key).to_have_text("so <b> so.png")
    expect(page.locator("#hazy-error")).to_contain_text("cannot read")
    page.get_by_role("button", name="Keep").click()
    expect(key).to_have_text("town/good.png")
    expect(said).to_have_text("1 of 1 · 1 kept, 1 rejected, 1 undecided")
    assert read_choices(served) == {"keep": 1, "reject": 1, "undecided": 1}
    page.locator("#filter").select_option("all")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(key).to_have_text("town/good.png")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#choice")).to_have_text("kept")
    page.locator("#strip button").first.click()
    expect(page.locator("#choice")).to_have_text("rejected")

    # Take both decisions back, the last first.
    page.keyboard.press("u")
    expect(key).to_have_text("so <b> so.png")
    page.keyboard.press("U")
    expect(key).to_have_text("bad.png")
    expect(page.locator("#choice")).to_have_text("undecided")
    assert read_choices(served) == {"undecided": 3}

    # A decision that is not saved is said, and not shown.
    page.route("**/decisions", lambda route: route.fulfill(status=503, body=json.dumps({"error": "the disk is full"})))
    page.keyboard.press("r")
    expect(page.locator("#error")).to_have_text("Not saved: the disk is full")
    expect(page.locator("#key")).to_have_text("bad.png")
    assert read_choices(served) == {"undecided": 3}


def test_the_page_stands_alone(served):
    text = urllib.request.urlopen(served[0]).read().decode()
    assert re.findall(r"""(?:src|href)\s*=\s*["']([^"']+)""", text) == ["data:,"]
