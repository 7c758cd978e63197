"""The section of a job that says how long it trains, on how many images at a time, and what it shows and keeps."""

from pydantic import Field, ValidationInfo, field_validator

from corun_ray.config.types import Batch, Count, OneOrMore, Section, Steps, Whole


class Train(Section):
    steps: Steps = 30_000
    batch_per_worker: Batch = 2
    accumulate: OneOrMore = Field(1, description="batches of a worker in a step, in turn, as of so many workers")
    log_every: OneOrMore = Field(50, description="steps between two lines of metrics")
    checkpoint_every: OneOrMore = Field(500, description="steps between two checkpoints")
    validate_every: OneOrMore = Field(500, description="steps between two validations")
    keep_checkpoints: OneOrMore = Field(2, description="number of checkpoints kept")
    validation_images: OneOrMore = Field(8, description="number of pictures in the validation grid")

    @property
    def images_per_worker(self) -> int:
        """Of each kind, in a worker's step."""
        return self.batch_per_worker * self.accumulate


class Phase(Section):
    from_step: Count = Field(ge=1, description="first step of the phase, counted from 0")
    patch_px: Whole = Field(ge=32, multiple_of=16, description="side of a training patch, in pixels")
    batch_per_worker: Batch


class PretrainTrain(Train):
    progressive: tuple[Phase, ...] = Field(
        (), description="later patch and batch sizes: a list of {from_step, patch_px, batch_per_worker}"
    )

    @field_validator("progressive")
    @classmethod
    def _in_order(cls, phases: tuple[Phase, ...], info: ValidationInfo) -> tuple[Phase, ...]:
        starts = [phase.from_step for phase in phases]
        if starts != sorted(set(starts)):
            raise ValueError("its from_step must rise from phase to phase")
        steps = info.data.get("steps")
        if steps and starts and starts[-1] >= steps:
            raise ValueError(f"from_step {starts[-1]} is not before train.steps ({steps})")
        return phases


class ColabatorTrain(Train):
    steps: Steps = 5_000
    batch_per_worker: Batch = 1
