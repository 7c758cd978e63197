"""The cache of decoded images: the same samples, within its budget, and what happens when its actors die."""

import shutil
import time

import numpy as np
import pytest
import ray
from ray.exceptions import RayActorError

from corun_ray.core.data.depth import DepthMap
from corun_ray.service.data.cache import MIB, CacheView, JobCaches, NodeCache, start_cache
from corun_ray.service.data.manifest import build_manifest
from corun_ray.service.data.sample_maker import SampleMaker
from corun_ray.service.data.stream import StreamTask, iterate_batches, plan_remaining_phases, split_stream
from corun_ray.service.train.board import start_board
from tests.service.jobs import small_job
from tests.service.samples import assert_same_samples

INDICES = {"id": np.arange(12)}
"""Each of the dataset's images at least once."""


def ignore(bad_files):
    raise AssertionError(f"unexpected bad files: {bad_files}")


@pytest.fixture
def keeper(local_ray):
    keeper = start_cache(64, start_board())
    yield keeper
    ray.kill(keeper)


def view_of(keeper):
    """What a process of its own would see: all that the cache holds."""
    view, deadline_s = CacheView(keeper), time.monotonic() + 60
    while view._cache is None:
        view.refresh()
        assert time.monotonic() < deadline_s
    held = ray.get(view._cache.list_since.remote(0)).entries
    while len(view._known) < len(held):
        view.refresh()
    return view


def cached(job, keeper, report_bad=ignore):
    return SampleMaker(job, build_manifest(job), 32, report_bad, view_of(keeper))


def fill(job, keeper):
    """A maker whose cache has been offered everything and has taken it."""
    maker, num_known = cached(job, keeper), -1
    while len(maker.cache._known) > num_known:
        num_known = len(maker.cache._known)
        maker(INDICES)
        ray.get(maker.cache._pending_offers)
        maker.cache.refresh()
    return maker


def without_files(monkeypatch):
    def read(*arguments):
        raise AssertionError(f"read {arguments[1:]}")

    monkeypatch.setattr("corun_ray.service.data.manifest.Manifest.read_image", read)
    monkeypatch.setattr("corun_ray.service.data.manifest.Manifest.read_depth", read)


@pytest.mark.parametrize(
    "data",
    [{}, {"depth": None}, {"paired": True}, {"synthesis": "worker"}],
    ids=["depth", "procedural", "paired", "drawn"],
)
def test_the_same_samples_without_reading_a_file_again(keeper, dataset, tmp_path, monkeypatch, data):
    if "paired" in data:
        data = {"paired": {"hazy": str(dataset / "hazy"), "clear": str(dataset / "hazy_truth")}}
    job = small_job("colabator", dataset, tmp_path, data=data)
    decoded = SampleMaker(job, build_manifest(job), 32, ignore)(INDICES)
    fill(job, keeper)
    again = cached(job, keeper)
    without_files(monkeypatch)
    assert_same_samples(again(INDICES), decoded)


def test_a_depth_map_comes_back_with_its_scale(keeper):
    view = view_of(keeper)
    depth = DepthMap.from_pixels(np.asfortranarray(np.arange(12, dtype=np.uint16).reshape(3, 4)), "metres")
    view.get("a", lambda: depth)
    ray.get(view._pending_offers)
    view.refresh()
    again = view.get("a", pytest.fail)
    assert (again.kind, again.low, again.high) == ("metres", 1, 11)
    assert np.array_equal(again.pixels, depth.pixels) and again.pixels.dtype == np.uint16


def test_what_is_in_stays_in_and_the_first_that_does_not_fit_is_the_last(local_ray):
    cache = ray.remote(NodeCache).remote(2500)
    for key in "aabcd":
        cache.offer.remote(key, np.zeros(1000 if key != "d" else 10, np.uint8))
    entries, has_room = ray.get(cache.list_since.remote(0))
    assert [key for key, _ in entries] == ["a", "b"] and not has_room
    assert [key for key, _ in ray.get(cache.list_since.remote(1)).entries] == ["b"]


def test_a_full_cache_leaves_the_rest_to_decoding(local_ray, dataset, tmp_path):
    job = small_job("pretrain", dataset, tmp_path)
    decoded = SampleMaker(job, build_manifest(job), 32, ignore)(INDICES)
    view = CacheView(None)
    view._cache = ray.remote(NodeCache).remote(100_000)
    maker = SampleMaker(job, build_manifest(job), 32, ignore, view)
    for _ in range(10):
        assert_same_samples(maker(INDICES), decoded)
        view.refresh()
    assert 1 <= len(view._known) < 16 and not view._has_room


def test_a_node_gives_at_most_half_its_object_store(local_ray):
    board = start_board()
    (node,) = ray.nodes()
    half_mib = int(node["Resources"]["object_store_memory"] / 2) // MIB
    for cache_mib, expected in (
        (half_mib, []),
        (half_mib + 1, [f"data.cache_mib: only {half_mib} MiB fit on some node"]),
    ):
        ray.kill(start_cache(cache_mib, board))
        assert [note.partition(",")[0] for note in ray.get(board.take_events.remote()).notes] == expected


@pytest.mark.parametrize("victim", ["cache", "keeper"])
def test_a_cache_that_dies_costs_decoding_and_is_made_anew(keeper, dataset, tmp_path, victim):
    job = small_job("pretrain", dataset, tmp_path)
    decoded = SampleMaker(job, build_manifest(job), 32, ignore)(INDICES)
    maker = fill(job, keeper)
    dead = maker.cache._cache
    ray.kill(dead if victim == "cache" else keeper, no_restart=victim == "cache")
    deadline_s = time.monotonic() + 60
    while len(maker.cache._known) < 16 or maker.cache._cache == dead:
        maker.cache.refresh()
        assert_same_samples(maker(INDICES), decoded)
        assert time.monotonic() < deadline_s


def test_an_unusable_image_is_named_each_time_and_not_kept(keeper, dataset, tmp_path):
    data = shutil.copytree(dataset, tmp_path / "data")
    (data / "clear" / "view_3.png").write_text("not a picture")
    job = small_job("pretrain", data, tmp_path)
    bad: dict[str, str] = {}
    for _ in range(2):
        bad.clear()
        maker = cached(job, keeper, bad.update)
        maker(INDICES)
        assert list(bad) == [str(data / "clear" / "view_3.png")]
        assert ("view_3.png", None) not in [key for _, _, key in maker.cache._known]


def test_the_stream_is_the_same_with_a_cache(keeper, dataset, tmp_path):
    job = small_job("colabator", dataset, tmp_path, train={"steps": 40, "batch_per_worker": 2})
    ((phase, layout),) = plan_remaining_phases(job, 0, 0, 1)
    board, manifest = start_board(), ray.put(build_manifest(job))
    # The node's cache is up before the stream begins: so short a stream could end first, on a busy machine.
    here = ray.get_runtime_context().get_node_id()
    cache = ray.get(keeper.get_cache.remote(here, None))
    assert ray.get(cache.list_since.remote(0)).entries == []
    clear, depth = str(dataset / "clear"), str(dataset / "depth")
    wanted = {(clear, ("view_0.png", None)), (depth, ("view_0.npy", "inverse"))}

    def stream(cache):
        task = StreamTask(job, manifest, board, layout, phase.patch_px, cache=cache)
        return [*iterate_batches(split_stream(task)[0], layout, 0)]

    # A busy machine's cache turns offers away, so an image may be kept only by a later stream.
    plain, kept_keys = stream(None), set()
    for _ in range(5):
        for one, other in zip(plain, stream(keeper), strict=True):
            assert_same_samples(one, other)
        kept_keys = {(root, key) for (root, _, key), _ in ray.get(cache.list_since.remote(0)).entries}
        if wanted <= kept_keys:
            break
    assert wanted <= kept_keys


def test_jobs_of_one_file_share_a_cache_where_they_read_the_same_data(local_ray, dataset, tmp_path, monkeypatch):
    data = shutil.copytree(dataset, tmp_path / "data")
    first, third = (small_job("pretrain", data, tmp_path, data={"cache_mib": 64}) for _ in range(2))
    second = small_job("colabator", data, tmp_path, data={"cache_mib": 64})
    third = third.model_copy(update={"name": "third"})
    caches, board = JobCaches([first, second, third]), start_board()

    def start(job):
        return caches.start(job, build_manifest(job).versions, board)

    # The second job has all but its hazy photographs.
    keeper = start(first)
    fill(first, keeper)
    caches.finish_job()
    assert start(second) is keeper
    (note,) = ray.get(board.take_events.remote()).notes
    assert note == "data.cache_mib: 16 decoded images and maps of the job before are at hand"
    decoded = SampleMaker(second, build_manifest(second), 32, ignore)(INDICES)
    assert_same_samples(fill(second, keeper)(INDICES), decoded)

    # What the third reads has changed meanwhile, so its cache begins anew; the memory of the last is given back.
    caches.finish_job()
    (data / "clear" / "view_0.png").touch()
    last = start(third)
    assert last not in (None, keeper) and ray.get(last.get_state.remote()) == (0, True)
    assert_dead(keeper)
    caches.finish_job()
    assert_dead(last)


def assert_dead(keeper):
    """Fail unless the keeper's end, which Ray carries out in its own time, comes within 30 s."""
    with pytest.raises(RayActorError):
        for _ in range(300):
            ray.get(keeper.get_state.remote(), timeout=30)
            time.sleep(0.1)


def test_a_cache_ends_with_its_job_where_the_next_has_no_use_for_it(local_ray, dataset, tmp_path):
    job = small_job("pretrain", dataset, tmp_path, data={"cache_mib": 8})

    def later(**data):
        section = job.data.model_copy(update=data)
        return job.model_copy(update={"name": "later", "data": section})

    for other, is_kept in [
        (later(), True),
        (later(cache_mib=9), False),
        (later(clear="elsewhere", depth=None), False),
        (later(cache_mib=0), False),
    ]:
        caches = JobCaches([job, other])
        keeper = caches.start(job, {job.data.clear: "1"}, start_board())
        caches.finish_job()
        if is_kept:
            assert ray.get(keeper.get_state.remote()) == (0, True)
            caches.close()
        assert_dead(keeper)


def test_no_cache_unless_asked_for():
    assert start_cache(0, None) is None
