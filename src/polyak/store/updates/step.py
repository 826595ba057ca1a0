"""What the owner of the clock asks of a store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Step(NamedTuple):
    """One update.

    Attributes:
        growth: for each profile, in their order, `log(g(now) / g(previous))` since the update before; math.inf forgets
            everything.
        number: the count of updates with this one, from 1.
        look: whether the update is left out where a source holds an infinity or a NaN; only a device decides so.
    """

    growth: Sequence[float]
    number: int
    look: bool = False
