"""The GPUs of this machine by its driver's own word: asking torch would take seconds to import."""

import shutil
import subprocess


def count_driver_gpus() -> int:
    """How many the NVIDIA driver lists; 0 where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    listing = subprocess.run([program, "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
