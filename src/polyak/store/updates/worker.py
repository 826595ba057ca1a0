"""One thread that makes updates in their order, and what it leaves to be known."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from torch.profiler import record_function

from .transfer import Copied


@dataclass
class Progress:
    """How far the updates are; the worker writes it, and whoever has waited for it reads it.

    Attributes:
        pending: growth that no update has applied yet, one a profile.
        made: how many updates were made.
        refused: the names of what was not finite in steps that were left out and not told of yet.
        failure: the error that ended the work; nothing is done after it.
    """

    pending: Sequence[float]
    made: int
    refused: dict[str, None] = field(default_factory=dict[str, None])
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


def apply(progress: Progress, staged: Staged, copied: Copied, growth: Sequence[float], *, look: bool) -> None:
    """One update, in the worker; it is left out where another has failed before."""
    try:
        # Also where another has failed: what was copied to may be written by others when this has returned.
        with record_function("polyak: wait for the copy"):
            copied.wait()
        if progress.failure is not None:
            return
        with record_function("polyak: update on the host"):
            pending = [old + new for old, new in zip(progress.pending, growth, strict=True)]
            bad = staged.non_finite() if look else []
            if bad:
                progress.pending = pending
                progress.refused.update(dict.fromkeys(bad))
            else:
                staged.run([-math.expm1(-total) for total in pending], progress.made + 1)
                progress.pending, progress.made = [0.0] * len(pending), progress.made + 1
    # Whatever it is, the next call says so.
    except BaseException as error:
        progress.failure = progress.failure or error
