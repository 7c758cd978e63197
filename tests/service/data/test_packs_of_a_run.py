"""Packs on the local Ray: written by its tasks, and trained on."""

import shutil

import numpy as np
import pytest

from corun_ray.service.data.packing import pack, plan_pack, write_shard
from corun_ray.service.pool import snapshots
from corun_ray.service.pool.export import load_hazy_image
from corun_ray.service.storage import StorageError, locate
from tests.service.data.test_packs import opened, packed
from tests.service.scraping import log_lines


def test_tasks_on_the_cluster_write_what_this_process_would(local_ray, large):
    plan = plan_pack(str(large / "clear"), str(large / "pack"), str(large / "depth"), 2, False)
    told = []
    write_shard(plan, 0)
    result = pack(plan, {0}, lambda done, total: told.append((done, total)))
    assert result.images == 6 and told == [(2, 6), (4, 6), (6, 6)]
    packed(large / "clear", large / "alone", large / "depth", shard_mib=2)
    ours, theirs = opened(large / "pack"), opened(large / "alone")
    assert ours.images == theirs.images and ours.depths == theirs.depths
    shutil.rmtree(large / "clear")
    assert all(ours.read(place) for place in (*ours.images.values(), *ours.depths.values()))


def test_a_run_trains_on_packs_pictures_them_and_lists_a_damaged_image_that_it_tolerates(own_class, dataset):
    job, _, folder = own_class
    (run,) = (folder / "runs").glob("own-class-*")
    assert (run / "report.html").exists()
    assert (run / "bad_files.tsv").read_text().startswith(f"{folder}/clear/view_3.png\tnot an image")
    (line,) = log_lines(message="image set aside", image=f"{folder}/clear/view_3.png")
    assert line["levelname"] == "WARNING" and line["reason"].startswith("not an image") and line["job"] == job.name
    pool = locate(str(run / "pool"))
    keys = [*snapshots.read_index(pool, snapshots.read(pool.child(snapshots.format_name(8))))]
    assert keys
    for key in keys:
        roots = str(folder / "hazy"), str(dataset / "hazy")
        in_pack, in_folder = (load_hazy_image(root, key, 32, 32) for root in roots)
        assert np.array_equal(in_pack, in_folder)
    with pytest.raises(StorageError, match=r"the pack in .*hazy holds none"):
        load_hazy_image(str(folder / "hazy"), "another.png", 32, 32)
