"""The registered model as MLflow runs it: this file and the package travel with the model, no pickle does."""

from pathlib import Path

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from corun_ray.core.inference.restore import restore, to_image, to_tensor
from corun_ray.core.training.checkpoints import load_network


class Dehazer(PythonModel):
    """Restores uint8 photographs of any size."""

    def load_context(self, context: PythonModelContext) -> None:
        """Loads the network from the model's checkpoint."""
        self._network = load_network(Path(context.artifacts["checkpoint"])).network

    # No type hints: MLflow would take them for a schema, and the model has a signature.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """uint8 B H W 3 (RGB, at least 16 px a side) → the same shape, restored."""
        images = np.asarray(model_input, dtype=np.uint8)
        return np.stack([to_image(restore(self._network, to_tensor(image)).scene) for image in images])


set_model(Dehazer())
