"""What a `WeightAverage` and its views share: the source, the store, the clock, and what stands where."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

from torch import nn

from polyak.clock import Clock
from polyak.errors import StateError
from polyak.profiles import Profile
from polyak.source import Source, Watch
from polyak.store import LocalStore


@dataclass
class Core:
    """The parts of a `WeightAverage`.

    Attributes:
        profiles: how past weights count, by name of the average.
        clock: the time; it is replaced as a whole, after all else has succeeded.
        source: the model being trained.
        store: where the averages are.
        live: modules whose tensors are the store's own, each with a watch that they still are.
        swapped: the name of the average that stands in the source.
    """

    profiles: dict[str, Profile]
    clock: Clock
    source: Source
    store: LocalStore
    live: weakref.WeakKeyDictionary[nn.Module, Watch] = field(
        default_factory=weakref.WeakKeyDictionary[nn.Module, Watch]
    )
    swapped: str | None = None

    def check_not_swapped(self, call: str) -> None:
        """Raises where an average stands in the source."""
        if self.swapped is not None:
            raise StateError(f"{call} inside of swapped(): the source holds an average now; leave the swap first")

    def follow_source(self) -> None:
        """The check of every update: the store's sources are the model's present tensors."""
        self.check_live()
        if self.source.is_current():
            self.source.check_frozen()
        else:
            self.verify()

    def verify(self) -> None:
        """The thorough check, for what may take its time; while an average stands in the source it waits."""
        if self.swapped is None and self.source.refresh():
            self.store.bind(self.source.entries)

    def check_live(self) -> None:
        """Raises where a live module has got other tensors than the store's."""
        for module, watch in list(self.live.items()):
            if not watch.is_current():
                raise StateError(
                    f"a live {type(module).__name__} no longer shares the average's storage: its tensors were replaced "
                    "(by .to(), .half() or load_state_dict(assign=True)). Drop it and ask for another one; module() "
                    "gives one that may be moved"
                )
