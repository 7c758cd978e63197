"""Copies one batch ahead: what waits for what, and whose memory is whose, without a GPU."""

from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from corun_ray.core.training.streams import Columns, copy_ahead, open_stream
from tests.streams import UNWRITTEN, LateStream


def make_batches(count: int, taken: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield batches of two images of their number each, with keys; note when each is taken."""
    for number in range(count):
        if taken is not None:
            taken.append(f"take {number}")
        images = np.full((2, 4, 4, 3), number, np.uint8)
        yield {
            "index": np.arange(2),
            "key": np.array([f"a{number}", "b"]),
            "hazy": images,
            "transmission": images[..., 0],
        }


def test_a_batch_is_read_after_its_copy_and_its_memory_is_kept_for_late_kernels() -> None:
    stream, kernels, keys = LateStream(), [], []
    for batch in copy_ahead(make_batches(5), stream):
        assert isinstance(batch["index"], np.ndarray), "what is no image stays on the host"
        keys.append(batch["key"].tolist())
        for name in ("hazy", "transmission"):
            image = batch[name]
            assert isinstance(image, torch.Tensor)
            kernels.append(stream.find_memory(image))
        del batch, image

    # The main stream is so late that all its kernels run now.
    assert [set(kernel.flat) for kernel in kernels] == [{number} for number in range(5) for _ in range(2)]
    assert keys == [[f"a{number}", "b"] for number in range(5)]
    assert len({id(kernel) for kernel in kernels}) == 10, "no memory was used twice"


def test_the_rules_are_needed() -> None:
    """Without a wait or without lending, the stream that stands for a GPU would give wrong images."""
    stream = LateStream()
    stream.join = lambda mark: None  # type: ignore[method-assign]
    first = next(copy_ahead(make_batches(2), stream))
    assert set(first["hazy"].flatten().tolist()) == {UNWRITTEN}

    stream, kernels = LateStream(), []
    stream.lend = lambda tensors: None  # type: ignore[method-assign]
    for batch in copy_ahead(make_batches(5), stream):
        kernels.append(stream.find_memory(batch["hazy"]))  # type: ignore[arg-type]
        del batch
    assert [set(kernel.flat) for kernel in kernels] != [{number} for number in range(5)]


@pytest.mark.parametrize("count", [0, 1, 4])
def test_one_batch_is_taken_ahead_and_none_is_lost(count: int) -> None:
    events: list[str] = []
    for number, batch in enumerate(copy_ahead(make_batches(count, events), LateStream())):
        assert batch["key"].tolist()[0] == f"a{number}"
        events.append(f"step {number}")
    ahead = [f"take {number}" for number in range(count)]
    expected = ahead[:1]
    for number in range(count):
        expected += [*ahead[number + 1 : number + 2], f"step {number}"]
    assert events == expected


def test_a_cpu_has_no_second_stream_and_takes_no_batch_ahead() -> None:
    assert open_stream(torch.device("cpu")) is None
    events: list[str] = []
    for number, batch in enumerate(copy_ahead(make_batches(3, events), None)):
        assert isinstance(batch["hazy"], np.ndarray)
        events.append(f"step {number}")
    assert events == ["take 0", "step 0", "take 1", "step 1", "take 2", "step 2"]


def test_a_gpu_s_streams_wait_for_each_other_the_right_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    main, side, tensor, mark = Mock(), Mock(), Mock(), Mock()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    stream = open_stream(torch.device("cuda", 0))
    assert stream is not None

    stream.follow()
    side.wait_stream.assert_called_once_with(main)
    assert stream.mark() is side.record_event.return_value
    stream.join(mark)
    main.wait_event.assert_called_once_with(mark)
    assert not main.wait_stream.called and not side.wait_event.called

    stream.borrow([tensor])
    tensor.record_stream.assert_called_once_with(side)
    stream.lend([tensor])
    tensor.record_stream.assert_called_with(main)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_copies_on_a_gpu_hold_their_images() -> None:
    device, sums = torch.device("cuda"), []
    for batch in copy_ahead(make_large_batches(20), open_stream(device)):
        image = batch["hazy"]
        assert isinstance(image, torch.Tensor) and image.is_cuda
        torch.cuda._sleep(10_000_000)  # kernels come late
        sums.append(image.float().mean())
    assert torch.stack(sums).tolist() == [float(number) for number in range(20)]


def make_large_batches(count: int) -> Iterator[Columns]:
    """Yield batches of images of their number, 12 MiB each."""
    for number in range(count):
        yield {"hazy": np.full((4, 1024, 1024, 3), number, np.uint8)}
