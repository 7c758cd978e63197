"""The `serve` section of a job file: which model answers, where, with how many replicas, within which bounds."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field, field_validator

from corun_ray.config.types import OneOrMore, OptionalCount, Positive, Section, Text, Whole, Workers

PATH = re.compile(r"/|(/[A-Za-z0-9._-]+)+")


def _is_path(path: str) -> str:
    if not PATH.fullmatch(path):
        raise ValueError(f'"{path}" is not a path such as / or /dehazing (letters, digits, . _ -, no / at the end)')
    return path


class Serve(Section):
    model: Text = Field(description="MLflow URI, checkpoint or plain model folder, or .pth")
    host: Text = Field("127.0.0.1", description="address to listen at; 0.0.0.0: every one, with no authentication")
    port: Whole = Field(8000, ge=1, le=65535, description="TCP port of HTTP")
    path: Annotated[str, AfterValidator(_is_path)] = Field(
        "/", description="path below which it answers, for several applications on one cluster"
    )
    replicas: Workers = Field((1, 1), description="copies of the model; [low, high]: as many as the requests need")
    gpus_per_replica: float = Field(0.0, ge=0, description="GPUs of a replica, 0.5 is half of one; 0 runs on the CPU")
    cpus_per_replica: Positive = Field(1.0, description="CPUs of a replica, and its threads")
    max_batch: OneOrMore = Field(4, description="images of equal size that are restored together")
    batch_wait_s: float = Field(0.01, ge=0, description="seconds that an image waits for others to be restored with")
    max_upload_mib: OneOrMore = Field(32, description="largest file that is taken")
    max_megapixels: Positive = Field(25.0, description="largest image that is decoded")
    max_queued: OneOrMore = Field(32, description="requests that may wait; more are told to come back")
    timeout_s: Positive = Field(300.0, description="seconds until a request is given up")
    memory_mib: OptionalCount = Field(
        None, ge=64, description="of a batch at work, larger images are cut; null: 2816, or 3/4 of its share of a GPU"
    )

    @field_validator("gpus_per_replica")
    @classmethod
    def _a_share_or_whole_ones(cls, gpus: float) -> float:
        if gpus > 1 and not gpus.is_integer():
            raise ValueError(f"{gpus:g} is neither a share of one GPU nor a whole number of them")
        return gpus
