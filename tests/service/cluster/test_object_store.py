"""The size of the object store, where shared memory is small."""

import pytest

from corun_ray.service.cluster.object_store import MIB, choose_size, describe_store


@pytest.mark.parametrize(
    ("shm_mib", "disk_mib", "size_mib"),
    [(64, 100_000, 4096), (64, 2048, 1024), (3000, 2048, 3000), (0, 2048, 1024), (64, 10, 75)],
)
def test_a_store_has_no_more_than_its_place_holds_and_no_less_than_ray_takes(shm_mib, disk_mib, size_mib):
    assert choose_size(4096 * MIB, shm_mib * MIB, disk_mib * MIB) == size_mib * MIB


def test_ray_chooses_where_shared_memory_is_large_enough():
    assert choose_size(4096 * MIB, 5000 * MIB, 0) is None


def test_a_store_on_a_disk_is_told():
    assert describe_store(60 * MIB, 64 * MIB) == ""
    assert describe_store(1024 * MIB, 64 * MIB) == (
        ", its objects on the disk, as /dev/shm has 64 MiB (docker run --shm-size=8g)"
    )
