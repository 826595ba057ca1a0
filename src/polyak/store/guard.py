"""Updates that the device decides about: the host adds growth, and waits for nothing.

A step is bad where a source holds a NaN or an infinity. Then averages and copies stay as they are, bit for bit, and the
growth stays pending: the next update applies the sum. Because growth and verdict are in device memory, all of it can be
captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyak.kernels import Control, ControlState, SettledCopies, Triton


class Guard:
    """The control of one store's updates, and what it controls.

    Args:
        kernel: of all averages.
        copies: targets and sources, which a device can copy.
        num_profiles: how many averages each source has.
        seed: of stochastic rounding.
    """

    def __init__(
        self,
        kernel: Triton,
        copies: tuple[Sequence[Tensor], Sequence[Tensor]],
        *,
        num_profiles: int,
        seed: int,
    ) -> None:
        self._kernel = kernel
        self._copies = SettledCopies(*copies)
        self._num_bad = 0
        self.control = Control(num_profiles, device=kernel.device, seed=seed)
        # With nothing pending this does nothing but compile the kernels, which cannot be done in a capture.
        self._kernel.find_bad(self.control)
        self._kernel.run_pending(self.control)
        self._copies.run(self.control)
        self._kernel.bad_names()

    def add(self, growths: Sequence[float]) -> None:
        """Adds growth, one a profile, to what is pending."""
        self.control.add(growths)

    @torch.no_grad()
    def run(self, *, look: bool) -> None:
        """Applies what is pending, unless the step is bad.

        Args:
            look: for infinities and NaNs in the sources, before.
        """
        if look:
            self._kernel.find_bad(self.control)
        self._kernel.run_pending(self.control)
        self._copies.run(self.control)

    def has_new_bad(self) -> bool:
        """Whether more steps were bad than when this was asked last, as far as it is known without waiting."""
        known, self._num_bad = self._num_bad, self.control.num_skipped()
        return self._num_bad > known

    def bad_names(self) -> list[str]:
        """The names of sources that were found bad since this was asked last; waits for the device."""
        return self._kernel.bad_names()

    def read(self) -> ControlState:
        """What is pending, and how many updates were made and skipped; waits for the device."""
        return self.control.read()

    def write(self, pending: Sequence[float], number: int) -> None:
        """Takes up another state; waits for the device."""
        self.control.write(ControlState(tuple(pending), number, 0))
