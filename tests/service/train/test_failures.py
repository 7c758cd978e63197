"""Which failures of workers deserve a restart, and what is told of them. Real workers: test_driver."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import WorkerGroupError

from corun_ray.core.data.images import BadImage
from corun_ray.core.training.checkpoint_record import CheckpointError
from corun_ray.core.training.checkpoints import DivergedCheckpoint
from corun_ray.service.data.sample_maker import TooManyBadFiles
from corun_ray.service.errors import find_root_cause
from corun_ray.service.pool.client import PoolError
from corun_ray.service.storage import DamagedFile, MissingFile, StorageError, locate
from corun_ray.service.train.controller import DIED, LastingFailure, RestartPolicy
from corun_ray.service.train.driver import _explain_failure
from corun_ray.service.train.failures import can_restart_help, describe_cause

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:6001"


def test_an_error_of_ray_in_the_driver_tells_where_the_run_stands(tmp_path):
    tracker = SimpleNamespace(list_missing=lambda: ["MLflow at http://m lacks 3 metrics (nobody listens)"])
    session = SimpleNamespace(tracker=tracker, run=locate(str(tmp_path)))
    lines = str(_explain_failure(session, ActorDiedError())).splitlines()
    assert lines[0] == "Ray: The actor died unexpectedly before finishing this task"
    assert lines[1].endswith("--resume sends it") and "no checkpoint yet" in lines[2]


def in_task(error: Exception) -> RayTaskError:
    """The error as it comes out of a task that got it from another task."""
    for _ in range(2):
        error = RayTaskError("f", "Traceback", error, proctitle="f", pid=1, ip="10.0.0.1").as_instanceof_cause()
    return error


@pytest.mark.parametrize(
    "error",
    [
        BadImage("truncated JPEG"),
        TooManyBadFiles("not one of the 3 clear images can be used"),
        CheckpointError("network.pth: does not fit"),
        DamagedFile("pool/step_00000500.json is no snapshot"),
        ValueError("nothing to learn from"),
        TypeError("forward() got an unexpected keyword"),
        RuntimeError("The size of tensor a (16) must match the size of tensor b (8)"),
        NotImplementedError("no double backward"),
    ],
)
def test_what_lies_in_data_settings_or_code_is_not_tried_again(error):
    assert not can_restart_help(error)
    assert not can_restart_help(in_task(error))


@pytest.mark.parametrize(
    "error",
    [
        StorageError("cannot write s3://haze/runs: timeout"),
        MissingFile("cannot read /data/a.png: no such file"),
        PoolError("a shard is away"),
        ConnectionResetError("reset"),
        MemoryError(),
        RuntimeError(GLOO),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        torch.distributed.DistBackendError("NCCL timeout"),
        torch.OutOfMemoryError("CUDA out of memory"),
        ActorDiedError(),
    ],
)
def test_what_lies_in_places_machines_and_links_is_tried_again(error):
    assert can_restart_help(error)
    assert can_restart_help(in_task(error))


def test_the_cause_is_one_line_without_the_path_of_a_class():
    error = in_task(TooManyBadFiles("not one of the 3 clear images\ncan be used"))
    assert describe_cause(error) == "not one of the 3 clear images can be used"
    noted = RuntimeError("The size of tensor a\nmust match")
    noted.add_note("(at the validation image s3://x/a.png)")
    assert (
        describe_cause(noted) == "RuntimeError: The size of tensor a must match (at the validation image s3://x/a.png)"
    )
    assert describe_cause(KeyError()) == "KeyError"
    diverged = DivergedCheckpoint("x: a is nan, not finite: its training has diverged; take an earlier checkpoint")
    assert describe_cause(diverged).endswith(
        "an earlier checkpoint: delete its folder, and --resume takes the one before"
    )
    text = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    raise x\na.b.Bad: one\n  two\nthree\n'
    assert find_root_cause(text) == "Bad: one, two, three"


def decide(policy: RestartPolicy, *failures: Exception) -> FailureDecision:
    wrapped = {rank: UserExceptionWithTraceback(one, "Traceback") for rank, one in enumerate(failures)}
    # It travels from the workers to Ray Train's controller.
    return policy.make_decision(pickle.loads(pickle.dumps(WorkerGroupError("failed", wrapped))))


class ListedErrors:
    """A board that lists what is posted."""

    def __init__(self) -> None:
        self.posted: list[tuple[int, str, str]] = []
        self.post_error = SimpleNamespace(remote=lambda *error: self.posted.append(error))


def test_a_worker_that_died_is_named_by_the_controller():
    board = ListedErrors()
    policy = RestartPolicy(FailureConfig(max_failures=2), board)
    died = WorkerHealthCheckFailedError("A worker health check failed.", RuntimeError("exit code 137"))
    assert policy.make_decision(WorkerGroupError("failed", {1: died, 0: RuntimeError(GLOO)})) is FailureDecision.RETRY
    ((rank, cause, text),) = board.posted
    assert rank == 1 and cause == DIED and "exit code 137" in text


def test_ray_train_restarts_workers_but_for_lasting_failures():
    policy = RestartPolicy(FailureConfig(max_failures=2), ListedErrors())
    assert decide(policy, RuntimeError(GLOO)) is FailureDecision.RETRY
    assert decide(policy, RuntimeError(GLOO), LastingFailure("truncated JPEG")) is FailureDecision.RAISE
    assert decide(policy, RuntimeError(GLOO)) is FailureDecision.RETRY
    assert decide(policy, RuntimeError(GLOO)) is FailureDecision.RAISE
