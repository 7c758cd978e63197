"""A model as MLflow stores it: the flavours pyfunc and pytorch of one network, its code and its description.

MLflow calls `save_model` of this module, as it does for any flavour. Both flavours load without Ray and without this
package: the part of the package that the network needs travels with the model.
"""

import contextlib
import io
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from corun_ray import PACKAGE
from corun_ray.core.inference.restore import AnySize
from corun_ray.core.networks.build import list_required_packages
from corun_ray.core.training.checkpoint_record import NETWORK_FILE, SPEC_FILE
from corun_ray.core.training.checkpoints import load_network
from corun_ray.service.models.user_code import UserCode, write_code

if TYPE_CHECKING:
    from mlflow.models import Model

PYFUNC_CODE = Path(__file__).with_name("pyfunc.py")
REQUIREMENTS = ("torch", "numpy", "opencv-python-headless", "mlflow")
EXAMPLE_PX = 64
"""The side of the model's input example."""

CHECKPOINT_FOLDER = "checkpoint"
"""The network's weights and specification, in the model's folder."""
PYTORCH_FOLDER = "pytorch"
"""The pickled module."""
CODE_FOLDER = "code"
"""The code of both flavours; MLflow gives the folder this name."""
ABOUT_FOLDER = "about"
"""The description of the model: card, job file, validation values and pictures."""
CARD_FILE = "README.md"
"""The model card, in `ABOUT_FOLDER`."""


def save_model(
    path: str, mlflow_model: "Model", checkpoint: Path, code: UserCode, about: Mapping[str, bytes], **_: Any
) -> None:
    """Write a checkpoint's network as an MLflow model into `path`.

    `code` is that of the network's class where it is a user's own. `about` maps file names to the contents of the
    model's description.

    `mlflow.pyfunc` restores uint8 images B H W 3; `mlflow.pytorch` gives a module that restores float images B 3 H W in
    [0, 1]. Only the latter is a pickle: MLflow's other format, a traced graph, is bound to the sizes of its example.
    """
    # MLflow prints messages of its own here; failures are raised.
    with contextlib.redirect_stderr(io.StringIO()), tempfile.TemporaryDirectory() as name:
        _save_flavours(Path(path), mlflow_model, checkpoint, code, Path(name))

    for file_name, content in about.items():
        target = Path(path) / ABOUT_FOLDER / file_name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def _save_flavours(path: Path, mlflow_model: "Model", checkpoint: Path, code: UserCode, work_folder: Path) -> None:
    """Write both flavours into `path`; intermediate files go to `work_folder`."""
    # Imported late: `connect_to_mlflow` first sets environment variables that MLflow reads at import.
    import mlflow.pyfunc
    import mlflow.pytorch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    # Copy the two files that are the network: a checkpoint may hold training state beside them.
    network = load_network(checkpoint)
    network_folder = work_folder / CHECKPOINT_FOLDER
    network_folder.mkdir()
    for file in (NETWORK_FILE, SPEC_FILE):
        shutil.copy(checkpoint / file, network_folder)

    # The pytorch flavour is saved beside the model first, because each flavour wants a folder of its own.
    pip_requirements = [*REQUIREMENTS, *list_required_packages(network.spec)]
    pytorch_folder = work_folder / PYTORCH_FOLDER
    mlflow.pytorch.save_model(
        AnySize(network.network),
        str(pytorch_folder),
        pip_requirements=pip_requirements,
        signature=False,
        serialization_format="pickle",
    )

    # The pyfunc flavour makes the model's folder, with the code.
    code_paths = [_copy_package_code(work_folder), *write_code(code, work_folder / "user")]
    images = Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3))])
    mlflow.pyfunc.save_model(
        path=str(path),
        mlflow_model=mlflow_model,
        python_model=str(PYFUNC_CODE),
        artifacts={CHECKPOINT_FOLDER: str(network_folder)},
        code_paths=[str(code_path) for code_path in code_paths],
        signature=ModelSignature(inputs=images, outputs=images),
        input_example=_make_input_example(),
        pip_requirements=pip_requirements,
    )

    _add_pytorch_flavour(path, mlflow_model, pytorch_folder)


def _add_pytorch_flavour(path: Path, mlflow_model: "Model", pytorch_folder: Path) -> None:
    """Move a saved pytorch model into the folder of the pyfunc model."""
    from mlflow.models import Model

    # Only the pickled module moves: its code is that of the pyfunc flavour.
    flavour = Model.load(str(pytorch_folder)).flavors["pytorch"]
    shutil.copytree(pytorch_folder / flavour["model_data"], path / PYTORCH_FOLDER)

    moved = {**flavour, "model_data": PYTORCH_FOLDER, "code": CODE_FOLDER}
    mlflow_model.add_flavor("pytorch", **moved)
    mlflow_model.save(str(path / "MLmodel"))


def _copy_package_code(folder: Path) -> Path:
    """Copy the part of this package that the model needs."""
    code = folder / PACKAGE.name
    shutil.copytree(PACKAGE / "core", code / "core", ignore=shutil.ignore_patterns("__pycache__", "demo"))
    shutil.copy(PACKAGE / "__init__.py", code)
    return code


def _make_input_example() -> np.ndarray:
    """Return a grey ramp, uint8 1 H W 3."""
    # MLflow stores the example with the model, so it is small.
    level = np.linspace(60, 220, EXAMPLE_PX).astype(np.uint8)
    return np.broadcast_to(level[:, None, None], (1, EXAMPLE_PX, EXAMPLE_PX, 3)).copy()
