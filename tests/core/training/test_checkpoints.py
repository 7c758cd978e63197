"""Checkpoints: the published format in and out, what is refused, and runs that resume where they stopped."""

import argparse
import copy
import math
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from corun_ray.core.networks.build import build_network
from corun_ray.core.networks.corun import CORUN
from corun_ray.core.networks.spec import NetworkSpec
from corun_ray.core.training.checkpoint_record import NETWORK_FILE, SPEC_FILE, TRAINING_FILE, CheckpointError
from corun_ray.core.training.checkpoints import (
    MODEL_FILE,
    LoadedNetwork,
    load_network,
    load_params,
    load_run,
    read_spec,
    save_model,
    save_network,
    save_run,
)
from corun_ray.core.training.divergence import Diverged
from corun_ray.core.training.state import TrainState
from corun_ray.core.weights import read_tensors, write_tensors
from tests.core.golden import golden_shapes, golden_state_dict

NAFNET = NetworkSpec("NAFNet", {"width": 8, "middle_blk_num": 1, "enc_blk_nums": [1], "dec_blk_nums": [1]})


def random_network(stages: int = 2, width: int = 2, seed: int = 0) -> CORUN:
    """A network in which no two weights are alike, the output layers included."""
    generator = torch.Generator().manual_seed(seed)
    network = CORUN(stages, width)
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return network


def assert_equal_weights(ours: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(ours.state_dict(), expected.state_dict(), rtol=0, atol=0)


def train(state: TrainState, steps: int) -> None:
    """Steps on pairs that follow from the step's number alone."""
    for _ in range(steps):
        generator = torch.Generator().manual_seed(state.step)
        hazy, clear = torch.rand(2, 1, 3, 16, 16, generator=generator)
        scene, transmission = state.student(hazy)
        losses = {"pixel": (scene - clear).abs().mean(), "transmission": transmission.mean()}
        state.backward(losses)
        state.update(lr=1e-3, ema=0.9, batch_images=1)


def error_line(path: Path) -> str:
    """The one line in which `path` is refused; it starts with the file's name."""
    with pytest.raises(CheckpointError) as caught:
        load_network(path)
    line = str(caught.value)
    assert "\n" not in line and len(line) < len(str(path)) + 500
    assert line.startswith(f"{path}: ")
    return line.removeprefix(f"{path}: ")


def corun_spec(stages: int = 2, width: int = 2) -> NetworkSpec:
    return NetworkSpec("corun", {"stages": stages, "width": width})


@pytest.mark.parametrize(("stages", "width"), [(2, 6), (3, 4), (4, 2)])
def test_stages_and_width_follow_from_the_file(tmp_path: Path, stages: int, width: int) -> None:
    student, teacher = random_network(stages, width), random_network(stages, width, seed=1)
    save_network(tmp_path / "a.pth", student, teacher)
    loaded = load_network(tmp_path / "a.pth")
    assert loaded.spec == corun_spec(stages, width)
    assert not loaded.network.training
    assert_equal_weights(loaded.network, teacher)


def test_the_saved_file_is_the_published_format(tmp_path: Path) -> None:
    student, teacher = random_network(), random_network(seed=1)
    save_network(tmp_path / "a.pth", student, teacher)
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    assert list(content) == ["params", "params_ema"]
    torch.testing.assert_close(content["params"], dict(student.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(content["params_ema"], dict(teacher.state_dict()), rtol=0, atol=0)


def test_a_published_checkpoint_of_three_stages_is_trained_and_exported_under_its_own_names(tmp_path: Path) -> None:
    # Of the two middle stages of the published four, three stages have the first.
    shapes = {name: shape for name, shape in golden_shapes(4).items() if not name.startswith("basic.1.")}
    assert sum(name.startswith("basic.0.") for name in shapes) > 100
    weights = golden_state_dict(shapes)
    torch.save({"params": weights, "params_ema": weights}, tmp_path / "published.pth")
    loaded = load_network(tmp_path / "published.pth")
    assert loaded.spec == corun_spec(3, 30)

    state = TrainState.start(loaded.network)
    train(state, 1)
    save_run(tmp_path, state, loaded.spec, {})
    content = torch.load(tmp_path / NETWORK_FILE, weights_only=True)
    assert list(content) == ["params", "params_ema"]
    for params in content.values():
        assert {name: tuple(tensor.shape) for name, tensor in params.items()} == shapes
        assert all(tensor.dtype == torch.float32 for tensor in params.values())
    assert not torch.equal(
        content["params"]["last.dehaze_net.mapping.weight"], weights["last.dehaze_net.mapping.weight"]
    )


def test_half_precision_is_loaded_as_float32(tmp_path: Path) -> None:
    network = random_network()
    save_model(tmp_path, LoadedNetwork(copy.deepcopy(network).half(), corun_spec()))
    with safe_open(tmp_path / MODEL_FILE, framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118

    # A folder, a bare file, and parameters for a network that is there.
    for path in (tmp_path, tmp_path / MODEL_FILE):
        for params in (load_network(path).network.state_dict(), load_params(path, network)):
            assert all(tensor.dtype == torch.float32 for tensor in params.values())
            torch.testing.assert_close(params, dict(network.state_dict()), rtol=1e-3, atol=1e-6)


def wrappings(params: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {
        "plain": params,
        "both": {"params": other, "params_ema": params},
        "student only": {"params": params},
        "average only": {"params_ema": params},
        "other name": {"epoch": 3, "netG": params, "optimizer": {"state": {"a": {"exp_avg": torch.ones(1)}}}},
        "other names": {"checkpoint": {"generator": params}},
        "state_dict": {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in params.items()}},
    }


@pytest.mark.parametrize("wrapping", wrappings({}, {}))
@pytest.mark.parametrize("spec", [corun_spec(), NAFNET], ids=lambda spec: spec.type)
def test_the_state_dict_is_found_in_its_wrapping(tmp_path: Path, wrapping: str, spec: NetworkSpec) -> None:
    network, other = build_network(spec), build_network(spec)
    torch.save(wrappings(network.state_dict(), other.state_dict())[wrapping], tmp_path / "a.pth")
    loaded = load_network(tmp_path / "a.pth")
    assert loaded.spec.type == spec.type and spec.args.items() <= loaded.spec.args.items()
    assert_equal_weights(loaded.network, network)
    torch.testing.assert_close(load_params(tmp_path / "a.pth", other), dict(network.state_dict()), rtol=0, atol=0)


def test_safetensors_are_read_as_well(tmp_path: Path) -> None:
    network = build_network(NAFNET)
    save_file(network.state_dict(), tmp_path / "nafnet.safetensors")
    assert_equal_weights(load_network(tmp_path / "nafnet.safetensors").network, network)


class Brighten(nn.Module):
    """A user's own network."""

    def __init__(self, start: float = 1.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(start))

    def forward(self, hazy: Tensor) -> Tensor:
        return self.gain * hazy


BRIGHTEN = NetworkSpec(f"{__name__}:Brighten", {"start": 2.0})


@pytest.mark.parametrize("spec", [BRIGHTEN, NAFNET], ids=["own", "spandrel"])
def test_a_run_of_any_network_goes_on_and_is_a_model(tmp_path: Path, spec: NetworkSpec) -> None:
    state = TrainState.start(build_network(spec))
    hazy = torch.rand(1, 3, 16, 16)
    state.backward({"brightness": state.student(hazy).square().mean()})
    state.update(lr=1e-2, ema=0.9, batch_images=1)
    save_run(tmp_path, state, spec, {"seed": 7})
    assert read_spec(tmp_path) == spec
    loaded = load_network(tmp_path)
    assert loaded.spec == spec
    assert_equal_weights(loaded.network, state.teacher)
    assert any(
        not torch.equal(a, b) for a, b in zip(loaded.network.parameters(), state.student.parameters(), strict=True)
    )

    resumed = TrainState.start(build_network(spec))
    assert load_run(tmp_path, resumed, spec) == {"seed": 7}
    assert_equal_weights(resumed.student, state.student)


def test_a_bare_file_of_a_users_own_class_needs_its_type(tmp_path: Path) -> None:
    network = build_network(BRIGHTEN)
    save_network(tmp_path / "own.pth", network, network)
    assert "a network of your own needs its type (module.path:ClassName)" in error_line(tmp_path / "own.pth")
    params = load_params(tmp_path / "own.pth", Brighten())
    assert params["gain"] == 2.0


def test_parameters_of_another_network_are_one_line(tmp_path: Path) -> None:
    torch.save(build_network(NAFNET).state_dict(), tmp_path / "a.pth")
    wider = build_network(NetworkSpec("NAFNet", {**NAFNET.args, "width": 16}))
    with pytest.raises(CheckpointError) as caught:
        load_params(tmp_path / "a.pth", wider)
    line = str(caught.value)
    assert "does not fit NAFNet: " in line and "tensors of another shape (" in line and "instead of" in line
    assert line.count("instead of") == 3 and line.endswith(", ...)") and "\n" not in line
    with pytest.raises(CheckpointError, match=r"fit Brighten: 1 tensors missing \(gain\), \d+ tensors unexpected \("):
        load_params(tmp_path / "a.pth", Brighten())


def test_no_file_and_no_checkpoint(tmp_path: Path) -> None:
    assert error_line(tmp_path / "none.pth") == "no such file"
    with pytest.raises(CheckpointError, match=f"no checkpoint folder .no {SPEC_FILE} in it"):
        load_network(tmp_path)
    whole = tmp_path / "whole.pth"
    save_network(whole, random_network(), random_network())
    content = whole.read_bytes()
    for number, data in enumerate([b"no checkpoint\0", bytes(range(256)) * 9]):
        path = tmp_path / f"{number}.pth"
        path.write_bytes(data)
        assert error_line(path).startswith("not a file of plain tensors (")
    whole.write_bytes(content[: len(content) // 2])
    assert error_line(whole).startswith("not whole: the end of the file is missing")
    (tmp_path / SPEC_FILE).write_text(corun_spec().to_json())
    with pytest.raises(CheckpointError, match=f"{NETWORK_FILE}: no such file"):
        load_network(tmp_path)
    (tmp_path / SPEC_FILE).write_text("{}")
    with pytest.raises(CheckpointError, match=f"{SPEC_FILE}: not a network's description"):
        load_network(tmp_path)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "net.", "a.b.module."])
@pytest.mark.parametrize("spec", [corun_spec(), NAFNET, BRIGHTEN], ids=["corun", "spandrel", "own"])
def test_parts_that_all_names_begin_with_are_left_out(tmp_path: Path, prefix: str, spec: NetworkSpec) -> None:
    network = build_network(spec)
    state = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    torch.save({"state_dict": state, "epoch": np.int64(3), "best": np.float32(0.5)}, tmp_path / NETWORK_FILE)

    params = load_params(tmp_path / NETWORK_FILE, build_network(spec))
    for name, tensor in network.state_dict().items():
        assert torch.equal(params[name], tensor)

    # A folder knows its network; a bare file only of those that can be recognised.
    if spec != BRIGHTEN:
        assert_equal_weights(load_network(tmp_path / NETWORK_FILE).network, network)
    (tmp_path / SPEC_FILE).write_text(spec.to_json())
    assert_equal_weights(load_network(tmp_path).network, network)


class Wrapped(nn.Module):
    """A user's own network, all of whose names begin alike."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Brighten()

    def forward(self, hazy: Tensor) -> Tensor:
        return self.net(hazy)


def test_a_part_that_the_network_itself_has_stays(tmp_path: Path) -> None:
    torch.save({"module." + name: tensor for name, tensor in Wrapped().state_dict().items()}, tmp_path / "a.pth")
    assert list(load_params(tmp_path / "a.pth", Wrapped())) == ["net.gain"]


def test_the_own_numbers_of_an_average_are_left_out(tmp_path: Path) -> None:
    network = random_network()
    average = torch.optim.swa_utils.AveragedModel(network)
    torch.save(average.state_dict(), tmp_path / "a.pth")
    assert "n_averaged" in torch.load(tmp_path / "a.pth", weights_only=True)
    assert_equal_weights(load_network(tmp_path / "a.pth").network, network)


def test_what_stands_beside_the_tensors_is_left_out(tmp_path: Path) -> None:
    network = random_network()
    state: dict[str, Any] = dict(network.state_dict())
    state |= {"total_ops": torch.zeros(1), "total_params": torch.zeros(1), "first.total_ops": torch.zeros(1)}
    state |= {"epoch": 3, "name": "corun", "best": np.float64(0.5), "when": None}
    state["last.dehaze_prox.step_lambda"] = state["last.dehaze_prox.step_lambda"].numpy()
    options = {"args": argparse.Namespace(lr=1e-4), "path": Path("runs"), "curve": np.zeros(3)}
    torch.save({"model": {"state_dict": state}, **options}, tmp_path / "a.pth")
    assert_equal_weights(load_network(tmp_path / "a.pth").network, network)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_wherever_they_are_loaded(tmp_path: Path, value: float) -> None:
    name = "last.dehaze_prox.step_lambda"
    state = TrainState.start(CORUN(2, 2))
    run = tmp_path / "run"
    run.mkdir()
    save_run(run, state, corun_spec(2, 2), {})

    # Published file, and the parameters of one.
    weights = state.teacher.state_dict()
    torch.save({"params": {**weights, name: torch.full_like(weights[name], value)}}, tmp_path / "a.pth")
    expected = f"{name} is {value}, not finite: its training has diverged; take an earlier checkpoint"
    assert error_line(tmp_path / "a.pth") == expected
    with pytest.raises(CheckpointError, match="not finite"):
        load_params(tmp_path / "a.pth", CORUN(2, 2))

    # A run's folder, written by a version that did not look.
    tensors, record = read_tensors(run / TRAINING_FILE)
    tensors[f"teacher.{name}"] = torch.full_like(weights[name], value)
    write_tensors(run / TRAINING_FILE, tensors, record)
    with pytest.raises(CheckpointError, match="not finite"):
        load_run(run, state, corun_spec(2, 2))

    # None is written.
    with torch.no_grad():
        state.student.get_parameter(name).fill_(value)
    before = (run / NETWORK_FILE).read_bytes()
    with pytest.raises(Diverged, match=f"^step 0: the weight student.{name} is {value}, not finite$"):
        save_run(run, state, corun_spec(2, 2), {})
    assert (run / NETWORK_FILE).read_bytes() == before


class Masked(Brighten):
    """A user's own network with a mask, as attention has them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))


def test_an_infinite_buffer_may_be_a_mask(tmp_path: Path) -> None:
    torch.save(Masked().state_dict(), tmp_path / "a.pth")
    assert load_params(tmp_path / "a.pth", Masked())["mask"].tolist() == [0.0, -math.inf]


class Intruder:
    """Unpickling this makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path) -> None:
    mark, weights = tmp_path / "mark", random_network().state_dict()
    plain, zipped = tmp_path / "plain.pth", tmp_path / "zipped.pth"
    plain.write_bytes(pickle.dumps({"params_ema": Intruder(mark)}, protocol=2))
    torch.save({"params": weights, "params_ema": weights, "extra": Intruder(mark)}, zipped)
    for path in (plain, zipped):
        assert error_line(path).startswith("holds objects of the class mkdir, which are code; save its state dict")
        assert not mark.exists()
    pickle.loads(plain.read_bytes())
    assert mark.exists()  # so the file was a real trap


WEIGHTS = CORUN(2, 2).state_dict()
EMBEDDING = "first.trans_net.embedding.weight"
MISFITS: dict[str, dict[str, Any]] = {
    "a tensor is missing": {name: w for name, w in WEIGHTS.items() if name != "last.dehaze_prox.step_lambda"},
    "a tensor is too many": WEIGHTS | {"last.bias": torch.ones(1)},
    "another shape": WEIGHTS | {"last.dehaze_net.mapping.weight": torch.ones(3, 4, 3, 3)},
    "a stage is missing": WEIGHTS | {"basic.1.trans_prox.step_lambda": torch.ones(1)},
    "an odd width": WEIGHTS | {EMBEDDING: torch.ones(3, 4, 3, 3)},
    "a stage that is no number": WEIGHTS | {"basic.one.trans_prox.step_lambda": torch.ones(1)},
    "a value that is no tensor": WEIGHTS | {"last.dehaze_prox.step_lambda": 0.5},
    "an embedding that is no tensor": WEIGHTS | {EMBEDDING: [1.0]},
}


@pytest.mark.parametrize("what", MISFITS)
def test_tensors_that_do_not_fit_are_one_line(tmp_path: Path, what: str) -> None:
    path = tmp_path / "a.pth"
    torch.save({"params": MISFITS[what], "params_ema": MISFITS[what]}, path)
    assert error_line(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([1, 2], "no state dict in it (plain, or under params_ema, "),
        ({}, "no state dict in it (plain, or under params_ema, "),
        (
            {"netG": {"a": torch.ones(1)}, "netD": {"a": torch.ones(1)}},
            "2 state dicts in it (netG, netD), none under a known name (params_ema, ",
        ),
        ({"params_ema": 3}, "no state dict in it (plain, or under params_ema, "),
        ({"params_ema": {"a": torch.ones(1)}}, "neither CORUN nor an architecture that spandrel recognises; "),
    ],
)
def test_other_contents_are_told_apart(tmp_path: Path, content: Any, expected: str) -> None:
    torch.save(content, tmp_path / "a.pth")
    assert error_line(tmp_path / "a.pth").startswith(expected)
