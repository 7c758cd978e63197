"""Checkpoints: the published format in and out, what is refused, and runs that go on where they stopped."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from corun_ray.core.checkpoints import (
    NETWORK_FILE,
    TRAINING_FILE,
    CheckpointError,
    load_network,
    load_run,
    load_state_dicts,
    save_network,
    save_run,
)
from corun_ray.core.corun import CORUN
from corun_ray.core.losses import pretraining_losses
from corun_ray.core.state import TrainState


def random_network(stages: int = 2, width: int = 2, seed: int = 0) -> CORUN:
    """A network in which no two weights are alike, the output layers included."""
    generator = torch.Generator().manual_seed(seed)
    network = CORUN(stages, width)
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return network


def assert_equal_weights(ours: CORUN, expected: CORUN) -> None:
    torch.testing.assert_close(ours.state_dict(), expected.state_dict(), rtol=0, atol=0)


def train(state: TrainState, steps: int) -> None:
    """Steps on pairs that follow from the step's number alone."""
    for _ in range(steps):
        generator = torch.Generator().manual_seed(state.step)
        hazy, clear = torch.rand(2, 1, 3, 16, 16, generator=generator)
        state.update(pretraining_losses(state.student(hazy), clear, hazy), lr=1e-3, ema=0.9, batch_images=1)


def error_line(path: Path) -> str:
    """The one line in which `path` is refused; it starts with the file's name."""
    with pytest.raises(CheckpointError) as caught:
        load_network(path)
    line = str(caught.value)
    assert "\n" not in line and len(line) < len(str(path)) + 500
    assert line.startswith(f"{path}: ")
    return line.removeprefix(f"{path}: ")


@pytest.mark.parametrize(("stages", "width"), [(2, 6), (3, 4), (4, 2)])
def test_stages_and_width_follow_from_the_file(tmp_path: Path, stages: int, width: int) -> None:
    student, teacher = random_network(stages, width), random_network(stages, width, seed=1)
    save_network(tmp_path / "a.pth", student, teacher)
    loaded = load_network(tmp_path / "a.pth")
    assert (loaded.stages, loaded.width, loaded.training) == (stages, width, False)
    assert_equal_weights(loaded, teacher)


def test_the_saved_file_is_the_published_format(tmp_path: Path) -> None:
    student, teacher = random_network(), random_network(seed=1)
    save_network(tmp_path / "a.pth", student, teacher)
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    assert list(content) == ["params", "params_ema"]
    torch.testing.assert_close(content["params"], dict(student.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(content["params_ema"], dict(teacher.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("names", [["params"], ["params_ema"]])
def test_a_file_may_hold_one_of_the_two_networks(tmp_path: Path, names: list[str]) -> None:
    network = random_network()
    torch.save({name: network.state_dict() for name in names}, tmp_path / "a.pth")
    assert list(load_state_dicts(tmp_path / "a.pth")) == names
    assert_equal_weights(load_network(tmp_path / "a.pth"), network)


def test_no_file_and_no_checkpoint(tmp_path: Path) -> None:
    assert error_line(tmp_path / "none.pth") == "no such file"
    with pytest.raises(CheckpointError, match=f"{NETWORK_FILE}: no such file"):
        load_network(tmp_path)
    whole = tmp_path / "whole.pth"
    save_network(whole, random_network(), random_network())
    content = whole.read_bytes()
    for number, data in enumerate([b"", b"no checkpoint", bytes(range(256)) * 9, content[: len(content) // 2]]):
        path = tmp_path / f"{number}.pth"
        path.write_bytes(data)
        assert error_line(path).startswith("not a torch checkpoint of plain tensors (")


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
        assert error_line(path).startswith("not a torch checkpoint of plain tensors (")
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
        (WEIGHTS, "no `params_ema` in it; a CORUN checkpoint has `params` and `params_ema`"),
        ([1, 2], "no `params_ema` in it; a CORUN checkpoint has `params` and `params_ema`"),
        ({"params_ema": 3}, "no `params_ema` in it; a CORUN checkpoint has `params` and `params_ema`"),
        (
            {"params": {"a": torch.ones(1)}, "params_ema": {"a": torch.ones(1)}},
            f"its tensors are not those of CORUN (no {EMBEDDING})",
        ),
    ],
)
def test_other_contents_are_told_apart(tmp_path: Path, content: Any, expected: str) -> None:
    torch.save(content, tmp_path / "a.pth")
    assert error_line(tmp_path / "a.pth") == expected


def test_a_run_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    straight = TrainState.start(random_network())
    train(straight, 5)

    stopped = TrainState.start(random_network())
    train(stopped, 3)
    save_run(tmp_path, stopped, {"pool_snapshot": "step-3", "seed": 7})
    resumed = TrainState.start(CORUN(2, 2))
    assert load_run(tmp_path, resumed) == {"pool_snapshot": "step-3", "seed": 7}
    assert (resumed.step, resumed.num_images_seen) == (3, 3)
    assert_equal_weights(resumed.student, stopped.student)
    assert_equal_weights(resumed.teacher, stopped.teacher)

    train(resumed, 2)
    assert resumed.step == straight.step == 5
    for ours, expected in ((resumed.student, straight.student), (resumed.teacher, straight.teacher)):
        torch.testing.assert_close(ours.state_dict(), expected.state_dict(), rtol=0, atol=1e-6)

    # Without the optimizer's moments the same two steps lead elsewhere: the comparison above can fail.
    networks = load_state_dicts(tmp_path / NETWORK_FILE)
    forgetful = TrainState.start(CORUN(2, 2))
    record = forgetful.training_record() | {"step": 3, "num_images_seen": 3}
    forgetful.restore(networks["params"], networks["params_ema"], record)
    train(forgetful, 2)
    pairs = zip(forgetful.student.parameters(), straight.student.parameters(), strict=True)
    assert max((ours - expected).abs().max() for ours, expected in pairs) > 1e-4


def test_a_run_folder_is_also_a_model(tmp_path: Path) -> None:
    state = TrainState.start(random_network())
    train(state, 2)
    save_run(tmp_path, state, {})
    assert_equal_weights(load_network(tmp_path), state.teacher)


@pytest.mark.parametrize("wrong", ["no file", "no checkpoint", "another run"])
def test_a_run_that_cannot_be_resumed_is_one_line(tmp_path: Path, wrong: str) -> None:
    save_run(tmp_path, TrainState.start(random_network()), {})
    target = TrainState.start(CORUN(3 if wrong == "another run" else 2, 2))
    if wrong == "no file":
        (tmp_path / TRAINING_FILE).unlink()
    elif wrong == "no checkpoint":
        (tmp_path / TRAINING_FILE).write_bytes(pickle.dumps({"extra": Intruder(tmp_path / "mark")}, protocol=2))
    with pytest.raises(CheckpointError) as caught:
        load_run(tmp_path, target)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(tmp_path))
    assert not (tmp_path / "mark").exists()
