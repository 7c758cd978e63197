"""The benchmarks that need torch alone: what they count is right, and they run where nothing else is installed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import conv2d

from corun_ray.bench.machine import Machine, Work, count_work
from corun_ray.bench.step import StepSettings, _WarmPool
from corun_ray.cli import main as command_line
from corun_ray.core.training.labels import Scores, supersedes
from corun_ray.core.training.precision import choose_precision, judge_bfloat16, read_processor

PARTS = ["pool", "teacher", "global scores", "local scores", "student", "losses", "backward", "optimizer", "ema"]
ABSENT = (
    "cv2",
    "pyiqa",
    "open_clip",
    "ray",
    "mlflow",
    "pydantic",
    "scipy",
    "torchvision",
    "pyarrow",
    "boto3",
    "spandrel",
    "yaml",
    "click",
)


def main(arguments: list[str]) -> int:
    """Run `corun-ray bench`; return 0, or let the exit of a failure pass."""
    with pytest.raises(SystemExit) as ended:
        command_line(["bench", *arguments])
    if ended.value.code:
        raise ended.value
    return 0


def test_a_product_is_counted_as_what_it_is() -> None:
    left, right = torch.ones(3, 5), torch.ones(5, 7)
    work = count_work(lambda: (left @ right).T)  # a view reads and writes nothing
    assert work == Work(2 * 3 * 5 * 7, 4 * (3 * 5 + 5 * 7 + 3 * 7))
    assert work.compute_floor_s(Machine(flops_per_s=105, bytes_per_s=71)) == (2, 4)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_convolution_s_gradients_cost_what_it_does_whatever_its_groups(groups: int) -> None:
    images = torch.ones(2, 8, 6, 6, requires_grad=True)
    weight = torch.ones(8, 8 // groups, 3, 3, requires_grad=True)
    forward = 2 * (2 * 6 * 6 * 8) * (8 // groups * 9)

    def counted(images: torch.Tensor) -> float:
        return count_work(lambda: conv2d(images, weight, padding=1, groups=groups).sum().backward()).flops

    assert counted(images) == 3 * forward and counted(images.detach()) == 2 * forward


@pytest.mark.parametrize(("rate", "wins"), [(0, []), (0.25, [3, 7, 11]), (1, list(range(12)))])
def test_candidates_win_as_often_as_was_asked(rate: float, wins: list[int]) -> None:
    pool = _WarmPool(StepSettings(size_px=32, win_rate=rate), 16)
    stored = [pool.prefetch(["one"]).result()[0] for _ in range(12)]
    assert [n for n, label in enumerate(stored) if label and supersedes(Scores(0.0, 0.0), label.scores)] == wins


def test_a_step_is_told_part_by_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, trace = tmp_path / "step.json", tmp_path / "trace.json"
    small = ["--size", "32", "--stages", "2", "--width", "4", "--repeats", "2", "--device", "cpu"]
    assert main(["step", *small, "--wins", "1", "--json", str(file), "--trace", str(trace)]) == 0
    (report,) = json.loads(file.read_text())
    assert list(report["parts_s"]) == PARTS and all(seconds > 0 for seconds in report["parts_s"].values())
    assert min(report["step_s"], report["work"]["flops"], report["work"]["bytes"], report["peak_bytes"]) > 0
    said = capsys.readouterr().out
    assert "colabator step: 2 stages, 32 px, batch 1, fp32, eager; 100% of candidates win" in said
    assert all(f"    {part}" in said for part in PARTS) and "floor, memory traffic" in said
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert set(PARTS) <= names


def test_pretraining_has_fewer_parts(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--size", "32", "--stages", "2", "--width", "4", "--repeats", "1", "--no-perceptual"]
    assert main(["step", *small, "--method", "pretrain", "--device", "cpu", "--precision", "auto"]) == 0
    said = capsys.readouterr().out
    precision = choose_precision("auto", judge_bfloat16(read_processor(torch.device("cpu"))))
    assert f"precision {precision}\n" in said and f", {precision.name}, eager" in said
    assert "    student" in said and "    teacher" not in said


def test_photographs_by_size_and_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "dehaze.json"
    small = ["--stages", "2", "--width", "4", "--repeats", "1", "--device", "cpu"]
    assert main(["dehaze", "--sizes", "64x48", "320x160", *small, "--json", str(file)]) == 0
    first, second = json.loads(file.read_text())
    assert second["work"]["flops"] == pytest.approx(first["work"]["flops"] * 320 * 160 / (64 * 48))
    assert "dehaze 320 x 160 px, as a whole: 2 stages, fp32, eager" in capsys.readouterr().out
    assert main(["dehaze", "--sizes", "400x400", *small, "--memory-mib", "70"]) == 0
    assert "dehaze 400 x 400 px, in 70 MiB: 2 stages, fp32, eager" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["dehaze", "--sizes", "640x480", "--memory-mib", "3"], "640 x 480 px need"),
        (["dehaze", "--sizes", "huge"], "expected 1080p, 12mp, 24mp or WIDTHxHEIGHT"),
        (["step", "--size", "100"], "expected a multiple of 32, got 100"),
        (["step", "--wins", "2"], "expected a share from 0 to 1, got 2"),
        (["step", "--device", "gpu"], "--device: gpu cannot be used"),
        (["step", "--device", "meta"], "--device: meta cannot be used (expected cpu or cuda)"),
        (["dehaze", "--memory-mib", "70", "--compile"], "--memory-mib: bands and tiles cannot be compiled"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and reason in capsys.readouterr().err


def test_torch_and_numpy_are_enough() -> None:
    """Run in a process that cannot import anything else of what the project installs."""
    program = (
        f"import sys\nfor name in {ABSENT}: sys.modules[name] = None\n"
        "from corun_ray.cli import main\n"
        "import contextlib\n"
        "small = ['--stages', '2', '--width', '4', '--repeats', '1', '--device', 'cpu']\n"
        "with contextlib.suppress(SystemExit):\n"
        "    main(['bench', 'step', '--size', '32', *small])\n"
        "with contextlib.suppress(SystemExit):\n"
        "    main(['bench', 'scaling', '--gpus', '8', '64', *small[:4], '--no-check'])\n"
        "main(['bench', 'dehaze', '--sizes', '64x64', *small])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert all(said in result.stdout for said in ("whole step, median", "costs most", "megapixels/s"))
