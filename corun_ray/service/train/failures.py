"""What a failed worker means: whether a restart can help, and what is told of it.

A restart helps against what was a process's, a machine's or a link's fault. It cannot help against the rest: bad data,
a mistake in the job or in a user's own network, a scorer that refuses an image. The samples, the random numbers and
the code of the next start are the same, so it would fail at the same step.
"""

import torch
import torch.distributed as dist
from ray.exceptions import RayTaskError

from corun_ray.core.networks.finite import NotFinite
from corun_ray.core.training.checkpoints import DivergedCheckpoint
from corun_ray.core.training.divergence import Diverged, ScoreNotFinite
from corun_ray.service.data.stream import DisorderedStream
from corun_ray.service.errors import JobFailed
from corun_ray.service.pool.client import PoolError
from corun_ray.service.storage import DamagedFile, StorageError

CURABLE = (
    *(StorageError, PoolError, OSError, MemoryError),
    *(DisorderedStream, dist.DistError, torch.OutOfMemoryError, torch.AcceleratorError),
)
"""Errors of places, machines, links and devices, which may be well at the next start. So may any error of Ray's own."""
DEVICE_WORDS = ("gloo", "nccl", "cuda", "cudnn", "cublas", "hip error", "out of memory", "connection")
"""Words of torch's plain `RuntimeError` where a link or a device fails. Others are of wrong shapes and types."""
MAX_REASON_CHARS = 2000
SMALLER_STEPS = (
    "; --resume with a lower optim.lr or with optim.clip_norm (where the last checkpoint diverges at once, delete its "
    "folder: the one before is taken)"
)
"""The advice for a training that has diverged."""
EARLIER_CHECKPOINT = ": delete its folder, and --resume takes the one before"
"""The advice for a run whose last checkpoint has diverged; an earlier version wrote it."""
ANOTHER_SCORER = "; another scorer of coherence is needed, or a data set without the image"
"""The advice for a scorer that has no number for an image."""


class FailedForGood(JobFailed):
    """A job whose failure lies in its data, its settings or its code, so that it was not started again."""


def find_cause(error: BaseException) -> BaseException:
    """Return the error that user code raised, out of those of Ray and Ray Data around it."""
    while True:
        inner = error.cause if isinstance(error, RayTaskError) else error.__cause__
        is_around = isinstance(error, RayTaskError) or _is_of_ray(error)
        if not is_around or not isinstance(inner, BaseException):
            return error
        error = inner


def _is_of_ray(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] == "ray"


def can_restart_help(error: BaseException) -> bool:
    """Tell whether workers that start again may not meet this error."""
    cause = find_cause(error)
    if isinstance(cause, DamagedFile):
        return False
    if isinstance(cause, CURABLE) or _is_of_ray(cause):
        return True
    return isinstance(cause, RuntimeError) and any(word in str(cause).lower() for word in DEVICE_WORDS)


def describe_cause(error: BaseException) -> str:
    """Return the reason of an error on one line, with the notes that were added to it.

    Errors of this package are their own text; others begin with their kind.
    """
    cause = find_cause(error)
    text = " ".join(" ".join([str(cause), *getattr(cause, "__notes__", [])]).split())[:MAX_REASON_CHARS]
    if isinstance(cause, Diverged | NotFinite):
        text += SMALLER_STEPS
    elif isinstance(cause, DivergedCheckpoint):
        text += EARLIER_CHECKPOINT
    elif isinstance(cause, ScoreNotFinite):
        text += ANOTHER_SCORER
    kind = type(cause)
    if text and kind.__module__.partition(".")[0] == "corun_ray":
        return text
    return f"{kind.__name__}: {text}" if text else kind.__name__
