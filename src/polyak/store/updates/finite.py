"""Whether sources are finite: what decides, where it is known at once, that an update is left out for a NaN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polyak.kernels import FiniteTest, Row
from polyak.ranks import any_rank

from .protocol import Refused


class FiniteCheck:
    """Whether sources are finite, on all ranks over which they lie.

    Args:
        rows: what is averaged.
        meshes: the ranks.
    """

    def __init__(self, rows: Sequence[Row], meshes: Sequence[Any]) -> None:
        self.meshes = meshes
        self._rows = rows
        self._test: FiniteTest | None = None

    def names(self) -> tuple[str, ...]:
        """Of the sources here that hold an infinity or a NaN."""
        if self._test is None:
            self._test = FiniteTest([row.source for row in self._rows])
        return tuple(self._rows[position].name for position in self._test.find())

    def refusal(self) -> Refused | None:
        """What all ranks get alike where the source of any of them is not finite; they send one number each."""
        names = self.names()
        return Refused(names) if any_rank(len(names) > 0, self.meshes) else None
