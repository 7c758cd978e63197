"""What commands that use Ray leave behind: Ray's own messages, which people want to see after a failure alone."""

import os
import subprocess
import sys

import pytest

COMMAND = """
import os, sys
from corun_ray.cli.common import using_ray
from corun_ray.service.errors import JobFailed

with using_ray():
    os.write(2, sys.argv[1].encode())
    if sys.argv[2] == "fails":
        raise JobFailed("the job failed")
"""


@pytest.mark.parametrize("end", ["ends", "fails"])
@pytest.mark.parametrize("said", ["", "raylet: out of luck"])
def test_rays_messages_are_kept_and_named_where_there_are_any(tmp_path, end, said):
    run = subprocess.run(
        [sys.executable, "-c", COMMAND, said, end],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode == 0) == (end == "ends")
    assert said == "" or said not in run.stderr
    left = list(tmp_path.glob("corun-ray-*.log"))
    assert [file.read_text() for file in left] == ([said] if said else [])
    assert (f"Ray's own messages: {left[0]}" in run.stderr) == (end == "fails") if said else not left
    assert ("the job failed" in run.stderr) == (end == "fails")
