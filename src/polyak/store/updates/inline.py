"""Updates that are made when they are submitted, after it was seen whether the sources are finite."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

from polyak.kernels import Copies, Plan

from .finite import FiniteCheck
from .protocol import Ledger, Refused


class Inline:
    """Updates by this thread. See `Updates`.

    Args:
        plan: of the averages.
        copies: of what is copied.
        check: of the sources.
        ledger: of what came before.
    """

    def __init__(self, plan: Plan, copies: Copies, check: FiniteCheck, ledger: Ledger) -> None:
        self.plan = plan
        self._copies = copies
        self._check = check
        self.since = ledger.since
        self._pending, self._made, self._refused = ledger.pending, ledger.made, ledger.refused
        self._nothing = (0.0,) * len(ledger.pending)

    def resume(self, ledger: Ledger) -> Inline:
        """Who goes on from what was pending and made elsewhere."""
        return Inline(self.plan, self._copies, self._check, ledger)

    def submit(self, growth: Sequence[float], *, at: float, look: bool) -> Refused | None:
        """One update."""
        if look:
            refused = self._check.refusal()
            if refused is not None:
                return refused
        weights = [-math.expm1(-total) for total in map(operator.add, self._pending, growth)]
        self.plan.run(weights, self._made + 1)
        self._copies.run()
        self._pending, self._made, self.since = self._nothing, self._made + 1, at
        return None

    def late(self) -> Refused | None:
        """What others have left out, who made the updates before; here all is known at once."""
        names, self._refused = self._refused, ()
        return Refused(names) if names else None

    def ledger(self) -> Ledger:
        """What became of the updates."""
        return Ledger(self._pending, self._made, self.since, self._refused)

    def num_made(self) -> int:
        """How many updates were made."""
        return self._made

    def settle(self) -> None:
        """Nobody writes to the averages."""
