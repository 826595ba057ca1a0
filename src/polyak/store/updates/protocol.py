"""Who decides about an update: `Inline` at once, `OnDevice` on the device, `OnHost` in a worker beside the training.

A store has one of them at a time. Growth is given to it by `submit`; whatever it does not apply stays pending, and the
next update applies the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from polyak.errors import StateError
from polyak.kernels import Plan


class Ledger(NamedTuple):
    """What became of the updates so far.

    Attributes:
        pending: growth that no update has applied yet, one a profile.
        made: how many updates were made.
        since: the time from which the next growth counts.
        refused: the names of sources that were not finite in updates that were left out, and not told of yet.
        failure: the error that ended the work of a worker; it makes no more updates.
    """

    pending: tuple[float, ...]
    made: int = 0
    since: float = 0.0
    refused: tuple[str, ...] = ()
    failure: BaseException | None = None

    def checked(self) -> Ledger:
        """This ledger.

        Raises:
            StateError: an update failed.
        """
        check_intact(self.failure)
        return self


def check_intact(failure: BaseException | None) -> None:
    """Raises where a worker's update failed.

    Raises:
        StateError: it did.
    """
    if failure is not None:
        raise StateError(
            f"an update on the host failed: {type(failure).__name__}: {failure}. The averages may be a mixture of "
            "before and after it: load their last state by load_state_dict(), or begin again by reset()"
        ) from failure


class Refused(NamedTuple):
    """An update that was left out, because a source held an infinity or a NaN.

    Attributes:
        names: of such sources; none where they are parts that other ranks have.
    """

    names: tuple[str, ...]


class Updates(Protocol):
    """Adds growth to what is pending and applies all of it. Nobody else knows what is pending and what was made."""

    @property
    def plan(self) -> Plan:
        """Which tensor is updated by which kernel."""
        ...

    @property
    def since(self) -> float:
        """The time from which the next growth counts.

        It is that of the last update that was made, where that is known at once, or else of the last one submitted.
        """
        ...

    def submit(self, growth: Sequence[float], *, at: float, look: bool) -> Refused | None:
        """Applies growth, and what was pending, to every average.

        Args:
            growth: for each profile `log(g(at) / g(since))`; math.inf forgets everything.
            at: the time of the update.
            look: whether the update is left out where a source holds an infinity or a NaN.

        Returns:
            Why it was left out, where that is known at once; nothing has changed then.

        Raises:
            StateError: an earlier update failed.
        """
        ...

    def resume(self, ledger: Ledger) -> Updates:
        """A successor that continues from this ledger; this object keeps its own."""
        ...

    def late(self) -> Refused | None:
        """What became known, since this was asked last, of updates that were decided later; waits for nothing."""
        ...

    def ledger(self) -> Ledger:
        """What became of the updates; waits for whoever decides."""
        ...

    def num_made(self) -> int:
        """How many updates were made; waits only where that is not known.

        Raises:
            StateError: that is not known, because an update failed.
        """
        ...

    def settle(self) -> None:
        """Waits until nobody writes to the averages any more, whatever became of the updates."""
        ...
