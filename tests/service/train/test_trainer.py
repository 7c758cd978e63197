"""What Ray Train leaves to the command that starts it, and what it does without."""

import signal
import threading

import pytest
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

from corun_ray.service.cluster.connect import LOCAL_MARK
from corun_ray.service.train.controller import QuickPolicy
from corun_ray.service.train.process_group import NodeTorchConfig
from corun_ray.service.train.stopping import TrainingStop
from corun_ray.service.train.trainer import LeanTrainer, StoppableTrainer

ARGUMENTS = {
    "train_loop_per_worker": print,
    "torch_config": NodeTorchConfig(),
    "scaling_config": ScalingConfig(num_workers=1),
    "run_config": RunConfig(),
}


def test_ctrl_c_stays_the_command_s():
    handler = signal.getsignal(signal.SIGINT)
    StoppableTrainer._register_sigint_handler(None, None)
    assert signal.getsignal(signal.SIGINT) is handler
    assert hasattr(TorchTrainer, "_register_sigint_handler"), "Ray calls it by another name now"


@pytest.mark.parametrize(
    ("is_local", "left_out", "added"),
    [
        (False, {"DatasetsCallback"}, {"StartCallback"}),
        (True, {"DatasetsCallback", "PlacementGroupCleanerCallback"}, {"StartCallback", "ForgetLocalSettings"}),
    ],
)
def test_what_a_training_has_no_use_for_is_not_started(is_local, left_out, added, monkeypatch):
    for name in (LOCAL_MARK, "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    if is_local:
        monkeypatch.setenv(LOCAL_MARK, "1")
    theirs = {type(one).__name__ for one in TorchTrainer(**ARGUMENTS)._create_default_callbacks()}
    ours = {type(one).__name__ for one in LeanTrainer(None, TrainingStop(), **ARGUMENTS)._create_default_callbacks()}
    assert (theirs - ours, ours - theirs) == (left_out, added)


def test_the_workers_of_a_local_ray_do_not_wait_for_their_registration(monkeypatch):
    is_registered, sent = threading.Event(), []

    def register(policy, context):
        is_registered.wait(10)
        sent.append(context)

    monkeypatch.setattr(FixedScalingPolicy, "after_controller_start", register)
    monkeypatch.setattr(FixedScalingPolicy, "_maybe_send_resource_request", lambda policy: sent.append("again"))
    policy = QuickPolicy(ScalingConfig(num_workers=2))
    policy.after_controller_start("run")

    decision = policy.make_decision_for_non_running_worker_group()
    assert decision.num_workers == 2 and sent == []

    is_registered.set()
    policy._registration.join()
    policy.make_decision_for_non_running_worker_group()
    assert sent == ["run", "again"]
