"""A model as plain files: weights, configuration, and its card."""

import shutil
from pathlib import Path

from corun_ray.core.training.checkpoints import save_model
from corun_ray.service.models import user_code as usercode
from corun_ray.service.models.flavor import ABOUT
from corun_ray.service.models.sources import ModelSourceError, fetched, load


def pull(source: str, folder: Path, tracking: str) -> list[Path]:
    """Writes the model that `source` names into a new or empty folder; returns the files.

    The code of a class of a user's own comes along. Raises `ModelSourceError`.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelSourceError(f"{folder}: exists and is not empty (a new or empty folder was expected)")
    with fetched(source, tracking) as path:
        loaded, code = load(source, path)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(folder, loaded)
        usercode.write(code, folder)
        about = path.parent.parent / ABOUT
        if about.is_dir():
            shutil.copytree(about, folder, dirs_exist_ok=True)
    return sorted(path for path in folder.rglob("*") if path.is_file())
