"""One thread that makes updates in their order, and what it leaves to be known."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from torch.profiler import record_function

from .step import Step
from .transfer import Copied


@dataclass
class Ledger:
    """What became of the updates so far; the worker writes it, and whoever has waited for it reads it.

    Attributes:
        pending: growth that no update has applied yet, one a profile.
        made: the number of the last update that was made; None where none was since the averages were loaded.
        bad: for each step that was left out and not told of yet, the names of what was not finite.
        failure: the error that ended the work; nothing is done after it.
    """

    pending: list[float]
    made: int | None = None
    bad: list[list[str]] = field(default_factory=list[list[str]])
    failure: BaseException | None = None


class Staged(Protocol):
    """Sources in host memory, and the averages."""

    def non_finite(self) -> list[str]:
        """The names of averaged entries that hold a NaN or an infinity."""
        ...

    def run(self, weights: Sequence[float], number: int) -> None:
        """Updates averages and copies."""
        ...


class Worker:
    """A thread, made when it is needed; it ends with this object, after what it was given."""

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._process = 0

    def start(self, call: Callable[[], None]) -> Future[None]:
        """Gives it one more thing to do."""
        # A forked process has memory of its parent's thread, but no thread.
        if self._threads is None or self._process != os.getpid():
            self._threads, self._process = ThreadPoolExecutor(1, thread_name_prefix="polyak"), os.getpid()
        return self._threads.submit(call)


def apply(ledger: Ledger, staged: Staged, copied: Copied, step: Step) -> None:
    """One update, in the worker; it is left out where another has failed before."""
    try:
        # Also where another has failed: what was copied to may be written by others when this has returned.
        with record_function("polyak: wait for the copy"):
            copied.wait()
        if ledger.failure is not None:
            return
        with record_function("polyak: update on the host"):
            number = step.number if ledger.made is None else ledger.made + 1
            pending = [old + new for old, new in zip(ledger.pending, step.growth, strict=True)]
            bad = staged.non_finite() if step.look else []
            if bad:
                ledger.pending, ledger.made = pending, number - 1
                ledger.bad.append(bad)
            else:
                staged.run([-math.expm1(-growth) for growth in pending], number)
                ledger.pending, ledger.made = [0.0] * len(pending), number
    # Whatever it is, the next call says so.
    except BaseException as error:
        ledger.failure = ledger.failure or error
