"""What a job starts from: recognised files, parameters that do not fit, classes that are not there."""

import pytest
import torch

from corun_ray.core.networks.build import build_network
from corun_ray.core.networks.spec import NetworkSpec
from corun_ray.service.models.sources import ModelSourceError, fetch_model, load_starting_model
from tests.service.jobs import small_job

NAFNET = NetworkSpec("NAFNet", {"width": 8, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]})


@pytest.fixture
def published(tmp_path):
    """NAFNet as its authors publish it."""
    torch.manual_seed(0)
    path = tmp_path / "nafnet.pth"
    torch.save({"params": build_network(NAFNET).state_dict()}, path)
    return path


def test_a_file_that_spandrel_recognises_gives_network_and_parameters(published, dataset, tmp_path):
    job = small_job("pretrain", dataset, tmp_path, network={"type": "spandrel", "init": str(published)})
    model = load_starting_model(job, tmp_path)
    assert model.spec.type == "NAFNet" and model.spec.args["enc_blk_nums"] == [1, 1]
    reference = torch.load(published, weights_only=True)["params"]
    assert all(torch.equal(model.build().state_dict()[name], value) for name, value in reference.items())
    assert fetch_model(str(published), "").spec == model.spec


def test_a_named_network_takes_fitting_parameters_only(published, dataset, tmp_path):
    fitting = {"type": "NAFNet", "args": NAFNET.args, "init": str(published)}
    model = load_starting_model(small_job("pretrain", dataset, tmp_path, network=fitting), tmp_path)
    assert model.params is not None and model.spec == NAFNET
    other = small_job("pretrain", dataset, tmp_path, network={**fitting, "args": {**NAFNET.args, "width": 16}})
    with pytest.raises(ModelSourceError, match="network.init: .*does not fit NAFNet: .* of another shape"):
        load_starting_model(other, tmp_path)
    corun = small_job("pretrain", dataset, tmp_path, network={"init": str(published)})
    with pytest.raises(ModelSourceError, match="network.type: corun, but .* is a NAFNet"):
        load_starting_model(corun, tmp_path)


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ({"type": "spandrel"}, "network.init: missing"),
        ({"type": "nowhere_to_be_found:Net"}, "network: .*nowhere_to_be_found cannot be imported"),
        ({"type": "NAFNet", "args": {"colour": 3}}, "network: NAFNet refuses its args .*it takes"),
        ({"type": "SwinIR", "args": {"upscale": 2, "img_size": 32, "embed_dim": 12, "depths": [1], "num_heads": [1]}},
         "network: "),
        ({"type": "torch.nn:Identity"}, "network: it has no parameters to train"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_said_before_any_worker_starts(network, said, dataset, tmp_path):
    with pytest.raises(ModelSourceError, match=said):
        load_starting_model(small_job("pretrain", dataset, tmp_path, network=network), tmp_path)


def test_a_published_start_follows_from_the_seed(dataset, tmp_path):
    def start(seed, **network):
        job = small_job("pretrain", dataset, tmp_path, network=network).model_copy(update={"seed": seed})
        return load_starting_model(job, tmp_path).params

    # By default each run draws its own weights when its workers start, around the closed form.
    assert start(0) is None

    first, again, other = start(0, start="published"), start(0, start="published"), start(1, start="published")
    mapping = next(key for key in first if key.endswith("mapping.weight"))
    assert first[mapping].any() and torch.equal(first[mapping], again[mapping])
    assert not torch.equal(first[mapping], other[mapping])
