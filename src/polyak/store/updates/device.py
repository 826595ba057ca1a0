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

from .inline import Inline
from .protocol import Ledger, Refused


class OnDevice:
    """Updates by one device. See `Updates`.

    Attributes:
        is_advanced: whether `advance` was called, so that a captured `run` gets growth.

    Args:
        inline: what made the updates so far.
        kernel: of all averages.
        copies: targets and sources, which a device can copy.
        seed: of stochastic rounding.
    """

    def __init__(
        self, inline: Inline, kernel: Triton, copies: tuple[Sequence[Tensor], Sequence[Tensor]], *, seed: int
    ) -> None:
        pending, made, self.since, self._refused, _ = inline.ledger()
        self._inline = inline
        self.plan = inline.plan
        self.is_advanced = False
        self._kernel = kernel
        self._copies = SettledCopies(*copies)
        self._control = Control(len(pending), device=kernel.device, seed=seed, pending=pending, number=made)
        self._num_bad = 0
        # No update is due, so this does nothing but compile the kernels, which cannot be done in a capture.
        self.run(look=True)
        self._kernel.bad_names()

    def resume(self, ledger: Ledger) -> Inline:
        """Who goes on from what was pending and made elsewhere; the device does not decide any more."""
        return self._inline.resume(ledger)

    def submit(self, growth: Sequence[float], *, at: float, look: bool) -> None:
        """One update, which the device makes or leaves out later."""
        self._add(growth, at=at)
        self.run(look=look)
        if look:
            self._control.note_skipped()

    def advance(self, growth: Sequence[float] | None, *, at: float) -> None:
        """What comes before each replay of a captured `run`.

        Args:
            growth: that the replay applies, one a profile; None where no update is due.
            at: the time of the update.
        """
        # Asks for the verdict on the last replay: a capture cannot record an event, and nothing runs after a replay.
        self._control.note_skipped()
        self.is_advanced = True
        if growth is not None:
            self._add(growth, at=at)

    def _add(self, growth: Sequence[float], *, at: float) -> None:
        self._control.add(growth)
        self.since = at

    @torch.no_grad()
    def run(self, *, look: bool) -> None:
        """Applies what is pending where an update is due, unless the step is bad; it can be captured.

        Args:
            look: for infinities and NaNs in the sources, before.
        """
        if look:
            self._kernel.find_bad(self._control)
        self._kernel.run_pending(self._control)
        self._copies.run(self._control)

    def late(self) -> Refused | None:
        """What became known of updates that the device has left out, once it has made the steps so far."""
        self._collect()
        names, self._refused = self._refused, ()
        return Refused(names) if names else None

    def _collect(self) -> None:
        known, self._num_bad = self._num_bad, self._control.num_skipped()
        if self._num_bad > known:
            self._refused = tuple(dict.fromkeys((*self._refused, *self._kernel.bad_names())))

    def ledger(self) -> Ledger:
        """What became of the updates; waits for the device."""
        pending, made = self._control.read()
        self._collect()
        return Ledger(tuple(pending), made, self.since, self._refused)

    def num_made(self) -> int:
        """How many updates were made; waits for the device."""
        return self.ledger().made

    def settle(self) -> None:
        """Nothing to wait for: whoever reads the averages does so on the device, after what was submitted."""
