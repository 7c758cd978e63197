"""Reasons of several lines, as one that keeps them."""

import pytest

from corun_ray.service.errors import MAX_LINE_CHARACTERS, find_root_cause, format_reason, join_lines

VERSIONS = """Version mismatch: The cluster was started with:
    Ray: 2.60.0
    Python: 3.11.7
This process on Ray Client was started with:
    Ray: 2.40.0
    Python: 3.11.7
"""
CHAIN = """Traceback (most recent call last):
  File "/a/worker.py", line 3, in step
    loss.backward()
    ~~~~~~~~~~~~~^^
torch.AcceleratorError: CUDA error: an illegal memory access was encountered
Search for `cudaErrorIllegalAddress' in the manual.
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "/a/driver.py", line 9, in run
    raise Other
Other: what followed
"""


def test_the_versions_of_both_sides_are_told():
    said = format_reason(RuntimeError(VERSIONS))
    assert said == (
        "Version mismatch: The cluster was started with: Ray: 2.60.0, Python: 3.11.7, "
        "This process on Ray Client was started with: Ray: 2.40.0, Python: 3.11.7"
    )


def test_the_reason_behind_a_failure_is_told_once():
    try:
        try:
            raise OSError("no room")
        except OSError as error:
            raise ConnectionError("Failed to connect at 10.0.0.1:6379") from error
    except ConnectionError as error:
        assert format_reason(error) == "Failed to connect at 10.0.0.1:6379: no room"
    same = ValueError("a whole reason: no room")
    same.__cause__ = OSError("no room")
    assert format_reason(same) == "a whole reason: no room"


def test_the_first_error_of_a_chain_keeps_all_of_its_lines_and_loses_its_package():
    said = find_root_cause(CHAIN)
    assert said == (
        "AcceleratorError: CUDA error: an illegal memory access was encountered, "
        "Search for `cudaErrorIllegalAddress' in the manual."
    )
    assert (
        find_root_cause('ray::f() (pid=1)\n  File "/a.py", line 1, in f\n    x()\nValueError: a: b')
        == "ValueError: a: b"
    )
    assert find_root_cause("worker died") == "worker died"


def test_what_is_told_before_a_traceback_stays():
    assert join_lines(f"Failed to set up the environment.\n{CHAIN}").startswith(
        "Failed to set up the environment. AcceleratorError: CUDA error"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "OSError"),
        (
            "(sqlite3.OperationalError) no such table: runs\n[SQL: SELECT 1]\n(Background on this error at: https://a)",
            "(OperationalError) no such table: runs",
        ),
        ("status 502\n'<html><body>Bad Gateway</body></html>'", "status 502, (a web page)"),
        ("<urllib3.connection.HTTPConnection object at 0x7f00>: Failed to establish", "Failed to establish"),
        ("ray.exceptions.RpcError: timed out", "RpcError: timed out"),
        ("failed (corun_ray.service.storage.MissingFile: no)", "failed (MissingFile: no)"),
        ("view.JPG: truncated", "view.JPG: truncated"),
    ],
)
def test_what_says_nothing_is_left_out(text, said):
    assert format_reason(OSError(text)) == said


def test_a_page_is_cut_at_a_word_and_says_so():
    said = format_reason(ValueError("word " * 1000))
    assert len(said) <= MAX_LINE_CHARACTERS + 2 and said.endswith("word …")
