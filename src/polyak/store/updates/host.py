"""Averages on the host of a model that is elsewhere: updated by a worker, beside the training.

The sources are copied into one of two sets of host memory, and a worker updates the averages from it. Where both sets
are still in use, though one is copied, the host is too slow for an update at each step: then the update is left to a
later one, which applies the growth of both. So there is no queue that grows, and no step waits for the host. Where none
is copied it is the accelerator that is behind, and the thread that drives it waits, two updates ahead. It waits as well
where several processes train together: ranks of which each leaves out what it cannot do would have different averages.
"""

from __future__ import annotations

import copy
import functools
import math
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.profiler import record_function

from polyak.kernels import Copies, FiniteTest, Plan, Row
from polyak.ranks import is_alone

from .finite import FiniteCheck
from .protocol import Ledger, Refused, check_intact
from .transfer import Copied, Staging, Transfer


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


def apply(progress: Progress, staged: _Set, copied: Copied, growth: Sequence[float], *, look: bool) -> None:
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


NUM_SETS = 2


class OnHost:
    """The staging sets and the worker of one store. See `Updates`.

    While it exists each optimizer step of the process first makes its device wait until the copy that is under way has
    been made; the host itself does not wait there. It is every optimizer's, because one that holds copies of the
    parameters in float32 writes to the parameters, too.

    Attributes:
        room: host memory for each source, by name; free to use after `settle` and until the next `submit`.
        num_staging_bytes: of the staging sets.

    Args:
        transfer: from the sources.
        rows: what is averaged; their sources are replaced by staged ones.
        copies: what is copied, by name.
        check: of the sources where they are, for ranks that must leave out the same updates.
        seed: of stochastic rounding.
        ledger: of what came before.
    """

    def __init__(
        self,
        transfer: Transfer,
        rows: Sequence[Row],
        copies: Mapping[str, Tensor],
        *,
        check: FiniteCheck,
        seed: int,
        ledger: Ledger,
    ) -> None:
        stagings = [transfer.make_set() for _ in range(NUM_SETS)]
        self.room = stagings[0].tensors
        self.num_staging_bytes = sum(staging.num_bytes for staging in stagings)
        note = f"host-resident, by a worker, through {self.num_staging_bytes} bytes of staging memory"
        self._sets = [_Set(staging, rows, copies, seed=seed, note=note) for staging in stagings]
        self._check = check
        self._worker = Worker()
        self._copied: Copied | None = None
        self._take_up(ledger)
        _watch_optimizers()

    def _take_up(self, ledger: Ledger) -> None:
        _HOSTS.add(self)
        self.since = ledger.since
        self._progress = Progress(ledger.pending, ledger.made, dict.fromkeys(ledger.refused), ledger.failure)
        self._num_submitted = ledger.made
        self._looks: bool = False

    @property
    def plan(self) -> Plan:
        """Of the updates from the first set."""
        return self._sets[0].plan

    def resume(self, ledger: Ledger) -> OnHost:
        """Who goes on, in the same memory, from what was pending and made elsewhere."""
        self.settle()
        other = copy.copy(self)
        other._take_up(ledger)
        return other

    def release(self) -> None:
        """Gives up the staging memory, for a successor that needs its own; nothing can be submitted any more."""
        self.settle()
        self.room, self._sets = {}, []

    def submit(self, growth: Sequence[float], *, at: float, look: bool) -> Refused | None:
        """Begins an update. Where the host is behind, and this process is alone, nothing happens.

        Raises:
            StateError: an earlier update failed.
        """
        if look and self._check.meshes:
            # One rank does not know what others have found, and all must leave out the same updates.
            refused = self._check.refusal()
            if refused is not None:
                return refused
            look = False
        check_intact(self._progress.failure)
        free = self._find_free()
        if free is None and not (is_alone() and any(each.is_copied for each in self._sets)):
            wait(list(self._under_way()), return_when=FIRST_COMPLETED)
            free = self._find_free()
        if free is None:
            return None
        with record_function("polyak: stage"):
            self._copied = free.copied = free.staging.start()
        before = self.since, self._num_submitted, self._looks
        try:
            self.since, self._num_submitted, self._looks = at, self._num_submitted + 1, self._looks or look
            free.done = self._worker.start(partial(apply, self._progress, free, self._copied, growth, look=look))
        except BaseException:
            self.since, self._num_submitted, self._looks = before
            # The set is free when this has raised, and no worker waits for what is copied to it.
            self._copied.wait()
            raise
        return None

    def late(self) -> Refused | None:
        """What became known of updates that the worker has left out."""
        # The worker may add names meanwhile: one that is here already is told of now.
        names = tuple(self._progress.refused)
        for name in names:
            del self._progress.refused[name]
        return Refused(names) if names else None

    def ledger(self) -> Ledger:
        """What became of the updates; waits for the worker."""
        self.settle()
        found = self._progress
        return Ledger(tuple(found.pending), found.made, self.since, tuple(found.refused), found.failure)

    def num_made(self) -> int:
        """How many updates were made; waits only where the worker may leave some out.

        Raises:
            StateError: that is not known, because an update failed.
        """
        return self.ledger().checked().made if self._looks else self._num_submitted

    def _find_free(self) -> _Set | None:
        return next((each for each in self._sets if each.is_free), None)

    def hold(self) -> None:
        """Lets what the calling thread does to the sources from now on happen after the last copy of them."""
        if self._copied is not None:
            self._copied.hold()

    def forget_copy(self) -> None:
        """Nothing waits for the copies that were made so far."""
        self._copied = None

    def settle(self) -> None:
        """Waits until nothing is under way, whatever became of it."""
        wait(list(self._under_way()))

    def _under_way(self) -> Iterator[Future[None]]:
        return (each.done for each in self._sets if each.done is not None)


class _Set:
    """One staging set, and the updates from it."""

    def __init__(
        self, staging: Staging, rows: Sequence[Row], copies: Mapping[str, Tensor], *, seed: int, note: str
    ) -> None:
        self.staging = staging
        self.plan = Plan([row._replace(source=staging.tensors[row.name]) for row in rows], seed=seed, note=note)
        self.copied: Copied | None = None
        self.done: Future[None] | None = None
        self._copying = Copies(list(copies.values()), [staging.tensors[name] for name in copies])
        self._finite_test: FiniteTest | None = None

    @property
    def is_free(self) -> bool:
        return self.done is None or self.done.done()

    @property
    def is_copied(self) -> bool:
        return self.copied is None or self.copied.is_made()

    def non_finite(self) -> list[str]:
        if self._finite_test is None:
            self._finite_test = FiniteTest([row.source for row in self.plan.rows])
        return [self.plan.rows[i].name for i in self._finite_test.find()]

    def run(self, weights: Sequence[float], number: int) -> None:
        self.plan.run(weights, number)
        self._copying.run()


_HOSTS: weakref.WeakSet[OnHost] = weakref.WeakSet()


@functools.cache
def _watch_optimizers() -> None:
    """Asks every optimizer step of the process, from the first host on.

    There is one hook for all hosts, and it stays: the collector may come upon a host while an optimizer goes through
    its hooks, where none may be removed.
    """
    register_optimizer_step_pre_hook(_hold_all)


def _hold_all(*_: object) -> None:
    for host in list(_HOSTS):
        host.hold()


def _settle_all() -> None:
    for host in list(_HOSTS):
        host.settle()


def _forget_copies() -> None:
    for host in list(_HOSTS):
        host.forget_copy()


# A forked process has the averages as they are at that moment, and not the thread that was about to change them. Its
# optimizers must not ask for an accelerator, which it cannot use.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_settle_all, after_in_child=_forget_copies)
