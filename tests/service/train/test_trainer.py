"""What Ray Train leaves to the command that starts it."""

import signal

from ray.train.torch import TorchTrainer

from corun_ray.service.train.trainer import StoppableTrainer


def test_ctrl_c_stays_the_command_s():
    handler = signal.getsignal(signal.SIGINT)
    StoppableTrainer._register_sigint_handler(None, None)
    assert signal.getsignal(signal.SIGINT) is handler
    assert hasattr(TorchTrainer, "_register_sigint_handler"), "Ray calls it by another name now"
