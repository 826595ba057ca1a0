"""Target and teacher networks: one set of weights that follows another, in one call."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard, cast

import torch
from torch import Tensor, nn

from polyak.errors import MismatchError, listed
from polyak.kernels import Plan, Row, average_dtype, copy_, identity, is_plain, kind_of, overlapping, overlaps_itself
from polyak.model import AVERAGEABLE, check_not_standing, check_same_names, gather, resolve, unwrap

Tensors: TypeAlias = "nn.Module | Mapping[str, Tensor] | Iterable[Tensor]"


def lerp_(target: Tensors, source: Tensors, *, weight: float) -> None:
    """Moves a target network or a teacher towards its source, in place.

        target = target + weight * (source - target)

    Modules are matched by name, whatever wraps them: parameters, frozen or not, and floating-point buffers are
    averaged; integers, booleans and non-persistent buffers are copied. Dictionaries of tensors are matched by key,
    lists by position. Tied tensors move once. Either everything moves or nothing does. Modules are looked through
    once and remembered as long as they and their tensors stay; dictionaries and lists are looked through each time.

    Args:
        target: what moves: a module, a dictionary of tensors, or tensors in a list (`module.parameters()`, say). Its
            dtype and device may be other than the source's.
        source: what it moves towards; of the same kind.
        weight: the share of the source's weights, from 0 to 1, which is 1 - decay: 0.005 where others write a decay
            of 0.995. weight=0.995 is the share of the new weights; 0.005 was probably meant. 1 copies.

    Raises:
        MismatchError: the two have other names, shapes or kinds of tensors, or share memory. Nothing was written.
        ValueError: the weight is outside of [0, 1]; or the target has 16 bits, in which it would not move.
        TypeError: the two are not of one kind.
        StateError: an average stands in one of the modules.

    Example:
        >>> online, target = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> lerp_(target, online, weight=1)
        >>> torch.equal(target.weight, online.weight)
        True
        >>> tensor = torch.zeros(2)
        >>> lerp_([tensor], [torch.ones(2)], weight=0.005)
        >>> tensor
        tensor([0.0050, 0.0050])

    Source: Lillicrap et al., Continuous control with deep reinforcement learning, 2015, algorithm 1. Tarvainen and
    Valpola, Mean teachers are better role models, 2017.
    """
    if not 0 <= weight <= 1:
        raise ValueError(
            f"weight={weight!r}: it is the share of the source's weights that the target takes, from 0 to 1, such as "
            "0.005"
        )
    _pair(target, source).lerp_(float(weight))


@dataclass(frozen=True)
class _Match:
    """A tensor of the target, the one of the source that it follows, and whether it is averaged or copied."""

    name: str
    target: Tensor
    source: Tensor
    averaged: bool


class _Pair:
    """A target and its source, checked and ready to run. It holds their tensors, but no module."""

    def __init__(self, matches: list[_Match], addresses: list[int] | None = None) -> None:
        self.addresses = addresses
        for match in matches:
            _check_same_kind(match)
        matches = _each_once(matches)
        _check_apart(matches)
        averaged = [match for match in matches if match.averaged]
        copied = [match for match in matches if not match.averaged]
        self._halves = [match.name for match in averaged if average_dtype(match.target.dtype) != match.target.dtype]
        self._plan = Plan([Row(match.name, match.source.detach(), (match.target.detach(),)) for match in averaged])
        self._copies = [match.target.detach() for match in copied], [match.source.detach() for match in copied]

    def lerp_(self, weight: float) -> None:
        if self._halves and weight != 1.0:
            raise ValueError(
                f"weight={weight!r}: the target's {listed(self._halves)} have 16 bits, in which they would not move: "
                "rounding to nearest drops small steps. Keep the target in torch.float32, as target.float() makes it; "
                "the source may have 16 bits"
            )
        with torch.no_grad():
            self._plan.run([weight])
            copy_(*self._copies)
        # So that a graph which was built on a target before, and needs it as it was, raises and does not mislead.
        torch.autograd.graph.increment_version([row.averages[0] for row in self._plan.rows])


# Pairs of modules that came before. A pair is dropped with either of its modules, and made anew when either has got
# other tensors; until then it holds those that it had, so that no address in it can be given to another tensor.
_Pairs: TypeAlias = "weakref.WeakKeyDictionary[nn.Module, _Pair]"
_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Pairs] = weakref.WeakKeyDictionary()


def _pair(target: object, source: object) -> _Pair:
    given = f"{type(target).__name__} and {type(source).__name__}"
    if isinstance(target, nn.Module) and isinstance(source, nn.Module):
        return _pair_of_modules(target, source)
    if _is_list(target) and _is_list(source):
        return _Pair(_match_lists(list(target), list(source)))
    if isinstance(target, Mapping) and isinstance(source, Mapping):
        return _Pair(_match_mappings(cast("Mapping[str, Any]", target), cast("Mapping[str, Any]", source)))
    raise TypeError(
        f"lerp_: target and source are two modules, two dictionaries of tensors or two lists of tensors, not {given}"
    )


def _is_list(value: object) -> TypeGuard[Iterable[Any]]:
    # The others can be iterated over, but are no tensors in an order.
    return isinstance(value, Iterable) and not isinstance(value, (nn.Module, Mapping, Tensor, Set, str))


def _pair_of_modules(target: nn.Module, source: nn.Module) -> _Pair:
    for module in (target, source):
        check_not_standing(unwrap(module), "lerp_()")
    addresses = _addresses(target, source)
    pairs = _KNOWN.setdefault(target, weakref.WeakKeyDictionary())
    pair = pairs.get(source)
    if pair is None or addresses is None or pair.addresses != addresses:
        pairs.pop(source, None)
        matches = _match_modules(target, source)
        pair = _Pair(matches, addresses)
        # Of other kinds of tensors, such as DTensors, the address does not tell which they are.
        if addresses is not None and all(
            is_plain(tensor) for match in matches for tensor in (match.target, match.source)
        ):
            pairs[source] = pair
    return pair


def _addresses(*modules: nn.Module) -> list[int] | None:
    """Where each tensor is, in a fixed order: about 0.5 microseconds for each tensor and each part of the modules."""
    addresses: list[int] = []
    stack = list(modules)
    try:
        while stack:
            part = stack.pop()
            for holder in (part._parameters, part._buffers):
                addresses += [tensor.data_ptr() for tensor in holder.values() if tensor is not None]
            addresses.append(-1)
            stack += [child for child in part._modules.values() if child is not None]
    except RuntimeError:  # sparse tensors have no address
        return None
    return addresses


def _match_modules(target: nn.Module, source: nn.Module) -> list[_Match]:
    entries = resolve(target, {}, include_frozen=True)
    found = {sites[0].name: sites for sites in gather(source)}
    check_same_names(
        {name: [site.name for site in sites] for name, sites in found.items()},
        {entry.name: [entry.name, *entry.aliases] for entry in entries},
        given_by="the source",
        wanted_by="the target",
    )
    return [
        _Match(entry.name, entry.tensor, found[entry.name][0].tensor, entry.action == "average")
        for entry in entries
        if entry.action != "skip"
    ]


def _match_mappings(target: Mapping[str, Any], source: Mapping[str, Any]) -> list[_Match]:
    check_same_names(
        {name: [name] for name in source},
        {name: [name] for name in target},
        given_by="the source",
        wanted_by="the target",
    )
    return [_match(name, tensor, source[name]) for name, tensor in target.items()]


def _match_lists(target: list[Any], source: list[Any]) -> list[_Match]:
    if len(target) != len(source):
        raise MismatchError(
            f"the target has {len(target)} tensors, of shapes {listed(map(_shape, target))}; the source has "
            f"{len(source)}, of shapes {listed(map(_shape, source))}. Nothing was written"
        )
    return [_match(f"tensor {i}", one, other) for i, (one, other) in enumerate(zip(target, source, strict=True))]


def _match(name: str, target: Any, source: Any) -> _Match:
    for tensor, whose in ((target, "target"), (source, "source")):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name!r} of the {whose} is a {type(tensor).__name__}, not a tensor")
    return _Match(name, target, source, target.is_floating_point() or target.is_complex())


def _shape(tensor: Any) -> object:
    return tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__


def _check_same_kind(match: _Match) -> None:
    target, source = match.target, match.source
    if source.shape != target.shape:
        difference = f"the shape {tuple(source.shape)} in the source and {tuple(target.shape)} in the target"
    elif kind_of(source.dtype) != kind_of(target.dtype):
        difference = f"the dtype {source.dtype} in the source and {target.dtype} in the target"
    elif match.averaged and not {source.dtype, target.dtype} <= AVERAGEABLE:
        difference = f"the dtype {source.dtype} in the source and {target.dtype} in the target, not to be averaged"
    elif overlaps_itself(target):
        difference = "several elements in one place of the target's memory, as expand() makes them"
    else:
        return
    raise MismatchError(f"{match.name!r} has {difference}. Nothing was written")


def _each_once(matches: list[_Match]) -> list[_Match]:
    """Leaves a tied tensor out where it comes again; it must be tied in the source as well."""
    first: dict[object, _Match] = {}
    for match in matches:
        known = first.setdefault(identity(match.target), match)
        if known is not match and identity(known.source) != identity(match.source):
            raise MismatchError(
                f"{known.name!r} and {match.name!r} are one tensor in the target and two in the source. Nothing was "
                "written"
            )
    return list(first.values())


def _check_apart(matches: list[_Match]) -> None:
    """Raises where memory of the target is also another tensor's, of the source or of the target itself."""
    names = [f"{match.name!r} of the target" for match in matches] + [f"{m.name!r} of the source" for m in matches]
    tensors = [match.target for match in matches] + [match.source for match in matches]
    for one, other in overlapping(tensors):
        # Two tensors of the source may be tied: they are not written.
        if one < len(matches):
            raise MismatchError(
                f"{names[one]} and {names[other]} share memory: the target needs tensors of its own, as copy.deepcopy "
                "makes them. Nothing was written"
            )
