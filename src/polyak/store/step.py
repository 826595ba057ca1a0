"""What the owner of the clock asks of a store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One update.

    Attributes:
        growth: for each profile, `log(g(now) / g(previous))` since the update before; math.inf forgets everything.
        number: the count of updates with this one, from 1.
        look: whether the update is left out where a source holds an infinity or a NaN; only a device decides so.
    """

    growth: Mapping[str, float]
    number: int
    look: bool = False
