"""A model as MLflow keeps it: the flavours pyfunc and pytorch of one network, its code, and what is known of it.

MLflow calls `save_model` of this module, as of any flavour's. Both flavours load without Ray and without this package:
the part of it that the network needs travels with the model.
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
from corun_ray.core.training.checkpoints import NETWORK_FILE, SPEC_FILE, load_network
from corun_ray.service.models.user_code import UserCode, write_code

if TYPE_CHECKING:
    from mlflow.models import Model

PYFUNC_CODE = Path(__file__).with_name("pyfunc.py")
REQUIREMENTS = ["torch", "numpy", "opencv-python-headless", "mlflow"]
EXAMPLE_PX = 64
CHECKPOINT, PYTORCH, CODE = "checkpoint", "pytorch", "code"
"""Folders of the model: the network's files, the pickled module, and the code of both."""
ABOUT_FOLDER, CARD_FILE = "about", "README.md"
"""The folder of the model with what is known of it, and the card in that folder."""


def save_model(
    path: str, mlflow_model: "Model", checkpoint: Path, code: UserCode, about: Mapping[str, bytes], **_: Any
) -> None:
    """Writes the network of a checkpoint folder, the `code` of its class and the files `about` it into `path`.

    `mlflow.pyfunc` maps uint8 B H W 3 to the same; `mlflow.pytorch` gives a module, float B 3 H W in [0, 1] to the
    same. Only the latter is a pickle: MLflow's other format, a traced graph, would hold to the sizes of its example.
    """
    # Imported here, after `tracking.connect` has quieted MLflow by its environment.
    import mlflow.pyfunc
    import mlflow.pytorch
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    place = Path(path)
    # MLflow prints its own account of this; what goes wrong is raised.
    with contextlib.redirect_stderr(io.StringIO()), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        network = load_network(checkpoint)
        plain = folder / CHECKPOINT
        plain.mkdir()
        for file in (NETWORK_FILE, SPEC_FILE):
            shutil.copy(checkpoint / file, plain)
        pip_requirements = [*REQUIREMENTS, *list_required_packages(network.spec)]
        mlflow.pytorch.save_model(
            AnySize(network.network),
            str(folder / PYTORCH),
            pip_requirements=pip_requirements,
            signature=False,
            serialization_format="pickle",
        )
        images = Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3))])
        mlflow.pyfunc.save_model(
            path=path,
            mlflow_model=mlflow_model,
            python_model=str(PYFUNC_CODE),
            artifacts={CHECKPOINT: str(plain)},
            code_paths=[str(path) for path in (_package_code(folder), *write_code(code, folder / "user"))],
            signature=ModelSignature(inputs=images, outputs=images),
            input_example=_example(),
            pip_requirements=pip_requirements,
        )
        flavour = Model.load(str(folder / PYTORCH)).flavors["pytorch"]
        shutil.copytree(folder / PYTORCH / flavour["model_data"], place / PYTORCH)
    mlflow_model.add_flavor("pytorch", **flavour | {"model_data": PYTORCH, "code": CODE})
    mlflow_model.save(str(place / "MLmodel"))
    for file_name, content in about.items():
        (place / ABOUT_FOLDER / file_name).parent.mkdir(parents=True, exist_ok=True)
        (place / ABOUT_FOLDER / file_name).write_bytes(content)


def _package_code(folder: Path) -> Path:
    """A copy of the part of this package that the model needs to run."""
    code = folder / PACKAGE.name
    shutil.copytree(PACKAGE / "core", code / "core", ignore=shutil.ignore_patterns("__pycache__", "demo"))
    shutil.copy(PACKAGE / "__init__.py", code)
    return code


def _example() -> np.ndarray:
    level = np.linspace(60, 220, EXAMPLE_PX).astype(np.uint8)
    return np.broadcast_to(level[:, None, None], (1, EXAMPLE_PX, EXAMPLE_PX, 3)).copy()
