"""Growth that is pending, and whether it may be applied, on the device: for CUDA graphs and for steps that are bad.

The host adds growth and never waits. The device applies all that is pending, or, where a source is not finite, nothing:
then it stays pending, and the next update applies the sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polyak.kernels.rounding import mix64

from .encoding import LEAVES, MADE, MIXED_SEED, SKIPPED, STEP_KEY, VERDICT, signed
from .seen import Seen


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
