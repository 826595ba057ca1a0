"""Updates that the device decides about: the host adds growth, and waits for nothing.

A step is bad where a source holds a NaN or an infinity. Then averages and copies stay as they are, bit for bit, and the
growth stays pending: the next update applies the sum. Because growth and verdict are in device memory, all of it can be
captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyak.kernels import Control, SettledCopies, Triton


class Guard:
    """The control of one store's updates, and what it controls.

    Args:
        kernel: of all averages.
        copies: targets and sources, which a device can copy.
        seed: of stochastic rounding.
        pending: growth that no update has applied yet, one a profile.
        number: of updates made so far.
    """

    def __init__(
        self,
        kernel: Triton,
        copies: tuple[Sequence[Tensor], Sequence[Tensor]],
        *,
        seed: int,
        pending: Sequence[float],
        number: int,
    ) -> None:
        self._kernel = kernel
        self._copies = SettledCopies(*copies)
        self._control = Control(len(pending), device=kernel.device, seed=seed, pending=pending, number=number)
        self._num_bad = 0
        # No update is due, so this does nothing but compile the kernels, which cannot be done in a capture.
        self.run(look=True)
        self._kernel.bad_names()

    def add(self, growths: Sequence[float]) -> None:
        """Adds growth, one a profile, to what is pending: an update is due."""
        self._control.add(growths)

    @torch.no_grad()
    def run(self, *, look: bool) -> None:
        """Applies what is pending where an update is due, unless the step is bad.

        Args:
            look: for infinities and NaNs in the sources, before.
        """
        if look:
            self._kernel.find_bad(self._control)
        self._kernel.run_pending(self._control)
        self._copies.run(self._control)

    def note(self) -> None:
        """Makes `new_bad_names` know of the steps so far, once the device has made them; not during a capture."""
        self._control.note_skipped()

    def new_bad_names(self) -> list[str]:
        """The names of sources that were bad in steps that became known, without waiting, since this was asked last."""
        known, self._num_bad = self._num_bad, self._control.num_skipped()
        return self._kernel.bad_names() if self._num_bad > known else []

    def read(self) -> tuple[list[float], int]:
        """What is pending, one a profile, and how many updates were made; waits for the device."""
        return self._control.read()
