"""The `dehaze` section of a job file: which images, by which model, to where."""

from typing import Literal

from pydantic import Field

from corun_ray.config.types import OptionalCount, Section, Text


class Dehaze(Section):
    input: Text = Field(description="a folder or URI of hazy images")
    output: Text = Field(description="a folder or URI for the restored ones, which keep their names and folders")
    model: Text = Field(description="MLflow URI, checkpoint or plain model folder, or .pth")
    format: Literal["keep", "png", "jpg", "tif", "webp"] = Field("keep", description="of the files; keep: as they were")
    transmission: bool = Field(False, description="also write NAME.transmission.png, 16 bit grey: 65535 is clear air")
    stages: bool = Field(False, description="also write NAME.stages.png: what every stage made of it; corun only")
    memory_mib: OptionalCount = Field(
        None, ge=64, description="of one image at work, larger ones are cut; null: 2816, or 3/4 of a GPU's memory"
    )
