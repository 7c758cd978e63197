"""What a command does where its output cannot be read or kept: no traceback, and 0 only for what exists."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from corun_ray.cli.output import LossyFile, Output, OutputLost, wrap_stream

FULL = "the output cannot be written: No space left on device"


def run_shell(line: str, folder: Path) -> tuple[int, str]:
    """Run a line of bash with `corun-ray` in it; return the exit code of all, and what stderr got."""
    line = line.replace("corun-ray", f"{sys.executable} -m corun_ray")
    ran = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    return ran.returncode, ran.stderr


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("corun-ray schema | head -1", 0, ""),
        ("corun-ray schema > /dev/full", 1, f"{FULL}\n"),
        (
            "corun-ray demo d --clear 1 --hazy 1 > /dev/full",
            0,
            f"{FULL}; the rest of it is dropped, and the work goes on\n",
        ),
        ("corun-ray demo d --clear 1 --hazy 1 >&- 2>&-", 0, ""),
    ],
)
def test_an_output_that_cannot_be_written(line, code, said, tmp_path):
    assert run_shell(line, tmp_path) == (code, said)


def test_check_tells_by_its_code_what_nobody_reads(tmp_path):
    (tmp_path / "job.yaml").write_text(
        "kind: dehaze\nname: a\ndehaze: {input: none, output: out, model: corun-small}\n"
    )
    code, said = run_shell("corun-ray check job.yaml | true", tmp_path)
    assert code == 2 and "none" in said and "Traceback" not in said


def test_what_follows_a_job_ends_with_its_reader():
    read, write = os.pipe()
    os.close(read)
    file = LossyFile(write)
    output, stream = Output(file), wrap_stream(file)
    output.expect("jobs follow")
    with pytest.raises(OutputLost, match="the output cannot be written: Broken pipe"):
        print("a line of its log", file=stream, flush=True)
    print("no second error", file=stream, flush=True)
    stream.close()
    os.close(write)


def test_a_character_that_the_encoding_lacks_is_written_as_its_code():
    read, write = os.pipe()
    stream = wrap_stream(LossyFile(write), io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    print("Grün", file=stream, flush=True)
    assert os.read(read, 100) == b"Gr\\xfcn\n"
    os.close(read)
    os.close(write)
