"""A replica's work on a batch: groups of one size, where a failure affects one group alone."""

import numpy as np
import ray
import torch

from corun_ray.core.inference.restore import restore, to_image, to_tensor
from corun_ray.core.networks.corun import CORUN
from corun_ray.core.networks.spec import NetworkSpec
from corun_ray.service.models.sources import Model
from corun_ray.service.serve.replica import Replica, ReplicaOptions
from corun_ray.service.serve.uploads import Refusal
from tests.conftest import photograph


def test_a_batch_is_as_its_images_one_by_one_and_what_fails_leaves_the_rest_alone(local_ray):
    torch.manual_seed(0)
    network = CORUN(2, 4)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model = Model(NetworkSpec("corun", {"stages": 2, "width": 4}), network.state_dict(), {})
    threads = torch.get_num_threads()
    try:
        options = ReplicaOptions(threads=1, memory_mib=None, gpu_share=0.0, max_batch=8, batch_wait_s=0.0)
        replica = Replica({"model": ray.put(model)}, options)
        rng = np.random.default_rng(0)
        images = [photograph(rng, *size) for size in [(40, 64), (32, 32), (40, 64), (12, 64), (40, 64), (48, 48)]]
        images[2] = images[2].astype(np.uint16) * 257

        def fails(module, inputs):
            assert inputs[0].shape[-2:] != (48, 48)

        replica.networks["model"].register_forward_pre_hook(fails)
        outcomes = replica._restore_all(images)
        assert [outcome.status for outcome in outcomes if isinstance(outcome, Refusal)] == [422, 500]
        for position, batch in ((0, 3), (1, 1), (2, 3), (4, 3)):
            pixels, together, _ = outcomes[position]
            alone = to_image(restore(model.build().eval(), to_tensor(images[position])).scene, images[position].dtype)
            assert together == batch and pixels.dtype == images[position].dtype
            assert np.abs(pixels.astype(int) - alone).max() <= (1 if pixels.dtype == np.uint8 else 4)
    finally:
        torch.set_num_threads(threads)
