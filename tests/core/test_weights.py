"""Files of weights as people have them: what is read as data, and what other files are called."""

import argparse
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from corun_ray.core.weights import WeightsError, read_weights

FOREIGN: dict[str, tuple[bytes, str]] = {
    "page": (b"\n<!DOCTYPE html><html>Sign in</html>", "a web page (HTML) that was saved under this name"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\nsize 9\n", "a Git LFS pointer, not weights"),
    "refusal of a store": (
        b"<?xml version='1.0'?>\n<Error><Code>AccessDenied</Code></Error>",
        "a server's answer that was saved under this name (<?xml version='1.0'?> <Error><Code>AccessDenied</Code>",
    ),
    "answer of a hub": (b'{"error": "Not Found"}', 'a server\'s answer that was saved under this name ({"error": "Not'),
    "indented answer": (
        b'{\n  "message": "Not Found"}',
        'a server\'s answer that was saved under this name ({ "message"',
    ),
    "line of a server": (
        b"404: Not Found\n",
        "a server's answer that was saved under this name (404: Not Found), not weights",
    ),
    "archive": (b"\x1f\x8b\x08\0" + bytes(40), "a compressed file (gzip), not weights; unpack it first"),
    "nothing": (b"", "an empty file, not weights"),
}


def read_error(path: Path) -> str:
    """Return the one line in which a file is refused, without its name."""
    with pytest.raises(WeightsError) as caught:
        read_weights(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and "\n" not in line
    assert "weights_only" not in line and "trust" not in line
    return line.removeprefix(f"{path}: ")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_saved_in_the_place_of_weights_is_called_what_it_is(tmp_path: Path, kind: str, suffix: str) -> None:
    content, expected = FOREIGN[kind]
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    assert read_error(path).startswith(expected)


def test_programs_archives_and_halves_are_called_what_they_are(tmp_path: Path) -> None:
    # A whole network is an object of its class, in both of torch's formats.
    advice = "which are code; save its state dict alone (model.state_dict())"
    for name, is_zip in (("new.pth", True), ("old.pth", False)):
        torch.save(nn.Linear(2, 2), tmp_path / name, _use_new_zipfile_serialization=is_zip)
        assert read_error(tmp_path / name).startswith(f"holds objects of the class Linear, {advice}")

    # A TorchScript program; its graph is never run.
    traced = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    torch.jit.save(traced, tmp_path / "script.pth")
    assert read_error(tmp_path / "script.pth").startswith("a TorchScript program, not weights")

    # An archive that holds the weights.
    with zipfile.ZipFile(tmp_path / "archive.pth", "w") as archive:
        archive.writestr("weights.pth", b"")
    assert read_error(tmp_path / "archive.pth").startswith("a zip archive, but not one of torch.save")

    # A download that broke off.
    torch.save({"weight": torch.zeros(1000)}, tmp_path / "half.pth")
    content = (tmp_path / "half.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(content[: len(content) // 2])
    assert read_error(tmp_path / "half.pth").startswith("not whole: the end of the file is missing")


def test_the_content_of_a_file_tells_its_format_and_whether_it_is_whole(tmp_path: Path) -> None:
    weights = {"weight": torch.arange(6.0)}
    torch.save(weights, tmp_path / "a.safetensors")
    save_file(weights, tmp_path / "b.pth")
    assert read_error(tmp_path / "a.safetensors") == "a file of torch.save, not of safetensors; rename it to .pth"
    assert read_weights(tmp_path / "b.pth")["weight"].tolist() == weights["weight"].tolist()

    content = (tmp_path / "b.pth").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(content[:-4])
    assert read_error(tmp_path / "half.safetensors").startswith("not whole: the end of the file is missing")


@pytest.mark.parametrize("is_zip", [True, False])
def test_values_of_numpy_and_options_are_data(tmp_path: Path, is_zip: bool) -> None:
    options = argparse.Namespace(lr=1e-4)
    values: dict[str, Any] = {"epoch": np.int64(3), "best": np.float32(0.5), "curve": np.arange(3.0), "args": options}
    path = tmp_path / "a.pth"
    torch.save({"weight": torch.ones(2), **values}, path, _use_new_zipfile_serialization=is_zip)

    found = read_weights(path)
    assert found["epoch"] == 3 and found["best"] == 0.5 and found["curve"].tolist() == [0, 1, 2]
    assert found["args"] == options and found["weight"].tolist() == [1, 1]
