"""Averages as plain tensors by name: the parts or shares that this process has, on a device of choice."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from polyak.errors import StateError, listed
from polyak.kernels import Copies, FiniteTest, Plan, Row, Versions, can_copy, copy_, is_dense
from polyak.model import Entry
from polyak.ranks import meshes_of

from .gather import gathering
from .modes import Modes
from .shares import Replicas, Share
from .swap import Swap, Whole
from .updates.device import Guard
from .updates.host import Host
from .updates.step import Step
from .updates.transfer import transfer_for
from .updates.worker import Ledger


class LocalStore:
    """Holds the averages of each profile, the copies, and the growth that is still to be applied.

    Attributes:
        averages: for each profile, the averaged tensors by name. Every profile has the same names.
        copies: the tensors that are copied, by name; they are the same for all profiles.
        seconds: for each profile, what compensated averages are short of, by name: fractions of their last bits.
        pending: for each profile, growth that no update has applied yet; where something else than this object decides
            about updates, as of the last `catch_up`.
        modes: how the averages are kept.
        replicas: the ranks among which the averages are divided.
        shardings: how the averages lie over the ranks, by name; plain ones are not among them.
        meshes: the ranks over which they lie.
        shared: by name, all of each source of whose average only this rank's share is here.
        guard: what decides about updates on the device, once `decide_on_device` was called.
        lent: whether modules hold the averages themselves, so that torch must see that they change, and nothing changes
            them between two calls. Where it is so from the beginning, no worker is made.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        profiles: Iterable[str],
        *,
        modes: Modes | None = None,
        device: torch.device | None = None,
        replicas: Replicas | None = None,
        lent: bool = False,
    ) -> None:
        self.modes = modes or Modes()
        self.replicas = replicas
        self.lent = lent
        self.guard: Guard | None = None
        self._host: Host | None = None
        self._device = device
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
                    if (second := self.modes.second_of(average)) is not None
                }
                for profile, averages in self.averages.items()
            }
        self.copies: dict[str, Tensor] = {}
        self.swap: Swap | None = None
        self.pending = dict.fromkeys(self.averages, 0.0)
        self.bind(entries)
        self.begin()

    def __getstate__(self) -> dict[str, Any]:
        self.catch_up()
        # A plan holds addresses, which are this object's alone.
        derived = {"plan", "guard", "_host", "_copy_pairs", "_copying", "_finite_test", "_entries"}
        derived |= {"_versions", "_swaps"}
        return {key: value for key, value in vars(self).items() if key not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _entries=None, guard=None, _host=None)
        self._plan_updates()

    def again(self, entries: Sequence[Entry]) -> LocalStore:
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
        replicas = None if self.replicas is None else Replicas(self.replicas.over, entries)
        shared = {} if self.replicas is None else self.replicas.shares
        anew = {} if replicas is None else replicas.shares
        # Of another whole the share may have the same shape.
        other = {name for name in shared.keys() | anew.keys() if not _is_one_whole(shared.get(name), anew.get(name))}
        cut = [name for name in shared.keys() & anew.keys() - other if shared[name].dimension != anew[name].dimension]
        if cut:
            raise StateError(
                f"{listed(cut)} lie otherwise in memory now, and would be shared along another dimension; save the "
                "average's state by torch.distributed.checkpoint and load it into a new one"
            )
        self.catch_up()
        store = LocalStore(entries, self.averages, modes=self.modes, device=self._device, replicas=replicas)
        for profile, averages in store.averages.items():
            for name, tensor in averages.items():
                kept = None if name in other else self.averages[profile].get(name)
                if kept is not None and kept.shape == tensor.shape and kept.dtype == tensor.dtype:
                    tensor.copy_(kept)
                    if name in store.seconds[profile]:
                        store.seconds[profile][name].copy_(self.seconds[profile][name])
        store.resume(self.pending)
        return store

    @property
    def num_staging_bytes(self) -> int:
        """The host memory through which a worker updates averages there; 0 where none does."""
        return 0 if self._host is None else self._host.num_bytes

    @property
    def names(self) -> Iterable[str]:
        """The names of averaged entries; every profile has the same."""
        return next(iter(self.averages.values())).keys()

    def bind(self, entries: Sequence[Entry]) -> None:
        """Takes the tensors of these entries as the sources of all updates from now on."""
        assert self.swap is None
        if entries is self._entries:
            return
        self.settle()
        # Scratch memory and views that are made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self._sources = {entry.name: self._part(entry) for entry in entries if entry.action != "skip"}
            self._source_shardings = {e.name: e.sharding for e in entries if e.sharding is not None}
            self.shared: dict[str, Tensor] = {}
            self.shardings = dict(self._source_shardings)
            if self.replicas is not None:
                self.shared = {e.name: e.local.detach() for e in entries if e.name in self.replicas.shares}
                self.shardings |= {name: share.sharding for name, share in self.replicas.shares.items()}
            self.meshes = meshes_of(self.shardings.values())
            self._parameters = {entry.name for entry in entries if entry.is_parameter}
            self._follow_copies([entry for entry in entries if entry.action == "copy"])
            self._plan_updates()
        self._entries = entries

    def _part(self, entry: Entry) -> Tensor:
        part = entry.local.detach()
        return part if self.replicas is None else self.replicas.part(entry.name, part)

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

    def _plan_updates(self) -> None:
        rows = [self._row(name) for name in self.names]
        # Tables of addresses, kept from one swap to the next.
        self._swaps: dict[tuple[str, bool, frozenset[str]], Swap] = {}
        self._host = self._make_host(rows)
        self.plan = Plan(rows, seed=self.modes.seed) if self._host is None else self._host.plan
        self._copy_pairs = list(self.copies.values()), [self._sources[name] for name in self.copies]
        self._copying = Copies(*self._copy_pairs)
        self._versions: Versions | None = None
        self._finite_test: FiniteTest | None = None
        if self.guard is not None:
            self.catch_up()
            self.guard = None

    def _make_host(self, rows: Sequence[Row]) -> Host | None:
        averages = next(iter(self.averages.values()))
        transfer = None if self.lent else transfer_for(self._sources, averages, self._parameters)
        if transfer is None:
            return None
        ledger = Ledger(list(self.pending.values())) if self._host is None else self._host.ledger
        # Or there would be staging memory for both.
        vars(self).pop("plan", None)
        self._host = None
        return Host(transfer, rows, self.copies, seed=self.modes.seed, ledger=ledger)

    def _row(self, name: str) -> Row:
        averages = tuple([averages[name] for averages in self.averages.values()])
        seconds = tuple([seconds[name] for seconds in self.seconds.values() if name in seconds])
        key, sharding = self.modes.key_of(name, averages[0]), self.shardings.get(name)
        if key is not None and sharding is not None:
            return Row(name, self._sources[name], averages, seconds, key, sharding.first, sharding.stride)
        # Of a slice that has gaps, its stretches without gaps are updated, each by the fastest kernel.
        strides = None if name not in self.shared or is_dense(self._sources[name]) else self._sources[name].stride()
        return Row(name, self._sources[name], averages, seconds, key, strides=strides)

    def begin(self) -> None:
        """Takes the sources as the averages, with nothing pending."""
        self.resume(dict.fromkeys(self.averages, 0.0))
        self.submit(Step([math.inf] * len(self.averages), 0))
        self.catch_up()

    def resume(self, pending: Mapping[str, float]) -> None:
        """Takes up other growth that is pending; the host decides until `decide_on_device` is called again."""
        self.pending = dict(pending)
        self.guard = None
        if self._host is not None:
            self._host.settle()
            self._host.ledger = Ledger(list(pending.values()))

    def submit(self, step: Step) -> bool:
        """Applies the growth of a step, and what was pending, to every average.

        Returns:
            False where nothing was done, because the host is busy with earlier updates.
        """
        assert self.swap is None
        if self._host is not None:
            if not self._host.submit(step):
                return False
            if self.lent:
                self.catch_up()
        elif self.guard is not None:
            self.guard.add(step.growth)
            self.guard.run(look=step.look)
            if step.look:
                self.guard.note()
        else:
            pending = map(operator.add, self.pending.values(), step.growth)
            self.plan.run([-math.expm1(-growth) for growth in pending], step.number)
            self._copying.run()
            self.pending = dict.fromkeys(self.pending, 0.0)
        if self.lent:
            # So that a graph which was built on an average before, and needs it as it was, raises and does not mislead.
            if self._versions is None:
                averages = [tensor for averages in self.averages.values() for tensor in averages.values()]
                self._versions = Versions([*averages, *self.copies.values()])
            self._versions.count_change()
        return True

    def decides_late(self, number: int) -> bool:
        """Whether it turns out after `submit` only if an update is made, for which nothing waits.

        Args:
            number: of updates made so far.
        """
        return self._host is not None or self.decide_on_device(number) is not None

    def late_bad_names(self) -> list[str]:
        """The names of sources that were bad in steps that became known, without waiting, since this was asked last."""
        if self._host is not None:
            return self._host.new_bad_names()
        return [] if self.guard is None else self.guard.new_bad_names()

    def decide_on_device(self, number: int) -> Guard | None:
        """Leaves it to the device, from now on, whether an update is made; None where it cannot be left to it.

        Args:
            number: of updates made so far.
        """
        kernel = self.plan.deciding_kernel
        if self.guard is None and kernel is not None and all(map(can_copy, *self._copy_pairs)):
            pending = list(self.pending.values())
            self.guard = Guard(kernel, self._copy_pairs, seed=self.modes.seed, pending=pending, number=number)
        return self.guard

    def catch_up(self) -> int | None:
        """Learns what is pending, and how many updates were made, from the device or worker that decides; waits for it.

        Raises:
            StateError: an update failed in the worker.
        """
        if self._host is not None:
            self._host.settle()
            self._host.check()
            self.pending = dict(zip(self.averages, self._host.ledger.pending, strict=True))
            return self._host.ledger.made
        if self.guard is None:
            return None
        pending, number = self.guard.read()
        self.pending = dict(zip(self.averages, pending, strict=True))
        return number

    def settle(self) -> None:
        """Waits until no worker writes to the averages, whatever became of its updates."""
        if self._host is not None:
            self._host.settle()

    def non_finite(self) -> list[str]:
        """The names of averaged entries whose source holds a NaN or an infinity."""
        if self._finite_test is None:
            self._finite_test = FiniteTest([self._sources[name] for name in self.names])
        names = list(self.names)
        return [names[i] for i in self._finite_test.find()]

    def make_swap(self, profile: str, *, buffers: Iterable[str], aside: bool) -> Swap:
        """The swap that puts the average of a profile into the source, in place; so far nothing is written.

        Args:
            profile: whose average.
            buffers: the names of entries that are no parameters: what is written to them inside belongs to the average.
            aside: leave the store's tensors as they are, for somebody else reads them, and keep the source's values
                in new memory; otherwise the two exchange their values.
        """
        assert self.swap is None
        self.settle()
        key = profile, aside, frozenset(buffers)
        if key in self._swaps:
            self._swaps[key].begin_again()
            return self._swaps[key]
        averages = {**self.averages[profile], **self.copies}
        pairs = {name: (self._sources[name], averages[name]) for name in averages}
        with torch.inference_mode(False):
            whole = Whole(self.shared, partial(gathering, self.replicas)) if self.replicas is not None else None
            # A swap on the host takes no memory of the accelerator: a staging set is free as long as it lasts.
            room = {} if self._host is None else self._host.room
            swap = Swap(pairs, buffers=frozenset(buffers), aside=aside, room=room, whole=whole)
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
        self.settle()
        stored = {**self.averages[profile], **self.copies}
        return stored if self.swap is None else self.swap.averages(stored)

    def raw(self) -> dict[str, Tensor]:
        """The source's own values by name, live, also while an average stands in the source."""
        return dict(self._sources) if self.swap is None else {**self._sources, **self.swap.raw()}

    def write_to(self, targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Writes tensors of this store, or of the source, into others that are as large as the source's.

        Where averages are divided among ranks, each of these must call it.
        """
        replicas = self.replicas
        shares = {} if replicas is None else {name: replicas.shares[name] for name in self.shared.keys() & tensors}
        parts = {name: shares[name].of(target) if name in shares else target for name, target in targets.items()}
        copy_(list(parts.values()), [tensors[name] for name in parts])
        if replicas is not None:
            for operation in gathering(replicas, {name: targets[name] for name in targets if name in shares}):
                operation()

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes other tensors, of the same names and shapes, as those of the only profile, and as the copies."""
        (profile,) = self.averages
        self._entries = None
        self.settle()
        for name in self.averages[profile]:
            self.averages[profile][name] = tensors[name]
        for name in self.copies.keys() & tensors.keys():
            self.copies[name] = tensors[name]


def _is_one_whole(one: Share | None, other: Share | None) -> bool:
    return one is not None and other is not None and one.sharding.shape == other.sharding.shape
