"""The pyfunc flavour of a registered model. MLflow runs this file from the model's folder, without a pickle.

The file is copied into the model together with `corun_ray.core`, so it must import nothing else of this package.
"""

from pathlib import Path

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from corun_ray.core.inference.restore import restore, to_image, to_tensor
from corun_ray.core.training.checkpoints import load_network


class Dehazer(PythonModel):
    """Restores uint8 photographs of any size."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the network from the model's checkpoint."""
        self._network = load_network(Path(context.artifacts["checkpoint"])).network

    # No type hints: MLflow would read them as a schema, and the model has a signature.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Restore a batch of images.

        `model_input` is uint8 B H W 3 (RGB, at least 16 px a side); the result has the same shape.
        """
        restored = []
        for image in np.asarray(model_input, dtype=np.uint8):
            scene = restore(self._network, to_tensor(image)).scene
            restored.append(to_image(scene))
        return np.stack(restored)


set_model(Dehazer())
