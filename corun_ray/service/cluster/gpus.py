"""The GPUs of this machine, counted by their driver: importing torch for that would take seconds."""

import shutil
import subprocess


def count_driver_gpus() -> int:
    """Count the GPUs that the NVIDIA driver lists.

    Returns 0 without a driver.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0

    # One line for each GPU.
    listing = subprocess.run([program, "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
