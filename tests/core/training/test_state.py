"""What training changes: one update, the moving average."""

import pytest
import torch

from corun_ray.core.networks.corun import CORUN
from corun_ray.core.training.state import TrainState, update_ema


def test_moving_average() -> None:
    teacher, student = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = [0.9 * t + 0.1 * s for t, s in zip(teacher.parameters(), student.parameters(), strict=True)]
    kept = [s.clone() for s in student.parameters()]
    update_ema(teacher, student, 0.9)
    torch.testing.assert_close(list(teacher.parameters()), expected)
    torch.testing.assert_close(list(student.parameters()), kept, rtol=0, atol=0)


def test_the_teacher_takes_the_student_s_batch_statistics() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    state = TrainState.start(network)
    images = 5 + torch.rand(2, 3, 8, 8)
    state.backward({"loss": network(images).square().mean()})
    state.update(lr=1e-3, ema=0.999, batch_images=2)
    ours, theirs = dict(state.teacher.named_buffers()), dict(network.named_buffers())
    assert theirs["1.num_batches_tracked"] == 1 and theirs["1.running_mean"].abs().max() > 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert all(ours[name].data_ptr() != theirs[name].data_ptr() for name in ours)


def test_any_network_starts_in_training_mode_and_is_restored() -> None:
    def network() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3), torch.nn.Dropout()).eval()

    torch.manual_seed(0)
    state, resumed = TrainState.start(network()), TrainState.start(network())
    assert state.student.training and not state.teacher.training
    state.backward({"loss": state.student(torch.rand(1, 3, 8, 8)).mean()})
    state.update(lr=1e-3, ema=0.5, batch_images=3)
    resumed.restore(state.collect_tensors(), state.collect_values())
    assert (resumed.step, resumed.num_images_seen) == (1, 3)
    for ours, theirs in ((resumed.student, state.student), (resumed.teacher, state.teacher)):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(("clip_norm", "expected"), [(0.0, 5.0), (0.5, 0.5), (9.0, 5.0)])
def test_a_large_gradient_is_scaled_down_to_the_norm(clip_norm: float, expected: float) -> None:
    """After one step, AdamW's first moment is a tenth of the gradient that it was given."""
    state = TrainState.start(torch.nn.Linear(2, 1, bias=False))
    state.backward({"loss": (state.student.weight * torch.tensor([[3.0, -4.0]])).sum()})
    state.update(lr=1e-3, ema=0.9, batch_images=1, clip_norm=clip_norm)
    moment = state.optimizer.state[state.student.weight]["exp_avg"]
    torch.testing.assert_close(10 * moment, expected * torch.tensor([[0.6, -0.8]]))


def test_a_step_without_any_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to learn from: every loss has weight 0"):
        TrainState.start(CORUN(2, 2)).backward({})


def test_the_start_is_a_student_and_an_equal_teacher_that_does_not_learn() -> None:
    network = CORUN(3, 2)
    with torch.no_grad():
        network.last.dehaze_net.mapping.weight.fill_(0.5)
    state = TrainState.start(network)
    assert state.student is network and state.student.training and not state.teacher.training
    assert isinstance(state.teacher, CORUN)
    assert (state.teacher.stages, state.teacher.width, state.step, state.num_images_seen) == (3, 2, 0, 0)
    torch.testing.assert_close(state.teacher.state_dict(), network.state_dict(), rtol=0, atol=0)
    assert not any(p.requires_grad for p in state.teacher.parameters())
    assert all(p.requires_grad for p in network.parameters())
    ours = {p.data_ptr() for p in network.parameters()}
    assert not ours & {p.data_ptr() for p in state.teacher.parameters()}
    assert (state.optimizer.defaults["betas"], state.optimizer.defaults["weight_decay"]) == ((0.9, 0.999), 0)


def test_one_update() -> None:
    torch.manual_seed(0)
    state = TrainState.start(CORUN(2, 2))
    before = {name: w.clone() for name, w in state.student.state_dict().items()}
    hazy = torch.rand(1, 3, 8, 8)
    scene, transmission = state.student(hazy)
    state.backward({"scene": scene.square().mean(), "haze": 0.5 * transmission.mean()})
    state.update(1e-3, 0.75, batch_images=4)
    assert (state.step, state.num_images_seen) == (1, 4)

    # AdamW's first step moves every parameter that has a gradient by the learning rate, and no other: no decay.
    name = "first.dehaze_prox.step_lambda"
    moved = state.student.get_parameter(name).detach() - before[name]
    assert moved.abs().item() == pytest.approx(1e-3, rel=1e-3)
    for name, weight in state.student.state_dict().items():
        if name.endswith("mapping.weight"):
            assert (weight - before[name]).abs().max().item() == pytest.approx(1e-3, rel=1e-2), name
        elif not name.endswith("step_lambda"):
            assert torch.equal(weight, before[name]), name  # behind output layers that were still zero
    for name, weight in state.teacher.state_dict().items():
        torch.testing.assert_close(weight, 0.75 * before[name] + 0.25 * state.student.state_dict()[name])
    assert all(p.grad is None for p in state.teacher.parameters())


def test_gradients_add_up_until_an_update_uses_them() -> None:
    state = TrainState.start(CORUN(2, 2))
    weight = state.student.get_parameter("last.dehaze_net.mapping.weight")
    for factor in (1.0, 3.0):
        state.backward({"a": factor * weight.sum(), "b": weight.sum()}, share=0.5)
        state.backward({"a": weight.sum()}, share=0.25)
        assert weight.grad is not None and (weight.grad == 0.5 * (factor + 1) + 0.25).all()
        state.update(lr=1e-3, ema=0.9, batch_images=1)
        assert weight.grad is None
    assert state.optimizer.param_groups[0]["lr"] == 1e-3
