"""Which images of a batch go together."""

from corun_ray.service.serve.replica import group_by_size


def test_images_of_one_size_go_together_in_order():
    assert group_by_size(["a", "b", "a", "c", "b", "a"], lambda size: 10) == [[0, 2, 5], [1, 4], [3]]


def test_no_more_than_fit():
    assert group_by_size(["a"] * 5 + ["b"] * 3, {"a": 2, "b": 1}.__getitem__) == [[0, 1], [2, 3], [4], [5], [6], [7]]
    assert group_by_size([], lambda size: 1) == []
