"""What training changes: schedule, one update, the moving average."""

import pytest
import torch

from corun_ray.core.corun import CORUN
from corun_ray.core.state import TrainState, cosine_lr, ema_step


def test_cosine_schedule() -> None:
    def lr(step: int) -> float:
        return cosine_lr(step, lr=5e-5, min_lr=1e-6, schedule_steps=50_000)

    assert lr(0) == 5e-5
    assert lr(25_000) == pytest.approx((5e-5 + 1e-6) / 2)
    assert lr(5_000) == pytest.approx(4.8800e-05, rel=1e-4)
    assert lr(50_000) == lr(80_000) == 1e-6
    rates = [lr(step) for step in range(0, 50_001, 500)]
    assert all(later < earlier for earlier, later in zip(rates, rates[1:], strict=False))


def test_the_rate_is_constant_where_both_ends_are_equal() -> None:
    assert {cosine_lr(step, 1e-4, 1e-4, 30_000) for step in (0, 1, 12_345, 30_000, 99_999)} == {1e-4}


def test_moving_average() -> None:
    teacher, student = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = [0.9 * t + 0.1 * s for t, s in zip(teacher.parameters(), student.parameters(), strict=True)]
    kept = [s.clone() for s in student.parameters()]
    ema_step(teacher, student, 0.9)
    torch.testing.assert_close(list(teacher.parameters()), expected)
    torch.testing.assert_close(list(student.parameters()), kept, rtol=0, atol=0)


def test_the_start_is_a_student_and_an_equal_teacher_that_does_not_learn() -> None:
    network = CORUN(3, 2)
    with torch.no_grad():
        network.last.dehaze_net.mapping.weight.fill_(0.5)
    state = TrainState.start(network)
    assert state.student is network and state.student.training and not state.teacher.training
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
    state.update({"scene": scene.square().mean(), "haze": 0.5 * transmission.mean()}, 1e-3, 0.75, batch_images=4)
    assert (state.step, state.num_images_seen) == (1, 4)

    # AdamW's first step moves every parameter that has a gradient by the learning rate, and no other: no decay.
    moved = state.student.first.dehaze_prox.step_lambda.detach() - before["first.dehaze_prox.step_lambda"]
    assert moved.abs().item() == pytest.approx(1e-3, rel=1e-3)
    for name, weight in state.student.state_dict().items():
        if name.endswith("mapping.weight"):
            assert (weight - before[name]).abs().max().item() == pytest.approx(1e-3, rel=1e-2), name
        elif not name.endswith("step_lambda"):
            assert torch.equal(weight, before[name]), name  # behind output layers that were still zero
    for name, weight in state.teacher.state_dict().items():
        torch.testing.assert_close(weight, 0.75 * before[name] + 0.25 * state.student.state_dict()[name])
    assert all(p.grad is None for p in state.teacher.parameters())


def test_an_update_forgets_the_gradients_of_the_last() -> None:
    state = TrainState.start(CORUN(2, 2))
    weight = state.student.last.dehaze_net.mapping.weight
    for factor in (1.0, 3.0):
        state.update({"a": factor * weight.sum(), "b": weight.sum()}, lr=1e-3, ema=0.9, batch_images=1)
        assert weight.grad is not None and (weight.grad == factor + 1).all()
    assert state.optimizer.param_groups[0]["lr"] == 1e-3
