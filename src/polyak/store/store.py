"""Averages as plain tensors by name: the parts or shares that this process has, on a device of choice."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from polyak.errors import StateError, listed
from polyak.kernels import Copies, Plan, Row, Versions, can_copy, copy_, is_dense
from polyak.model import Entry
from polyak.ranks import Sharding, meshes_of

from .modes import Modes
from .shares import Share, Shares, gathering
from .swap import Swap
from .updates import FiniteCheck, Inline, Ledger, OnDevice, OnHost, Updates, check_intact, transfer_for


class Store:
    """Holds the averages of each profile and the copies, and leaves it to `updates` to change them.

    Attributes:
        averages: for each profile, the averaged tensors by name. Every profile has the same names.
        copies: the tensors that are copied, by name; they are the same for all profiles.
        seconds: for each profile, what compensated averages are short of, by name: fractions of their last bits.
        modes: how the averages are kept.
        shares: what `shard_over` divides.
        wholes: the whole source of each average of which this rank keeps only a share, by name.
        lies: how the averages and copies lie over the ranks, by name; None for what is whole here.
        meshes: the ranks over which they lie.
        updates: who decides about an update, and what became of those so far.
        swap: what stands in the source at the moment.

    Args:
        entries: of the source.
        profiles: their names.
        modes: how the averages are kept. Default: as precise as the source.
        device: of averages and copies. Default: each source's.
        shares: what each rank keeps. Default: all.
        looks: whether updates will be left out where a source is not finite.
        may_use_worker: whether averages on the host may be updated beside the training.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        profiles: Iterable[str],
        *,
        modes: Modes | None = None,
        device: torch.device | None = None,
        shares: Shares | None = None,
        looks: bool = False,
        may_use_worker: bool = True,
    ) -> None:
        self.modes = modes or Modes()
        self.shares = shares or Shares(None, entries)
        self._device = device
        self._looks = looks
        self._may_use_worker = may_use_worker
        self._entries: Sequence[Entry] | None = None
        if device is not None and device.type == "meta":
            raise ValueError("device='meta': an average has values, and that device holds none")
        averaged = [entry for entry in entries if entry.action == "average"]
        with torch.inference_mode(False):
            self.averages: dict[str, dict[str, Tensor]] = {
                profile: {entry.name: self.modes.average_of(self._part(entry), device) for entry in averaged}
                for profile in profiles
            }
            self.seconds = {
                profile: {
                    name: second
                    for name, average in averages.items()
                    if (second := self.modes.mode_of(average).beside(average)) is not None
                }
                for profile, averages in self.averages.items()
            }
        self.copies: dict[str, Tensor] = {}
        self.swap: Swap | None = None
        self._bind(entries, Ledger((0.0,) * len(self.averages)))
        self.updates = self.restarted()
        self.prefer_device()

    def __getstate__(self) -> dict[str, Any]:
        # A plan holds addresses, which are this object's alone.
        kept = vars(self).keys() - {"updates", "_copy_pairs", "_entries", "_versions", "_swaps"}
        return {key: vars(self)[key] for key in kept} | {"ledger": self.updates.ledger().checked()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ledger = state.pop("ledger")
        vars(self).update(state, _entries=None)
        self._plan_updates(ledger)
        self.prefer_device()

    def again(self, entries: Sequence[Entry]) -> Store:
        """A store for other entries; what is alike in both keeps its averages.

        Raises:
            StateError: tensors lie otherwise over the ranks now, and their averages would be lost.
        """
        moved = [
            entry.name
            for entry in entries
            if entry.name in self.names and entry.sharding != self._source_shardings.get(entry.name)
        ]
        if moved:
            raise StateError(
                f"{listed(moved)} lie otherwise over the ranks than their averages: make the average after the model "
                "is sharded, or save its state by torch.distributed.checkpoint and load it into a new one"
            )
        shares = Shares(self.shares.over, entries)
        here, there = self.shares.by_name, shares.by_name
        # A share of a reshaped tensor may still have the shape of the old share.
        other = {name for name in here.keys() | there.keys() if not _have_same_shape(here.get(name), there.get(name))}
        cut = [name for name in here.keys() & there.keys() - other if here[name].dimension != there[name].dimension]
        if cut:
            raise StateError(
                f"{listed(cut)} lie otherwise in memory now, and would be shared along another dimension; save the "
                "average's state by torch.distributed.checkpoint and load it into a new one"
            )
        ledger = self.updates.ledger().checked()
        store = Store(
            entries,
            self.averages,
            modes=self.modes,
            device=self._device,
            shares=shares,
            looks=self._looks,
            may_use_worker=self._may_use_worker,
        )
        for profile, averages in store.averages.items():
            for name, tensor in averages.items():
                kept = None if name in other else self.averages[profile].get(name)
                if kept is not None and kept.shape == tensor.shape and kept.dtype == tensor.dtype:
                    tensor.copy_(kept)
                    if name in store.seconds[profile]:
                        store.seconds[profile][name].copy_(self.seconds[profile][name])
        store.updates = store.updates.resume(ledger)
        store.prefer_device()
        return store

    @property
    def num_staging_bytes(self) -> int:
        """The host memory through which a worker updates averages there; 0 where none does."""
        return self.updates.num_staging_bytes if isinstance(self.updates, OnHost) else 0

    @property
    def names(self) -> Iterable[str]:
        """The names of averaged entries; every profile has the same."""
        return next(iter(self.averages.values())).keys()

    def bind(self, entries: Sequence[Entry]) -> None:
        """Takes the tensors of these entries as the sources of all updates from now on."""
        assert self.swap is None
        if entries is not self._entries:
            self._bind(entries, self.updates.ledger())
            self.prefer_device()

    def _bind(self, entries: Sequence[Entry], ledger: Ledger) -> None:
        # Scratch memory and views that are made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self._sources = {entry.name: self._part(entry) for entry in entries if entry.action != "skip"}
            self._source_shardings = {entry.name: entry.sharding for entry in entries}
            self.wholes = {e.name: e.local.detach() for e in entries if e.name in self.shares.by_name}
            self.lies: dict[str, Sharding | None] = {e.name: self.shares.sharding_of(e) for e in entries}
            self.meshes = meshes_of(self.lies.values())
            self._parameters = {entry.name for entry in entries if entry.is_parameter}
            self._follow_copies([entry for entry in entries if entry.action == "copy"])
            self._plan_updates(ledger)
        self._entries = entries

    def _part(self, entry: Entry) -> Tensor:
        return self.shares.part(entry.name, entry.local.detach())

    def _follow_copies(self, entries: Sequence[Entry]) -> None:
        """Holds a copy for each of these and no others; one that is new, or has another shape now, is the source's."""
        kept = self.copies
        self.copies = {}
        for entry in entries:
            copy = kept.get(entry.name)
            if copy is None or copy.shape != entry.local.shape or copy.dtype != entry.local.dtype:
                copy = torch.empty_like(entry.local, device=self._device, requires_grad=False).detach()
                copy.copy_(entry.local.detach())
            self.copies[entry.name] = copy

    def _plan_updates(self, ledger: Ledger) -> None:
        rows = [self._row(name) for name in self.names]
        # Tables of addresses, kept from one swap to the next.
        self._swaps: dict[tuple[str, bool, frozenset[str]], Swap] = {}
        self._versions: Versions | None = None
        self._copy_pairs = list(self.copies.values()), [self._sources[name] for name in self.copies]
        check = FiniteCheck(rows, self.meshes)
        averages = next(iter(self.averages.values()))
        transfer = transfer_for(self._sources, averages, self._parameters) if self._may_use_worker else None
        if transfer is None:
            plan = Plan(rows, seed=self.modes.seed)
            self.updates: Updates = Inline(plan, Copies(*self._copy_pairs), check, ledger)
            return
        before = vars(self).get("updates")
        if isinstance(before, OnHost):
            # Or there would be staging memory for both.
            before.release()
        self.updates = OnHost(transfer, rows, self.copies, check=check, seed=self.modes.seed, ledger=ledger)

    def prefer_device(self) -> None:
        """Lets the device decide, if updates may be skipped and the device can tell."""
        # The device of one rank does not know what others have found.
        if self._looks and not self.meshes:
            self.let_device_decide()

    def let_device_decide(self) -> OnDevice | None:
        """Lets the device decide from now on whether an update is made; None if it cannot."""
        updates = self.updates
        if isinstance(updates, Inline) and updates.plan.deciding_kernel is not None:
            if not all(map(can_copy, *self._copy_pairs)):
                return None
            kernel = updates.plan.deciding_kernel
            updates = self.updates = OnDevice(updates, kernel, self._copy_pairs, seed=self.modes.seed)
        return updates if isinstance(updates, OnDevice) else None

    def _row(self, name: str) -> Row:
        averages = tuple([averages[name] for averages in self.averages.values()])
        seconds = tuple([seconds[name] for seconds in self.seconds.values() if name in seconds])
        mode, sharding = self.modes.mode_of(averages[0]), self.lies[name]
        key = mode.key(name)
        if mode.draws and sharding is not None:
            return Row(name, self._sources[name], averages, mode, seconds, key, sharding.first, sharding.stride)
        # Of a slice that has gaps, its stretches without gaps are updated, each by the fastest kernel.
        strides = None if name not in self.wholes or is_dense(self._sources[name]) else self._sources[name].stride()
        return Row(name, self._sources[name], averages, mode, seconds, key, strides=strides)

    def restarted(self) -> Updates:
        """Copies the sources into the averages; returns the `Updates` that continues from there. The caller sets it."""
        # It is update 0, on which the random bits of those that are rounded stochastically depend.
        fresh = self.updates.resume(Ledger((0.0,) * len(self.averages), made=-1))
        fresh.submit([math.inf] * len(self.averages), at=0.0, look=False)
        failure = fresh.ledger().failure
        # A failed copy leaves a mixture in the averages, so the updates in use must refuse from now on.
        if failure is not None:
            self.updates = self.updates.resume(self.updates.ledger()._replace(failure=failure))
        check_intact(failure)
        return fresh

    def show_changes(self) -> None:
        """Lets whoever holds the averages themselves see that they changed, as modules do.

        A graph which was built on an average before, and needs it as it was, raises then, and does not mislead. When
        this returns no worker changes the averages any more.

        Raises:
            StateError: an update failed.
        """
        if isinstance(self.updates, OnHost):
            self.updates.ledger().checked()
        if self._versions is None:
            averages = [tensor for averages in self.averages.values() for tensor in averages.values()]
            self._versions = Versions([*averages, *self.copies.values()])
        self._versions.count_change()

    def make_swap(self, profile: str, *, buffers: Iterable[str], aside: bool) -> Swap:
        """The swap that puts the average of a profile into the source, in place; so far nothing is written.

        Args:
            profile: whose average.
            buffers: the names of entries that are no parameters: what is written to them inside belongs to the average.
            aside: leave the store's tensors as they are, for somebody else reads them, and keep the source's values
                in new memory; otherwise the two exchange their values.
        """
        assert self.swap is None
        self.updates.settle()
        key = profile, aside, frozenset(buffers)
        if key in self._swaps:
            self._swaps[key].begin_again()
            return self._swaps[key]
        averages = {**self.averages[profile], **self.copies}
        pairs = {name: (self._sources[name], averages[name]) for name in averages}
        with torch.inference_mode(False):
            # A swap on the host takes no memory of the accelerator: a staging set is free as long as it lasts.
            room = self.updates.room if isinstance(self.updates, OnHost) else {}
            swap = Swap(
                pairs,
                buffers=frozenset(buffers),
                aside=aside,
                room=room,
                wholes=self.wholes,
                gathering=partial(gathering, self.shares),
            )
        if swap.is_light:
            self._swaps[key] = swap
        return swap

    def swap_in(self, swap: Swap) -> None:
        """Does what `make_swap` has made."""
        self.swap = swap
        self.swap.enter()

    def swap_out(self) -> list[str]:
        """Puts the source's own values back; returns the names of parameters that were changed meanwhile.

        It may be called at any time, also after `swap_in` or itself was interrupted, and does what is left to do.
        """
        if self.swap is None:
            return []
        changed = self.swap.leave()
        self.swap = None
        return changed

    def tensors(self, profile: str) -> dict[str, Tensor]:
        """The average of a profile and the copies by name, live, wherever they are at the moment."""
        self.updates.settle()
        stored = {**self.averages[profile], **self.copies}
        return stored if self.swap is None else self.swap.averages(stored)

    def raw(self) -> dict[str, Tensor]:
        """The source's own values by name, live, also while an average stands in the source."""
        return dict(self._sources) if self.swap is None else {**self._sources, **self.swap.raw()}

    def write_to(self, targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Writes tensors of this store, or of the source, into others that are as large as the source's.

        Where averages are divided among ranks, each of these must call it.
        """
        parts = {name: self.shares.part(name, target) for name, target in targets.items()}
        copy_(list(parts.values()), [tensors[name] for name in parts])
        # In the order of the targets, which all ranks have alike.
        wholes = {name: target for name, target in targets.items() if name in self.wholes}
        for operation in gathering(self.shares, wholes):
            operation()

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes other tensors, of the same names and shapes, as those of the only profile, and as the copies."""
        (profile,) = self.averages
        self._entries = None
        self.updates.settle()
        for name in self.averages[profile]:
            self.averages[profile][name] = tensors[name]
        for name in self.copies.keys() & tensors.keys():
            self.copies[name] = tensors[name]


def _have_same_shape(one: Share | None, other: Share | None) -> bool:
    return one is not None and other is not None and one.sharding.shape == other.sharding.shape
