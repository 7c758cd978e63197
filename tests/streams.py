"""A second stream without a GPU: its work is late, and its memory is used again as soon as its rules allow."""

import contextlib
import weakref
from collections.abc import Iterable, Iterator

import numpy as np
from torch import Tensor, from_numpy

UNWRITTEN = 205
"""What memory holds before its copy is done."""


class LateStream:
    """A `SideStream` that notes what it is told.

    A copy is done when the main stream waits for it, and not before. The memory of a tensor that was not lent is given
    to the next copy as soon as the tensor is dropped; that of a lent one stays with the main stream.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.is_used = False
        self._copies: list[tuple[np.ndarray, np.ndarray]] = []
        """Memory and content, in the order of the stream."""
        self._num_done = 0
        self._memory: dict[int, np.ndarray] = {}
        self._free: list[np.ndarray] = []
        self._lent: set[int] = set()
        self.borrowed: list[Tensor] = []
        self.lent: list[tuple[int, ...]] = []

    @property
    def where(self) -> str:
        """The stream that work is put on now."""
        return "side" if self.is_used else "main"

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        assert not self.is_used
        self.is_used = True
        try:
            yield
        finally:
            self.is_used = False

    def follow(self) -> None:
        self.notes.append("side waits for main")

    def mark(self) -> int:
        return len(self._copies)

    def join(self, mark: int) -> None:
        assert not self.is_used
        self.notes.append("main waits for side")
        for memory, content in self._copies[self._num_done : mark]:
            memory[...] = content
        self._num_done = max(mark, self._num_done)

    def borrow(self, tensors: Iterable[Tensor]) -> None:
        self.borrowed += tensors

    def lend(self, tensors: Iterable[Tensor]) -> None:
        assert not self.is_used
        for tensor in tensors:
            self._lent.add(tensor.data_ptr())
            self.lent.append(tuple(tensor.shape))

    def copy(self, array: np.ndarray) -> Tensor:
        assert self.is_used, "a copy in the main stream waits for its work"
        fitting = [number for number, memory in enumerate(self._free) if memory.shape == array.shape]
        memory = self._free.pop(fitting[0]) if fitting else np.empty_like(array)
        memory[...] = UNWRITTEN
        self._copies.append((memory, array.copy()))

        tensor = from_numpy(memory)
        self._memory[tensor.data_ptr()] = memory
        weakref.finalize(tensor, self._drop, tensor.data_ptr())
        return tensor

    def find_memory(self, tensor: Tensor) -> np.ndarray:
        """Return the memory of a tensor, as a kernel knows it that runs when the tensor may have been dropped."""
        return self._memory[tensor.data_ptr()]

    def _drop(self, address: int) -> None:
        if address not in self._lent:
            self._free.append(self._memory[address])
