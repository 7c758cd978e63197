import subprocess
import sys

STEPS = """
import resource, torch
from corun_ray.core.training.acceleration import keep_freed_memory
{}
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(14):  # the first ones find room to stay in
    before = faults()
    torch.zeros(2**24).add_(1)
print(faults() - before)
"""


def faults_of_a_large_tensor(first: str) -> int:
    code = STEPS.format(first)
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def test_a_tensor_of_a_size_that_was_freed_before_costs_no_page_faults() -> None:
    """Each runs in its own process, because the setting is permanent."""
    assert faults_of_a_large_tensor("keep_freed_memory()") * 5 < faults_of_a_large_tensor("")
