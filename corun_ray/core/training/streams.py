"""Work on a second stream of a GPU, beside the main one: copies of the next batch, or the teacher with its scorers.

Kernels of one stream run in their order, those of two streams in any order. So there are two rules:

- Work that reads what the other stream makes, waits for it first.
- A tensor whose memory comes from one stream and that the other one reads, is lent. Otherwise the allocator would give
  its memory to a new tensor as soon as Python drops it, while the reader may still be at work.

What follows these rules here needs no GPU: it is told a `SideStream`, of which tests have one that takes notes.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

Columns = Mapping[str, np.ndarray | Tensor]
"""A batch: arrays on the host, some of them replaced by tensors on a device."""

PIXEL_DIMS = 3
"""Columns of so many dimensions and more, `B H W`, are images: they are worth a copy of their own."""


class SideStream(Protocol):
    """A second stream of a device. The main one is the stream in which the methods are called."""

    def use(self) -> AbstractContextManager[Any]:
        """Put the work within on this stream."""

    def follow(self) -> None:
        """Let this stream's next work wait for the main stream's work so far."""

    def mark(self) -> Any:
        """Return a mark of this stream's work so far."""

    def join(self, mark: Any) -> None:
        """Let the main stream's next work wait for a mark."""

    def borrow(self, tensors: Iterable[Tensor]) -> None:
        """Keep the memory of the main stream's tensors for what this stream does until they are dropped."""

    def lend(self, tensors: Iterable[Tensor]) -> None:
        """Keep the memory of this stream's tensors for what the main stream does until they are dropped."""

    def copy(self, array: np.ndarray) -> Tensor:
        """Copy an array to the device, in the stream in use, without waiting for the copy."""


class CudaStream:
    """The `SideStream` of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def use(self) -> AbstractContextManager[Any]:
        """See `SideStream`."""
        return torch.cuda.stream(self._stream)

    def follow(self) -> None:
        """See `SideStream`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def mark(self) -> torch.cuda.Event:
        """See `SideStream`."""
        return self._stream.record_event()

    def join(self, mark: torch.cuda.Event) -> None:
        """See `SideStream`."""
        torch.cuda.current_stream(self._device).wait_event(mark)

    def borrow(self, tensors: Iterable[Tensor]) -> None:
        """See `SideStream`."""
        for tensor in tensors:
            tensor.record_stream(self._stream)

    def lend(self, tensors: Iterable[Tensor]) -> None:
        """See `SideStream`."""
        for tensor in tensors:
            tensor.record_stream(torch.cuda.current_stream(self._device))

    def copy(self, array: np.ndarray) -> Tensor:
        """See `SideStream`.

        Only from pinned memory does a copy run beside other work. torch keeps that memory until the copy is done.
        """
        dtype = torch.from_numpy(array[:0].copy()).dtype
        pinned = torch.empty(array.shape, dtype=dtype, pin_memory=True)
        np.copyto(pinned.numpy(), array)
        return pinned.to(self._device, non_blocking=True)


def open_stream(device: torch.device) -> SideStream | None:
    """Open a second stream on a GPU; return None for a CPU, which has none."""
    return CudaStream(device) if device.type == "cuda" else None


# --- Copies one batch ahead ---


class _Copy(NamedTuple):
    """A batch whose images are on their way to the device."""

    columns: dict[str, np.ndarray | Tensor]
    mark: Any
    """The end of the copies in the side stream."""


def copy_ahead(batches: Iterable[Columns], side: SideStream | None) -> Iterator[Columns]:
    """Yield batches whose images are on the device: each is copied while the step before runs.

    So one batch more than is yielded is taken from `batches`, and no batch is left out or comes in another order.
    Without a side stream, batches are handed on as they are, none ahead of its step.
    """
    if side is None:
        yield from batches
        return

    under_way: _Copy | None = None
    for batch in batches:
        following = _start_copy(batch, side)
        if under_way is not None:
            yield _finish_copy(under_way, side)
        under_way = following
    if under_way is not None:
        yield _finish_copy(under_way, side)


def _start_copy(batch: Columns, side: SideStream) -> _Copy:
    """Start copying a batch's images. The rest, such as keys, stays on the host."""
    columns = dict(batch)
    with side.use():
        for name, column in batch.items():
            if isinstance(column, np.ndarray) and column.ndim >= PIXEL_DIMS:
                columns[name] = side.copy(column)
    return _Copy(columns, side.mark())


def _finish_copy(copy: _Copy, side: SideStream) -> Columns:
    """Let the main stream wait for a copy, and lend it the images."""
    side.join(copy.mark)
    side.lend(column for column in copy.columns.values() if isinstance(column, Tensor))
    return copy.columns
