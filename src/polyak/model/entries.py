"""From a model to its entries: which tensors it has, under which names, and what is done with each.

An entry is one tensor. Tied names are one entry with aliases, wrappers leave no trace in a name, and every decision
about a tensor (average, copy or skip it) is taken here, once, and carries its reason.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from polyak.errors import MismatchError, StateError, listed, outside
from polyak.kernels import identity, is_freed, is_plain, overlapping, overlaps_itself
from polyak.ranks import Sharding, is_sharded, local, sharding_of, whole

from .fsdp import flat_rank, reshard
from .walk import Site, unwrap, walk

Action: TypeAlias = Literal["average", "copy", "skip"]
RuleKey: TypeAlias = "str | type[nn.Module] | Callable[[str, Tensor], bool]"
Rules: TypeAlias = Mapping[RuleKey, Action]

AVERAGEABLE = frozenset(
    {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128}
)


class Entry(NamedTuple):
    """One tensor of the source: all the places that hold it, and what is done with it.

    Attributes:
        name: the canonical name, the first in registration order.
        sites: every place that holds the tensor; more than one where it is tied.
        action: average, copy or skip.
        reason: why, in a few words, for reports and errors.
        tensor: the tensor itself, held strongly because addresses get reused.
        shape: as it was when the average was made, of the whole. A tensor may change its own when its data is replaced.
        dtype: as it was then.
        device: as it was then.
        sharding: how it lay over the ranks then; None for a plain tensor.
    """

    name: str
    sites: tuple[Site, ...]
    action: Action
    reason: str
    tensor: Tensor
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    sharding: Sharding | None = None

    __eq__ = object.__eq__
    __ne__ = object.__ne__
    __hash__ = object.__hash__

    @property
    def local(self) -> Tensor:
        """The part of the tensor that this process holds, a plain tensor."""
        return local(self.tensor)

    @property
    def aliases(self) -> tuple[str, ...]:
        """The other names of a tied tensor."""
        return tuple(site.name for site in self.sites[1:])

    @property
    def persistent_names(self) -> tuple[str, ...]:
        """The names under which the bare model's `state_dict()` holds this tensor."""
        return tuple(site.name for site in self.sites if site.persistent)

    @property
    def is_loose(self) -> bool:
        """Whether it may come, go and change its shape while the model runs, as caches do: nobody saves it."""
        kept = any(site.persistent for site in self.sites)
        return self.reason != "frozen" and (self.action == "skip" or (self.action == "copy" and not kept))

    @property
    def is_parameter(self) -> bool:
        """Whether any place holds it as a parameter."""
        return any(site.is_parameter for site in self.sites)


def gather(model: nn.Module) -> list[list[Site]]:
    """The tensors of the bare model, each with all the places that hold it.

    Raises:
        StateError: a tensor has no values yet, or none here.
        TypeError: it is no module.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]  # users pass anything
        raise TypeError(f"model: a torch.nn.Module is needed, not {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise StateError(f"{type(model).__name__} is a TorchScript module; average the module that it was made of")
    reshard(model)
    ties: dict[Any, list[Site]] = {}
    is_flat = flat_rank(model) is not None
    for site in walk(model):
        _check_initialised(site, may_be_empty=is_flat or is_sharded(site.tensor))
        ties.setdefault(identity(site.tensor), []).append(site)
    return list(ties.values())


def resolve(model: nn.Module, rules: Rules, *, include_frozen: bool = False) -> list[Entry]:
    """Lists the entries of a model, each with its action.

    Args:
        model: the source, bare or wrapped.
        rules: what to do with which tensors; the first match wins, over the defaults.
        include_frozen: average frozen parameters too, where by default they are skipped.

    Raises:
        StateError: the model has nothing to average, or a tensor that cannot be averaged.
        MismatchError: two tensors share memory without being the same tensor.
    """
    check_rules(rules)
    entries = [make_entry(sites, rules, include_frozen=include_frozen) for sites in gather(model)]
    _check_overlaps(entries)
    names = [site.name for entry in entries for site in entry.sites]
    unused = [key for key in rules if isinstance(key, str) and not fnmatch.filter(names, key)]
    if unused:
        warnings.warn(f"rules: no tensor of the model is called {listed(unused)}", stacklevel=outside())
    if not any(entry.action == "average" for entry in entries):
        frozen = sum(entry.reason == "frozen" for entry in entries)
        raise StateError(
            f"there is nothing to average: {type(unwrap(model)).__name__} has {len(entries)} tensors, {frozen} of them "
            "frozen parameters; set requires_grad before the average is made, or name tensors to average in rules="
        )
    return entries


def make_entry(sites: Sequence[Site], rules: Rules, *, include_frozen: bool = False) -> Entry:
    """The entry of one tensor, given all the places that hold it.

    Raises:
        StateError: it is to be averaged or copied, and cannot be.
    """
    action, reason = _decide(sites, rules, include_frozen)
    tensor = sites[0].tensor
    entry = Entry(
        sites[0].name,
        tuple(sites),
        action,
        reason,
        tensor,
        shape=tensor.shape,
        dtype=tensor.dtype,
        device=tensor.device,
        sharding=sharding_of(tensor),
    )
    _check_averageable(entry)
    return entry


def check_rules(rules: Rules) -> None:
    """Raises ValueError or TypeError for rules that cannot be meant."""
    if not isinstance(rules, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  # users pass anything
        raise TypeError(f"rules: a dictionary of actions is needed, such as {{'*.bias': 'skip'}}, not {rules!r}")
    for key, action in rules.items():
        if action not in get_args(Action):
            raise ValueError(f"rules: {key!r} is to {action!r}; the actions are {', '.join(get_args(Action))}")
        if not (isinstance(key, str) or callable(key)) or (isinstance(key, type) and not issubclass(key, nn.Module)):
            raise TypeError(f"rules: {key!r} is neither a name pattern, nor a module class, nor a function of a tensor")


def _decide(sites: Sequence[Site], rules: Rules, include_frozen: bool) -> tuple[Action, str]:
    for key, action in rules.items():
        if any(_matches(key, site) for site in sites):
            return action, f"rule {key if isinstance(key, str) else getattr(key, '__name__', key)!s}"
    tensor = sites[0].tensor
    is_parameter = sites[0].is_parameter or any(site.is_parameter for site in sites)
    if not is_parameter and not is_plain(local(tensor)):
        return "skip", f"buffer of layout {tensor.layout}"
    if not is_parameter and overlaps_itself(local(tensor)):
        return "skip", "expanded buffer"
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return "copy", "not a floating-point tensor"
    if is_parameter:
        if tensor.requires_grad or include_frozen:
            return "average", "parameter"
        return "skip", "frozen"
    if not any(site.persistent for site in sites):
        return "copy", "non-persistent buffer"
    if any(_is_spectral_vector(site) for site in sites):
        return "copy", "singular vector of a spectral norm"
    if tensor.dtype in AVERAGEABLE and not _is_finite(tensor):
        return "copy", "buffer with infinities or NaNs"
    return "average", "buffer"


def _is_finite(tensor: Tensor) -> bool:
    # All ranks must do the same, so that each looks at the whole.
    return bool(whole(tensor).isfinite().all())


def _matches(key: RuleKey, site: Site) -> bool:
    if isinstance(key, str):
        return fnmatch.fnmatchcase(site.name, key)
    if isinstance(key, type):
        return isinstance(site.module, key)
    return bool(key(site.name, site.tensor))


def _is_spectral_vector(site: Site) -> bool:
    if isinstance(site.module, _SpectralNorm):
        return True
    hooks = cast("dict[int, object]", vars(site.module)["_forward_pre_hooks"]).values()
    return any(isinstance(hook, SpectralNorm) and site.key in (f"{hook.name}_u", f"{hook.name}_v") for hook in hooks)


def _check_initialised(site: Site, *, may_be_empty: bool) -> None:
    tensor = local(site.tensor)
    if nn.parameter.is_lazy(tensor):
        raise StateError(f"{site.name!r} is not initialised yet; run a forward pass before the average is made")
    if tensor.is_meta:
        raise StateError(f"{site.name!r} is on the meta device and has no values; materialise the model first")
    if is_freed(tensor):
        raise StateError(
            f"the memory of {site.name!r} was freed, by offloading or sharding; bring its values back before an "
            "average reads them"
        )
    # What ZeRO-3 leaves of any shape is a vector of no elements, and it marks parameters by numbers of its own.
    if site.is_parameter and not may_be_empty and (tensor.shape == (0,) or hasattr(site.tensor, "ds_id")):
        raise StateError(
            f"{site.name!r} is a parameter of {tensor.numel()} elements (shape {tuple(tensor.shape)}), as ZeRO-3 "
            "leaves where it takes the values away; average under ZeRO-2, which leaves them whole"
        )


def _check_averageable(entry: Entry) -> None:
    tensor = entry.local
    is_usual = entry.sharding is None and is_plain(tensor) and (tensor.is_contiguous() or not overlaps_itself(tensor))
    if entry.action == "skip" or (is_usual and (entry.action == "copy" or tensor.dtype in AVERAGEABLE)):
        return

    def rule(action: Action) -> str:
        return f"rules={{{entry.name!r}: {action!r}}}"

    if entry.sharding is not None and entry.sharding.is_partial:
        raise StateError(
            f"{entry.name!r} is sharded as {entry.sharding}, of which no rank has the values; redistribute it, or give "
            f"it a rule, as in {rule('skip')}"
        )
    if not is_plain(tensor):
        kind = f"a {type(tensor).__name__}, {tensor.layout}"
        raise StateError(f"{entry.name!r} cannot be averaged: it is {kind}; give it a rule, as in {rule('skip')}")
    if overlaps_itself(tensor):
        raise StateError(
            f"{entry.name!r} is an expanded view, of which one element stands for many; clone it, or give it a rule, "
            f"as in {rule('skip')}"
        )
    if entry.action == "average" and tensor.dtype not in AVERAGEABLE:
        raise StateError(
            f"{entry.name!r} cannot be averaged: its dtype is {tensor.dtype}; give it a rule, as in {rule('copy')}"
        )


def _check_overlaps(entries: list[Entry]) -> None:
    """Raises where an averaged tensor shares memory with another entry: a part of it would be averaged twice."""
    for first, second in overlapping([entry.local for entry in entries]):
        one, other = entries[first], entries[second]
        if "average" in (one.action, other.action):
            raise MismatchError(
                f"{one.name!r} {tuple(one.shape)} and {other.name!r} {tuple(other.shape)} share memory without being "
                "the same tensor; only whole tensors can be tied. Clone one of them"
            )
