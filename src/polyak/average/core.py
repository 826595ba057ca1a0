"""What a `WeightAverage` and each of its averages share.

Three parts know nothing of each other. The source is the model: which tensors it has, and whether they are still the
same. The clock is the time: it says whether a call makes an update, and the growth of each profile since an earlier
time. The store has the averages, takes growth, and lets its `updates` decide: at once, on the device, or in a worker.

An update goes from the clock by way of the check of the source to the store; the clock is replaced last, so that what
raises leaves everything as it was. Whatever reads the averages calls `verify` first; it waits for the updates, and
rebinds if the model has new tensors. During a swap, `swapped` names the average in the model, and nothing rebinds or
updates.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from torch import nn
from torch.utils.hooks import RemovableHandle

from polyak.errors import StateError, listed, outside
from polyak.kernels import checksums, is_capturing
from polyak.model import Source, Watch
from polyak.profiles import Profile
from polyak.ranks import Question
from polyak.store import Ledger, OnDevice, Refused, Store, Updates

from .attach import Attachment
from .clock import Clock

NonFinite: TypeAlias = Literal["raise", "skip", "propagate"]
_EARLIER = "held at an earlier update"


@dataclass
class Core:
    """The parts of a `WeightAverage`.

    Attributes:
        profiles: how past weights count, by name of the average.
        clock: the time; it is replaced as a whole, after all else has succeeded.
        source: the model being trained.
        store: where the averages are.
        live: modules whose tensors are the store's own, each with a watch that they still are.
        lends: whether a live module was ever made; a graph built on it may outlive it.
        swapped: the name of the average that stands in the source.
        leaving: what ranks that share averages ask each other when the swap ends.
        training_hook: the hook that keeps optimizers from training it there.
        warned: whether it was said that there was no update yet.
        nonfinite: what to do with a source that holds a NaN or an infinity.
        attachment: what calls the updates, where somebody attached an optimizer.
        first_sums: the sum of each averaged entry's bits in the source, when the average was made, loaded or reset.
        first_average_sums: the same of the averages, by profile.
    """

    profiles: dict[str, Profile]
    clock: Clock
    source: Source
    store: Store
    live: weakref.WeakKeyDictionary[nn.Module, Watch] = field(
        default_factory=weakref.WeakKeyDictionary[nn.Module, Watch]
    )
    lends: bool = False
    swapped: str | None = None
    leaving: Question | None = None
    training_hook: RemovableHandle | None = None
    warned: bool = False
    nonfinite: NonFinite = "propagate"
    attachment: Attachment | None = None
    first_sums: dict[str, int] = field(default_factory=dict[str, int])
    first_average_sums: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])

    def __post_init__(self) -> None:
        self.begin(are_copies=True)

    def begin(self, *, are_copies: bool = False) -> None:
        """Notes the bits of source and averages, to tell later what never moved.

        Args:
            are_copies: whether the averages were just copied from the source. If so, those of its dtype have its sums.
        """
        raw, names = self.store.raw(), list(self.store.names)
        self.first_sums = dict(zip(names, checksums([raw[name] for name in names]), strict=True))
        for profile in self.profiles:
            tensors, seconds = self.store.averages[profile], self.store.seconds[profile]
            same = {n for n in names if are_copies and n not in seconds and tensors[n].dtype == raw[n].dtype}
            others = self.average_sums(profile, [name for name in names if name not in same])
            self.first_average_sums[profile] = {n: self.first_sums[n] if n in same else others[n] for n in names}

    def average_sums(self, profile: str, names: Sequence[str]) -> dict[str, int]:
        """The sums of the bits of these averages, with those of their second terms."""
        tensors, seconds = self.store.tensors(profile), self.store.seconds[profile]
        sums = dict(zip(names, checksums([tensors[name] for name in names]), strict=True))
        second_names = [name for name in names if name in seconds]
        for name, found in zip(second_names, checksums([seconds[name] for name in second_names]), strict=True):
            sums[name] += found
        return sums

    def __getstate__(self) -> dict[str, Any]:
        if self.swapped is not None:
            raise StateError("an average cannot be pickled or copied inside of swapped(): leave the swap first")
        if self.store.meshes:
            raise StateError(
                "an average that lies over several ranks cannot be pickled or copied, because process groups cannot: "
                "save its state_dict() by torch.distributed.checkpoint, or make another average of the model"
            )
        # A copy has no live modules and attached optimizers until it gets its own.
        return {key: value for key, value in vars(self).items() if key not in ("live", "attachment")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, attachment=None, live=weakref.WeakKeyDictionary[nn.Module, Watch]())

    def warn_if_never_updated(self, what: str) -> None:
        """Warns, once, where an average is used that no update has reached yet."""
        if self.num_updates == 0 and not self.warned:
            self.warned = True
            warnings.warn(
                f"the average is {what} after 0 updates: it is what the model was when it was made. Call update() "
                "after each optimizer.step(), or attach(optimizer)",
                stacklevel=outside(),
            )

    @property
    def looks(self) -> bool:
        """Whether an update is left out if the source is not finite."""
        return self.nonfinite != "propagate"

    def update(self, at: float | None) -> None:
        """One call of the clock, and an update where one is due and the source is fit for it."""
        if is_capturing():
            self._capture(at)
            return
        clock = self.clock.tick(at)
        if clock.is_due:
            self.follow_source()
            self._submit(clock)
        else:
            self.clock = clock

    def _submit(self, clock: Clock) -> None:
        """The update of a call: clock and updates go on together, or neither does."""
        updates, before = self.store.updates, self.clock
        if self.nonfinite == "raise":
            # Before anything is added, so that a raise changes nothing.
            _raise_for(updates.late(), when=_EARLIER)
        growths = clock.growths(self.profiles.values(), since=updates.since)
        try:
            self.clock = clock
            refused = updates.submit(growths, at=clock.time, look=self.looks)
            if self.nonfinite == "raise":
                _raise_for(refused, when="holds")
        except BaseException:
            # What was interrupted after it was made is not undone.
            if updates.since != clock.time:
                self.clock = before
            raise
        if self.lends and updates.since == clock.time:
            self.store.show_changes()

    def _capture(self, at: float | None) -> None:
        """Puts an update into the CUDA graph that is being captured; `advance` says what each replay applies."""
        self._check_can_be_captured()
        self.follow_source()
        updates = self.store.updates
        if not (isinstance(updates, OnDevice) and updates.is_advanced):
            raise StateError(
                "update() inside of a CUDA graph's capture: call advance() before the capture and before each replay. "
                "It ticks the clock, and the captured update() applies what it gives"
            )
        if at is not None:
            raise ValueError(f"update(at={at!r}) inside of a CUDA graph's capture: give the time to advance(at=...)")
        updates.run(look=self.looks)

    def advance(self, at: float | None) -> None:
        """One call of the clock, whose growth stays pending on the device until an update there applies it."""
        self._check_can_be_captured()
        if self.looks and self.store.meshes:
            raise StateError(
                f"advance() with nonfinite={self.nonfinite!r} of a model that is sharded over ranks: they agree on "
                "each update, which one that is captured in a CUDA graph cannot. Leave nonfinite= out"
            )
        clock = self.clock.tick(at)
        self.follow_source()
        updates = self.store.let_device_decide()
        if updates is None:
            raise StateError(
                "advance() is for CUDA graphs, whose updates the device decides about, with the kernel in Triton; here "
                f"call update() alone. The plan is\n{self.store.updates.plan}"
            )
        if self.nonfinite == "raise":
            _raise_for(updates.late(), when=_EARLIER)
        growths = clock.growths(self.profiles.values(), since=updates.since) if clock.is_due else None
        updates.advance(growths, at=clock.time)
        self.clock = clock

    def _check_can_be_captured(self) -> None:
        if self.store.num_staging_bytes:
            raise StateError(
                "averages on the host cannot be updated in a CUDA graph, which cannot start a worker: call update() "
                "after each replay(), and wait() before the next; or leave device= out, for averages on the GPU"
            )

    @property
    def num_updates(self) -> int:
        """How many updates were made; waits where that is not known."""
        return self.store.updates.num_made()

    def ledger(self) -> Ledger:
        """What became of the updates; waits until nobody makes one any more.

        Raises:
            StateError: an update failed.
        """
        return self.store.updates.ledger().checked()

    def wait(self) -> None:
        """Waits until every update is in the averages, and raises what there is to raise."""
        self.ledger()
        if self.nonfinite == "raise":
            _raise_for(self.store.updates.late(), when=_EARLIER)

    def follow_source(self) -> None:
        """The check of every update: the store's sources are the model's present tensors."""
        if self.live:
            self.check_live()
        if self.source.is_current() or (self.source.reshard() and self.source.is_current()):
            self.source.check_frozen()
            # A no-op, unless an earlier rebind was interrupted or ran out of memory.
            self.store.bind(self.source.entries)
        else:
            self.verify()

    def verify(self) -> None:
        """The thorough check, for what may take its time; while an average stands in the source it waits."""
        self.ledger()
        if self.swapped is None:
            self._refresh()

    def _refresh(self) -> None:
        self.source.refresh()
        self.store.bind(self.source.entries)

    def reset(self) -> None:
        """Begins again, at time 0, with the source's weights as they are, whatever became of earlier updates."""
        self._refresh()
        clock, updates = Clock(self.clock.every, self.clock.start), self.store.restarted()
        self.go_on(clock, updates)
        self.begin(are_copies=True)

    def go_on(self, clock: Clock, updates: Updates) -> None:
        """Goes on from another time, and from what was made until then."""
        # One statement, which nothing interrupts between its parts.
        self.clock, self.store.updates = clock, updates
        self.store.prefer_device()
        if self.lends:
            self.store.show_changes()

    def verify_values(self) -> None:
        """The check of what is not averaged, too, for what is to be kept: states and files."""
        self.verify()
        if self.swapped is None:
            self.source.check_frozen_values()

    def adapt(self) -> None:
        """Follows a model whose tensors are others now."""
        if self.live:
            raise StateError(
                "adapt() while a live module shares the average's tensors: drop it first, ask for it after"
            )
        source = self.source.again()
        self.store = self.store.again(source.entries)
        self.source = source
        self.begin()

    def check_live(self) -> None:
        """Raises where a live module has got other tensors than the store's."""
        for module, watch in list(self.live.items()):
            if not watch.is_current():
                raise StateError(
                    f"a live {type(module).__name__} no longer shares the average's storage: its tensors were replaced "
                    "(by .to(), .half() or load_state_dict(assign=True)). Drop it and ask for another one; module() "
                    "gives one that may be moved"
                )


def _raise_for(refused: Refused | None, *, when: str) -> None:
    """Raises for an update that was left out."""
    if refused is None:
        return
    where = listed(refused.names) or "parts that other ranks have"
    raise StateError(
        f"the model {when} NaNs or infinities in {where}, which would stay in the average for ever. The "
        "average is as it was; with nonfinite='skip' such updates are left out"
    )
