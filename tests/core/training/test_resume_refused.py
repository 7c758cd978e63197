"""Checkpoint folders from which no run can resume: each is refused in one line, without any change."""

import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from corun_ray.core.networks.spec import NetworkSpec
from corun_ray.core.training.checkpoint_record import TRAINING_FILE, CheckpointError, read_record
from corun_ray.core.training.checkpoints import load_run
from corun_ray.core.training.state import TrainState
from corun_ray.core.weights import RECORD_KEY
from tests.core.training.test_checkpoints import Intruder, corun_spec, random_network
from tests.core.training.test_resume import GAIN, assert_equal_states, rewrite, save_three_steps


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint folder of a run that has made three steps."""
    folder = tmp_path_factory.mktemp("three_steps")
    save_three_steps(folder)
    return folder


@pytest.fixture
def saved(three_steps: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(three_steps, tmp_path, dirs_exist_ok=True)


def refusal(folder: Path, spec: NetworkSpec | None = None) -> str:
    """The one line in which resuming from `folder` is refused; the state must not have changed by it."""
    state, before = TrainState.start(random_network(seed=5)), TrainState.start(random_network(seed=5))
    with pytest.raises(CheckpointError) as caught:
        load_run(folder, state, spec or corun_spec())
    assert_equal_states(state, before)
    line = str(caught.value)
    assert "\n" not in line and len(line) < len(str(folder)) + 900 and line.startswith(str(folder))
    return line.removeprefix(str(folder))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut short": lambda data: data[:-1],
    "half": lambda data: data[: len(data) // 2],
    "within the header": lambda data: data[:100],
    "longer": lambda data: data + b"\0",
    "zeros": lambda data: bytes(len(data)),
    "text": lambda data: b"no checkpoint",
    "header of another size": lambda data: b"\xff" * 8 + data[8:],
    "pickle": lambda data: pickle.dumps({"extra": Intruder(Path("mark"))}, protocol=2),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_whole_is_one_line(saved: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    (saved / TRAINING_FILE).write_bytes(DAMAGES[damage]((saved / TRAINING_FILE).read_bytes()))
    expected = "an empty file, not weights" if damage == "empty" else "not a whole safetensors file ("
    assert refusal(saved).startswith(f"/{TRAINING_FILE}: {expected}")
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        read_record(saved)
    assert not Path("mark").exists()


def test_no_file_and_files_of_others(saved: Path) -> None:
    path = saved / TRAINING_FILE
    tensors = load_file(path)
    for metadata in (None, {"format": "pt"}, {RECORD_KEY: "{}", "format": "pt"}):
        save_file(tensors, path, metadata)
        assert refusal(saved).startswith(f"/{TRAINING_FILE}: a safetensors file, but not one with a record")
    for text in ("", "{", "[" * 100_000, "1" * 5000):
        save_file(tensors, path, {RECORD_KEY: text})
        assert refusal(saved) == f"/{TRAINING_FILE}: its record (corun_ray in the metadata) is not JSON"
    save_file(tensors, path, {RECORD_KEY: "[1]"})
    assert refusal(saved) == f"/{TRAINING_FILE}: its record (corun_ray in the metadata) is not a JSON object"
    path.unlink()
    assert refusal(saved) == f"/{TRAINING_FILE}: no such file"
    path.mkdir()
    assert refusal(saved).startswith(f"/{TRAINING_FILE}: cannot be read (")


def test_a_folder_of_an_earlier_version_is_said_to_be_one(saved: Path) -> None:
    (saved / TRAINING_FILE).unlink()
    (saved / "training.pt").write_bytes(pickle.dumps({"extra": Intruder(saved / "mark")}, protocol=2))
    assert refusal(saved).startswith(": a checkpoint of an earlier version (training.pt instead of")
    with pytest.raises(CheckpointError, match="an earlier version"):
        read_record(saved)
    assert not (saved / "mark").exists()


def test_another_run_is_refused(saved: Path) -> None:
    assert "a run of corun {'stages': 2, 'width': 2}, not of corun {'stages': 3" in refusal(saved, corun_spec(3))


Change = Callable[[dict[str, Tensor], dict[str, Any]], Any]
MOMENT = f"optimizer.{GAIN}.exp_avg"
TENSOR_MISFITS: dict[str, tuple[Change, str]] = {
    "student": (lambda t, _: t.pop(f"student.{GAIN}"), f"1 tensors missing (student.{GAIN})"),
    "teacher": (lambda t, _: t.pop(f"teacher.{GAIN}"), f"1 tensors missing (teacher.{GAIN})"),
    "moment": (lambda t, _: t.pop(MOMENT), f"1 tensors missing ({MOMENT})"),
    "too many": (lambda t, _: t.update({"optimizer.a\nb.step": torch.ones(1)}), "unexpected (optimizer.a b.step)"),
    "no part": (lambda t, _: t.update({"a\x85" * 999: torch.ones(1)}), "1 tensors unexpected (a a a"),
    "third moment": (lambda t, _: t.update({f"optimizer.{GAIN}.max": t[MOMENT].clone()}), "1 tensors unexpected ("),
    "shape": (lambda t, _: t.update({f"teacher.{GAIN}": torch.ones(3)}), f"(teacher.{GAIN} (3,) instead of "),
    "moment's shape": (lambda t, _: t.update({MOMENT: torch.ones(3)}), f"({MOMENT} (3,) instead of "),
    "dtype": (
        lambda t, _: t.update({f"student.{GAIN}": t[f"student.{GAIN}"].half()}),
        f"1 tensors of another dtype (student.{GAIN} torch.float16 instead of torch.float32)",
    ),
    "count's dtype": (
        lambda t, _: t.update({f"optimizer.{GAIN}.step": torch.tensor(3)}),
        f"1 tensors of another dtype (optimizer.{GAIN}.step torch.int64 instead of torch.float32)",
    ),
}


@pytest.mark.parametrize("what", TENSOR_MISFITS)
def test_tensors_that_this_run_does_not_need_are_one_line(saved: Path, what: str) -> None:
    change, expected = TENSOR_MISFITS[what]
    rewrite(saved, change)
    line = refusal(saved)
    assert line.startswith(f"/{TRAINING_FILE}: does not fit this run: ") and expected in line


RECORD_MISFITS: dict[str, tuple[Change, str]] = {
    "no step": (lambda _, r: r.pop("step"), "exactly step (int), num_images_seen (int), param_groups (list), extra"),
    "one more": (lambda _, r: r.update(code="print()"), "its record is not that of a run"),
    "bool": (lambda _, r: r.update(step=True), "its record is not that of a run"),
    "float": (lambda _, r: r.update(num_images_seen=3.0), "its record is not that of a run"),
    "no mapping": (lambda _, r: r.update(extra=[]), "its record is not that of a run"),
    "negative": (lambda _, r: r.update(step=-1), "step and num_images_seen are not both 0 or more"),
    "no group": (lambda _, r: r["param_groups"].clear(), "its param_groups are not those of this run's AdamW"),
    "no lr": (lambda _, r: r["param_groups"][0].pop("lr"), "this run's AdamW, like [{'lr': 0.0, 'betas': (0.9, "),
    "parameters": (lambda _, r: r["param_groups"][0].update(params=[0]), "its param_groups are not"),
    "a group of text": (lambda _, r: r.update(param_groups=["lr"]), "its param_groups are not"),
    "three betas": (lambda _, r: r["param_groups"][0]["betas"].append(0.9), "its param_groups are not"),
    "betas of text": (lambda _, r: r["param_groups"][0].update(betas="ab"), "its param_groups are not"),
    "lr of text": (lambda _, r: r["param_groups"][0].update(lr="0"), "its param_groups are not"),
    "flag of a number": (lambda _, r: r["param_groups"][0].update(amsgrad=0), "its param_groups are not"),
}


@pytest.mark.parametrize("what", RECORD_MISFITS)
def test_a_record_that_is_not_a_run_s_is_one_line(saved: Path, what: str) -> None:
    change, expected = RECORD_MISFITS[what]
    rewrite(saved, change)
    line = refusal(saved)
    assert line.startswith(f"/{TRAINING_FILE}: ") and expected in line
