"""Growth that is pending, and whether it may be applied, on the device: for CUDA graphs and for steps that are bad.

The host adds growth and never waits. The device applies all that is pending, or, where a source is not finite, nothing:
then it stays pending, and the next update applies the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from polyak.kernels.rounding import mix64

from .encoding import LEAVES, MADE, MIXED_SEED, SKIPPED, STEP_KEY, VERDICT, signed


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


class Control:
    """The pending growth of each profile, the number of the update, and the flag of a bad step, in device memory.

    Everything is in the order of the stream that it is called on.

    Args:
        num_profiles: how many averages each source has.
        device: where the averages are.
        seed: of the random bits, where averages are rounded stochastically.
        pending: growth that no update has applied yet, one a profile; nothing by default.
        number: updates made so far.
    """

    def __init__(
        self,
        num_profiles: int,
        *,
        device: torch.device,
        seed: int = 0,
        pending: Sequence[float] = (),
        number: int = 0,
    ) -> None:
        self.device = device
        self.flag = torch.zeros(1, dtype=torch.int32, device=device)
        self.weights = torch.full((num_profiles,), LEAVES, device=device)
        # With a minus, so that one operation gives the weight, with another minus: expm1(-growth). The last is no
        # growth, and says by not being zero that an update is due.
        before = [-growth for growth in pending] or [0.0] * num_profiles
        self.minus_pending = torch.tensor([*before, 0.0], dtype=torch.float64, device=device)
        self.minus_weights = torch.zeros(num_profiles + 1, dtype=torch.float64, device=device)
        counts = {MADE: number, SKIPPED: 0, STEP_KEY: 0, MIXED_SEED: signed(mix64(seed)), VERDICT: 0}
        self.counts = torch.tensor([counts[each] for each in sorted(counts)], dtype=torch.int64, device=device)
        self._each = list(self.minus_pending.unbind())
        self._skipped = Seen(self.counts[SKIPPED : SKIPPED + 1])

    def add(self, growths: Sequence[float]) -> None:
        """Adds growth, one a profile, for an update that is due; it travels in the arguments of a launch."""
        torch._foreach_add_(self._each, [*(-growth for growth in growths), -1.0])

    def note_skipped(self) -> None:
        """Makes `num_skipped` count the updates so far, once the device has made them; not during a capture."""
        self._skipped.order()

    def num_skipped(self) -> int:
        """Updates skipped before the last `note_skipped` that the device has reached; does not wait for it."""
        return self._skipped.read()

    def read(self) -> tuple[list[float], int]:
        """What is pending, one a profile, and how many updates were made; waits for the device.

        Afterwards `num_skipped` counts all updates.
        """
        self.note_skipped()  # before the copies that are waited for, on the same stream
        # Not -0.0 for nothing.
        return [0.0 - float(minus) for minus in self.minus_pending[:-1].cpu()], int(self.counts[MADE])


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
