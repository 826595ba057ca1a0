"""A number in device memory that the host reads without waiting for the device."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class _Event(Protocol):
    """The methods of a CUDA event that are used."""

    def record(self, stream: torch.cuda.Stream | None) -> None: ...

    def query(self) -> bool: ...


class _Over:
    """The event of a CPU: always over, because each call returns with its work done."""

    def record(self, stream: torch.cuda.Stream | None) -> None:
        pass

    def query(self) -> bool:
        return True


def new_event(device: torch.device) -> _Event:
    """An event of a device; it counts as over until it is recorded."""
    return torch.cuda.Event() if device.type == "cuda" else _Over()


class Seen:
    """What the host knows of a number on a device that only grows.

    Two copies to the host may be in flight. The first is ordered again only after it has arrived, so that a host that
    is always ahead still learns something. Until then each call orders the second one again, so that the host knows
    the last value as soon as the device is done.

    Args:
        number: one int64, in the memory of the device.
    """

    def __init__(self, number: Tensor) -> None:
        self._number = number
        self._known = 0
        on_cuda = number.device.type == "cuda"
        self._copies = [
            (torch.zeros(1, dtype=torch.int64, device="cpu", pin_memory=on_cuda), new_event(number.device))
            for _ in range(2)
        ]

    def order(self) -> None:
        """Orders a copy of the number on the current stream; not during a capture, where events cannot be queried."""
        self.read()
        target, event = next((copy for copy in self._copies if copy[1].query()), self._copies[1])
        target.copy_(self._number, non_blocking=True)
        device = self._number.device
        event.record(torch.cuda.current_stream(device) if device.type == "cuda" else None)

    def read(self) -> int:
        """The largest number among the copies that have arrived so far."""
        self._known = max([self._known, *(int(target) for target, event in self._copies if event.query())])
        return self._known
