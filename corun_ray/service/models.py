"""Where a model comes from: an MLflow URI, a checkpoint folder or URI, or a published `.pth`."""

import tempfile
from pathlib import Path

from corun_ray.core.checkpoints import CheckpointError, load_network
from corun_ray.core.corun import CORUN
from corun_ray.service.storage import StorageError, locate
from corun_ray.service.tracking import TrackingError, download_model

MLFLOW_SCHEMES = ("models:/", "runs:/")


class ModelSourceError(Exception):
    """A source that gives no model; the message is one line."""


def fetch_network(source: str, tracking_uri: str) -> CORUN:
    """The network that `source` names, on the CPU; raises `ModelSourceError`."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            if source.startswith(MLFLOW_SCHEMES):
                path = download_model(tracking_uri, source, Path(folder))
            else:
                location = locate(source)
                if not location.exists():
                    raise ModelSourceError(f"{source}: nothing there (expected a checkpoint folder or a .pth)")
                path = Path(location.path) if location.is_local else location.download(Path(folder))
            return load_network(path)
        except (TrackingError, StorageError, CheckpointError) as error:
            raise ModelSourceError(str(error)) from None
