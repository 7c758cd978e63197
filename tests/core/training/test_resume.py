"""A run's checkpoint folder: training resumes from it exactly, and without pickle."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from corun_ray.core.networks.corun import CORUN
from corun_ray.core.networks.spec import NetworkSpec
from corun_ray.core.training import checkpoints
from corun_ray.core.training.checkpoint_record import NETWORK_FILE, TRAINING_FILE, read_record
from corun_ray.core.training.checkpoints import load_run, save_run
from corun_ray.core.training.state import TrainState
from corun_ray.core.weights import RECORD_KEY
from tests.core.training.test_checkpoints import Intruder, corun_spec, random_network, train

EXTRA = {"pool_snapshot": "step-3", "seed": 7}
GAIN = "last.dehaze_prox.step_lambda"


def assert_equal_states(ours: TrainState, expected: TrainState) -> None:
    """Every tensor bit for bit, its dtype and device, and every plain value."""
    theirs = expected.collect_tensors()
    assert ours.collect_tensors().keys() == theirs.keys() and ours.collect_values() == expected.collect_values()
    for name, tensor in ours.collect_tensors().items():
        assert (tensor.dtype, tensor.device) == (theirs[name].dtype, theirs[name].device), name
        assert torch.equal(tensor, theirs[name]), name


def save_three_steps(folder: Path) -> None:
    """The checkpoint of `random_network()` after three steps."""
    state = TrainState.start(random_network())
    train(state, 3)
    save_run(folder, state, corun_spec(), EXTRA)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_three_steps(tmp_path)
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    """Changes what the training file holds, tensors and record, in place."""
    path = folder / TRAINING_FILE
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()[RECORD_KEY])
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors, record)
    save_file(tensors, path, {RECORD_KEY: json.dumps(record)})


def test_a_run_goes_on_as_if_it_had_never_stopped(saved: Path) -> None:
    straight, stopped = TrainState.start(random_network()), TrainState.start(random_network())
    train(straight, 5)
    train(stopped, 3)
    resumed = TrainState.start(CORUN(2, 2))
    assert load_run(saved, resumed, corun_spec()) == EXTRA
    assert (resumed.step, resumed.num_images_seen) == (3, 3)
    assert_equal_states(resumed, stopped)
    assert all("exp_avg_sq" in moments for moments in resumed.optimizer.state.values())

    train(resumed, 2)
    assert resumed.step == straight.step == 5
    assert_equal_states(resumed, straight)

    # Without the optimizer's moments the same two steps lead elsewhere: the comparison above can fail.
    rewrite(saved, lambda tensors, _: [tensors.pop(name) for name in [*tensors] if name.startswith("optimizer.")])
    forgetful = TrainState.start(CORUN(2, 2))
    load_run(saved, forgetful, corun_spec())
    train(forgetful, 2)
    pairs = zip(forgetful.student.parameters(), straight.student.parameters(), strict=True)
    assert max((ours - expected).abs().max() for ours, expected in pairs) > 1e-4


def test_a_run_that_has_not_made_a_step_goes_on(tmp_path: Path) -> None:
    straight = TrainState.start(random_network())
    save_run(tmp_path, straight, corun_spec(), {})
    resumed = TrainState.start(CORUN(2, 2))
    train(resumed, 1)  # leaves moments, which must go
    assert load_run(tmp_path, resumed, corun_spec()) == {}
    assert not resumed.optimizer.state
    train(straight, 3)
    train(resumed, 3)
    assert_equal_states(resumed, straight)


class Odd(nn.Module):
    """What other people's networks have: tied weights, buffers, strides, a parameter that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm2d(3)
        self.spread = nn.Parameter(torch.ones(3, 3, 2, 2).to(memory_format=torch.channels_last))
        self.unused = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, hazy: Tensor) -> Tensor:
        return self.norm(self.second(self.first(hazy))) * self.spread.mean()


def test_a_network_with_tied_weights_buffers_and_unused_parameters_goes_on(tmp_path: Path) -> None:
    def step(state: TrainState) -> None:
        hazy = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(state.step))
        state.backward({"loss": (state.student(hazy) - hazy).square().mean()})
        state.update(lr=1e-2, ema=0.9, batch_images=2)

    torch.manual_seed(0)
    spec, straight, resumed = NetworkSpec(f"{__name__}:Odd"), TrainState.start(Odd()), TrainState.start(Odd())
    for _ in range(2):
        step(straight)
    save_run(tmp_path, straight, spec, {})
    load_run(tmp_path, resumed, spec)
    assert not any(".unused." in name for name in resumed.collect_tensors())
    assert resumed.student.second.weight is resumed.student.first.weight
    for _ in range(2):
        step(straight)
        step(resumed)
    assert_equal_states(resumed, straight)


def test_resuming_reads_neither_a_pickle_nor_the_published_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("unpickled")

    (saved / NETWORK_FILE).write_bytes(pickle.dumps({"params": Intruder(saved / "mark")}, protocol=2))
    for owner in (torch, pickle):
        monkeypatch.setattr(owner, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(checkpoints, "read_weights", refuse)
    assert load_run(saved, TrainState.start(CORUN(2, 2)), corun_spec()) == EXTRA
    assert read_record(saved) == {"step": 3, "num_images_seen": 3, "extra": EXTRA}
    assert not (saved / "mark").exists()


def test_what_was_restored_does_not_depend_on_the_file(saved: Path) -> None:
    expected, resumed = TrainState.start(random_network()), TrainState.start(CORUN(2, 2))
    train(expected, 3)
    load_run(saved, resumed, corun_spec())
    # In place, so that whatever is still mapped from the file would change too.
    with (saved / TRAINING_FILE).open("r+b") as file:
        file.write(bytes(os.path.getsize(saved / TRAINING_FILE)))
    assert_equal_states(resumed, expected)


def test_the_training_file_is_plain_named_tensors_and_one_record(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == {NETWORK_FILE, "network.json", "training.safetensors"}
    tensors = load_file(saved / TRAINING_FILE)
    published = torch.load(saved / NETWORK_FILE, weights_only=True)
    for part, params in {"student": published["params"], "teacher": published["params_ema"]}.items():
        assert all(torch.equal(tensors.pop(f"{part}.{name}"), tensor) for name, tensor in params.items())
    assert tensors.pop(f"optimizer.{GAIN}.step") == 3
    assert {name.rpartition(".")[2] for name in tensors} == {"step", "exp_avg", "exp_avg_sq"}
    with safe_open(saved / TRAINING_FILE, "pt") as file:
        assert file.metadata().keys() == {RECORD_KEY}
        record = json.loads(file.metadata()[RECORD_KEY])
    (group,) = record.pop("param_groups")
    assert record == {"step": 3, "num_images_seen": 3, "extra": EXTRA}
    assert (group["lr"], group["betas"]) == (1e-3, [0.9, 0.999]) and "params" not in group
    # Those who may read the model may resume from it.
    assert (saved / TRAINING_FILE).stat().st_mode == (saved / NETWORK_FILE).stat().st_mode


def test_a_crash_while_writing_leaves_the_last_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(path: Path, data: bytes) -> None:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError("no space left")

    before = (saved / TRAINING_FILE).read_bytes()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(Path, "write_bytes", half)
        save_run(saved, TrainState.start(random_network(seed=1)), corun_spec(), {})
    assert (saved / TRAINING_FILE).read_bytes() == before
    assert not [*saved.glob("*.partial")]


@pytest.mark.parametrize("extra", [{"a": {1, 2}}, {"a": torch.ones(1)}, {"a": float("nan")}], ids=str)
def test_extras_that_are_not_plain_are_not_saved(tmp_path: Path, extra: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        save_run(tmp_path, TrainState.start(random_network()), corun_spec(), extra)
    assert not (tmp_path / TRAINING_FILE).exists()
