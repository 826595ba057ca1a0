"""Growth that is pending, and whether it may be applied, on the device: for CUDA graphs and for steps that are skipped.

The host adds growth and never waits. The device applies all that is pending, or, where a source or an optimizer said
that this step is bad, nothing: then it stays pending, and the next update applies the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from polyak.kernels.rounding import mix64


@dataclass(frozen=True)
class ControlState:
    """What a `Control` holds, on the host.

    Attributes:
        pending: growth that no update has applied yet, one a profile.
        number: updates made.
        skipped: updates that were not made, because the step was bad.
    """

    pending: tuple[float, ...]
    number: int
    skipped: int


class Control:
    """The pending growth of each profile, the number of the update, and the flag of a bad step, in device memory.

    Everything is in the order of the stream that it is called on.

    Args:
        num_profiles: how many averages each source has.
        device: where the averages are.
        seed: of the random bits, where averages are rounded stochastically.
        number: updates made so far.
    """

    def __init__(self, num_profiles: int, *, device: torch.device, seed: int = 0, number: int = 0) -> None:
        mixed = mix64(seed & ((1 << 64) - 1))
        self.device = device
        self.flag = torch.zeros(1, dtype=torch.int32, device=device)
        self.weights = torch.full((num_profiles,), -1.0, device=device)
        # With a minus, so that one operation gives the weight, with another minus: expm1(-growth).
        self.minus_pending = torch.zeros(num_profiles, dtype=torch.float64, device=device)
        self.minus_weights = torch.zeros(num_profiles, dtype=torch.float64, device=device)
        self.counts = torch.tensor([number, 0, 0, mixed - (mixed >> 63 << 64), 1], dtype=torch.int64, device=device)
        self.never = torch.zeros(1, device=device)
        self._each = list(self.minus_pending.unbind())
        self._known = 0
        on_cuda = device.type == "cuda"
        self._seen = torch.zeros(1, dtype=torch.int64, device="cpu", pin_memory=on_cuda)
        self._event = torch.cuda.Event() if on_cuda else None

    def add(self, growths: Sequence[float], *, number: int | None = None) -> None:
        """Adds growth to what is pending, without waiting: it travels in the arguments of a launch.

        Args:
            growths: one a profile; math.inf forgets everything before.
            number: of the update that will apply it; default: one more than were made.
        """
        torch._foreach_add_(self._each, [-growth for growth in growths])
        if number is not None:
            self.counts[:1].fill_(number - 1)

    def num_skipped(self) -> int:
        """Updates skipped, as far as it is known without waiting; on a GPU that is some calls late."""
        if self._event is None:
            return int(self.counts[1])
        if self._event.query() and not torch.cuda.is_current_stream_capturing():
            self._known = int(self._seen)
            self._seen.copy_(self.counts[1:2], non_blocking=True)
            self._event.record(torch.cuda.current_stream(self.device))
        return self._known

    def read(self) -> ControlState:
        """What is pending, and how many updates were made and skipped; waits for the device."""
        number, skipped = map(int, self.counts[:2].cpu())
        # Not -0.0 for nothing.
        return ControlState(tuple(0.0 - float(minus) for minus in self.minus_pending.cpu()), number, skipped)

    def write(self, state: ControlState) -> None:
        """Takes what `read` gave, for resuming; waits for the device."""
        self.minus_pending.copy_(torch.tensor([-growth for growth in state.pending], dtype=torch.float64))
        self.counts[:2].copy_(torch.tensor([state.number, state.skipped]))


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
