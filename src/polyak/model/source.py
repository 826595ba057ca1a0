"""The model being trained, as the averages see it: its entries, and whether they are still the same tensors."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from polyak.errors import MismatchError, StateError
from polyak.kernels import average_dtype, checksums, is_plain
from polyak.ranks import is_sharded, local, meshes_of

from .entries import Entry, Rules, make_entry, resolve
from .fsdp import flat_rank, reshard
from .matching import match_sites
from .walk import Site, unwrap, walk
from .watch import Watch

_REQUIRES_GRAD = attrgetter("requires_grad")


class Source:
    """A model with its entries resolved once.

    `is_current` is the quick check, for every update. `refresh` is the thorough one: it walks the model again, and
    either takes the new tensors under the old names or raises.

    Attributes:
        model: bare or wrapped.
        bare: without what wraps it.
        entries: its tensors.
        shardings: how entries lie over the ranks, by name; plain ones are not among them.
        meshes: the ranks over which they lie.
        flat_rank: this one's number and that of all, where FSDP1 spreads stretches of parameters over them.
        frozen_sums: the sums of the bits of frozen parameters, by name.

    Args:
        model: bare or wrapped.
        rules: what to do with which tensors.
        include_frozen: average frozen parameters too.
        any_device: whether the model may move to another device.
        any_dtype: whether its floating-point tensors may be cast to any other floating-point dtype.
        hint: what to do about a model with other tensors, at the end of the error.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: Rules,
        *,
        include_frozen: bool = False,
        any_device: bool = False,
        any_dtype: bool = False,
        hint: str = "",
    ) -> None:
        self.model = model
        self._hint = hint
        self._include_frozen = include_frozen
        self._any_device = any_device
        self._any_dtype = any_dtype
        self._adopt(resolve(model, rules, include_frozen=include_frozen))
        self._rules = dict(rules)
        self.frozen_sums = self._sum_frozen()

    def _adopt(self, entries: list[Entry]) -> None:
        self.bare = unwrap(self.model)
        self.entries = entries
        self._views = {entry.name: _view(entry.tensor) for entry in entries}
        self.shardings = {entry.name: entry.sharding for entry in entries if entry.sharding is not None}
        self.meshes = meshes_of(self.shardings.values())
        self.flat_rank = flat_rank(self.model)
        self._frozen = {entry.name: entry.tensor for entry in entries if entry.reason == "frozen"}
        self._watch: Watch | None = Watch(self.model)

    def again(self) -> Source:
        """The model as it is now, resolved from the beginning."""
        return Source(
            self.model,
            self._rules,
            include_frozen=self._include_frozen,
            any_device=self._any_device,
            any_dtype=self._any_dtype,
            hint=self._hint,
        )

    def __getstate__(self) -> dict[str, Any]:
        # A watch holds addresses, which are others in a copy; the copy is walked again at its next check.
        return {**vars(self), "_watch": None}

    def is_current(self) -> bool:
        """Whether every entry is still the same tensor at the same address."""
        return self._watch is not None and self._watch.is_current()

    @property
    def watch_note(self) -> str:
        """Why `is_current` is a look in Python, which sees less than that in C; empty if it is made in C."""
        return "" if self._watch is None else self._watch.note

    def _is_unchanged(self) -> bool:
        """Whether a walk through the model would certainly find what is known."""
        if self.shardings or self.flat_rank is not None:
            self.reshard()
        return self._watch is not None and self._watch.is_unchanged(self.model)

    def reshard(self) -> bool:
        """Lets a model that is sharded hold its shards, wherever its last pass has left whole parameters.

        Returns:
            Whether the model is sharded at all.
        """
        reshard(self.model)
        return bool(self.shardings) or self.flat_rank is not None

    def _sum_frozen(self) -> dict[str, int]:
        sums = checksums([local(tensor) for tensor in self._frozen.values()])
        return dict(zip(self._frozen, sums, strict=True))

    def _is_spread(self, name: str) -> bool:
        return self.flat_rank is not None or is_sharded(self._frozen[name])

    @property
    def saved_sums(self) -> dict[str, int | None]:
        """The sums of frozen parameters that are the same on every rank, and after resharding; None for others.

        All are named, so that a state has the same keys however the model lies over the ranks.
        """
        return {name: None if self._is_spread(name) else self.frozen_sums.get(name) for name in self._frozen}

    def resume_sums(self, saved: Mapping[str, int | None]) -> None:
        """Takes over the sums that were saved; those of sharded parameters are what is found when looked at next."""
        known = {name: saved.get(name, self.frozen_sums.get(name)) for name in self._frozen}
        self.frozen_sums = {
            name: total for name, total in known.items() if total is not None and not self._is_spread(name)
        }

    def check_frozen(self) -> None:
        """Raises where a parameter that was frozen is trained now."""
        if any(map(_REQUIRES_GRAD, self._frozen.values())):
            for name, tensor in self._frozen.items():
                _check_still_frozen(name, tensor)

    def check_frozen_values(self) -> None:
        """Raises where a frozen parameter is not what it was; reads all of them."""
        for name, found in self._sum_frozen().items():
            if found != self.frozen_sums.setdefault(name, found):
                raise StateError(
                    f"{name!r} is frozen (requires_grad=False), has no average, and yet has changed since the average "
                    "was made. Make the average after the model is loaded; or say what to do with it, as in "
                    f"rules={{{name!r}: 'average'}}"
                )

    def refresh(self, model: nn.Module | None = None) -> None:
        """Walks the model again and takes its present tensors, after everything was checked.

        Args:
            model: the model to look at from now on, where it is another one or otherwise wrapped.

        Raises:
            MismatchError: the model's tensors are no longer those that the averages were made for.
            StateError: a parameter that was frozen is trained now.
        """
        model = self.model if model is None else model
        if model is self.model and self._is_unchanged():
            self.check_frozen()
            return
        known = {entry.name: entry for entry in self.entries}
        found = match_sites(model, self.entries, given_by="the model", rules=self._rules, hint=self._hint)
        entries: list[Entry] = []
        for name, sites in found.items():
            tensor = sites[0].tensor
            if name in known and not known[name].is_loose:
                self._check_kept(known[name], tensor)
                if known[name].reason == "frozen":
                    _check_still_frozen(name, tensor)
                entries.append(known[name]._replace(sites=sites, tensor=tensor))
            else:
                entries.append(make_entry(sites, self._rules)._replace(name=name))
        unmoved = {entry.name: _view(entry.tensor) for entry in entries} == self._views
        same = len(entries) == len(self.entries) and all(
            entry.tensor is known[entry.name].tensor for entry in entries if entry.name in known
        )
        if model is not self.model or not (unmoved and same) or not self.is_current():
            self.model = model
            self._adopt(entries)

    def _check_kept(self, entry: Entry, tensor: Tensor) -> None:
        if average_dtype(tensor.dtype) != average_dtype(entry.dtype) and not self._any_dtype:
            difference = f"{tensor.dtype}, and was {entry.dtype}; cast the model before its average is made"
        elif tensor.device != entry.device and not self._any_device:
            difference = (
                f"on {tensor.device}, and was on {entry.device}; move the model before its average is made, or "
                "choose a device for the average, with device="
            )
        elif entry.action != "skip" and not is_plain(local(tensor)):
            difference = f"a {type(tensor).__name__} of layout {tensor.layout} now, which cannot be averaged"
        else:
            return
        raise MismatchError(f"{entry.name!r} of the model is {difference}. Nothing was written")

    def replaced(self) -> list[tuple[Entry, Site]]:
        """The places that hold another tensor, or the same one with other memory, than when last looked at."""
        if self.is_current():
            return []
        known = {name: entry for entry in self.entries for name in (entry.name, *entry.aliases)}
        sites = [(known[site.name], site) for site in walk(self.model) if site.name in known]
        return [
            (entry, site)
            for entry, site in sites
            if site.tensor is not entry.tensor or _view(site.tensor) != self._views[entry.name]
        ]


def _view(tensor: Tensor) -> tuple[object, ...]:
    here = local(tensor)
    place = (here.data_ptr(), here.stride()) if is_plain(here) else ()
    return place if here is tensor and place else (id(tensor), *place)


def _check_still_frozen(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise StateError(
            f"{name!r} was frozen when the average was made and is trained now; make the average after requires_grad "
            "is set, name it in rules= to average it from the start, or call adapt() to begin now"
        )


# Models in which an average stands. Other averagers of the same model must know, or they would average an average.
_STANDING: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def occupy(model: nn.Module, name: str) -> None:
    """Notes that the average of that name stands in a bare model from now on."""
    _STANDING[model] = name


def leave(model: nn.Module) -> None:
    """Notes that a bare model has its own weights again."""
    _STANDING.pop(model, None)


def check_not_standing(model: nn.Module, call: str) -> None:
    """Raises where an average stands in a bare model or in a part of it, whoever put it there."""
    if not len(_STANDING):  # the usual case, and faster than an empty loop over a weak dictionary
        return
    for other, name in _STANDING.items():
        if other is model or not {*map(id, other.modules())}.isdisjoint(map(id, model.modules())):
            raise StateError(
                f"{call} inside of swapped(): the average {name!r} stands in the model now, not the trained "
                "weights. Leave the swap first"
            )
