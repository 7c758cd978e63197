"""What samples are compared by."""

import numpy as np
import torch

from corun_ray.core.data.device_samples import make_pairs
from corun_ray.service.data.sample_maker import PAIR, Batch


def assert_same_samples(ours: Batch, theirs: Batch) -> None:
    """Fails unless all columns are the same; pairs that are only drawn are compared by the pixels made of them."""
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {PAIR}:
        assert np.array_equal(ours[name], theirs[name]), name
    if PAIR in ours:
        some, others = (
            make_pairs(batch[PAIR].tolist(), torch.device("cpu"), with_transmission=True) for batch in (ours, theirs)
        )
        for one, other in zip(some, others, strict=True):
            assert one is not None and other is not None and torch.equal(one, other)
