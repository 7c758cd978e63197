"""A weights folder with BRISQUE, whose parameters lie in `data/iqa`."""

from pathlib import Path

import numpy as np
import torch

from corun_ray.service.weights.folder import index_folder
from tests import DATA

BRISQUE_FILE = "brisque_svm_weights.pth"


def write_brisque_weights(folder: Path) -> Path:
    """Write the folder, with its index, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    with np.load(DATA / "iqa" / "brisque_svm.npz") as svm:
        torch.save((torch.from_numpy(svm["sv_coef"]), torch.from_numpy(svm["sv"])), folder / BRISQUE_FILE)
    index_folder(str(folder))
    return folder
