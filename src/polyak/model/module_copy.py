"""Modules made of an average: a copy of the model's structure whose tensors are given."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn

from polyak.errors import StateError
from polyak.kernels import is_plain

from .entries import Entry
from .walk import walk


def build_module(
    model: nn.Module, entries: Iterable[Entry], tensors: Mapping[str, Tensor], *, owners: Iterable[object] = ()
) -> nn.Module:
    """Copies a module's structure, with other tensors in place of its own.

    The copy is in eval mode and needs no gradients. Its tensors are those given, not copies of them; tied ones stay
    tied. Values that the model cached with a graph attached to them (as the older weight norm does) belong to the
    source's weights: their copies are filled with NaN, so that a module which does not make them anew cannot pass for
    right.

    Args:
        model: the module to copy.
        entries: its entries.
        tensors: the tensor for each entry by name; entries without one share the source's.
        owners: objects that are left out of the copy where the model refers to them, such as the averager.

    Raises:
        StateError: something in the model cannot be copied, or would go on reading the source's weights.
    """
    entries = list(entries)
    made = _replacements(entries, tensors)
    memo: dict[int, Any] = {id(owner): None for owner in owners} | made
    addresses = {entry.tensor.untyped_storage().data_ptr(): entry.name for entry in _averaged(entries, tensors)}
    try:
        for name, tensor in _loose_tensors(model, set(made)):
            if tensor.numel() and is_plain(tensor) and tensor.untyped_storage().data_ptr() in addresses:
                raise _cannot_copy(model, f"{name} is a view of {addresses[tensor.untyped_storage().data_ptr()]!r}")
            if not tensor.is_leaf:
                stale = tensor.detach().clone()
                memo[id(tensor)] = stale.fill_(float("nan")) if stale.is_floating_point() else stale
        module = copy.deepcopy(model, memo)
        originals = {id(part) for part in model.modules()}
        originals |= {id(site.tensor) for entry in _averaged(entries, tensors) for site in entry.sites}
        leak = next(_find(module, originals), None)
    except StateError:
        raise
    except Exception as error:
        raise _cannot_copy(model, f"{type(error).__name__}: {error}") from error
    if leak is not None:
        raise _cannot_copy(model, f"{leak} would go on reading the weights that are being trained")
    _check_made(model, module, {id(tensor) for tensor in made.values()})
    return module.eval().requires_grad_(False)


def _replacements(entries: list[Entry], tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """By the identity of each tensor of the source, what stands for it in the copy."""
    made: dict[int, Tensor] = {}
    for entry in entries:
        replacement = tensors.get(entry.name, entry.tensor.detach())
        parameter = nn.Parameter(replacement, requires_grad=False) if entry.is_parameter else replacement
        made.update({id(site.tensor): parameter if site.is_parameter else replacement for site in entry.sites})
    return made


def _averaged(entries: list[Entry], tensors: Mapping[str, Tensor]) -> list[Entry]:
    return [entry for entry in entries if entry.name in tensors]


def _check_made(model: nn.Module, module: nn.Module, made: set[int]) -> None:
    """Raises where a module made its copy in its own way, and did not take the tensors that it was to take."""
    for site in walk(module):
        if id(site.tensor) not in made:
            raise _cannot_copy(model, f"{site.name!r} is copied in a way of its own (by a __deepcopy__, say)")


def _cannot_copy(model: nn.Module, why: str) -> StateError:
    return StateError(
        f"{type(model).__name__} cannot be copied: {why}. Use `with average.swapped(): ...`, which copies no module"
    )


def _loose_tensors(model: nn.Module, registered: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Tensors that modules hold outside of their parameters and buffers."""
    for name, module in cast("Iterator[tuple[str, nn.Module]]", model.named_modules()):
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules"):
                for _, item in [("", value), *_inside(value)]:
                    if isinstance(item, Tensor) and id(item) not in registered:
                        yield f"{name}.{key}".lstrip("."), item


def _find(root: object, originals: set[int]) -> Iterator[str]:
    """Paths by which a copied module still reaches one of the originals: what deepcopy does not copy, functions do."""
    seen: set[int] = set()
    stack: list[tuple[str, object]] = [("it", root)]
    while stack:
        path, value = stack.pop()
        if id(value) in originals:
            yield path
        if id(value) in seen:
            continue
        seen.add(id(value))
        stack += [(f"{path}{step}", item) for step, item in _inside(value)]


def _inside(value: object) -> Iterator[tuple[str, object]]:
    """What an object holds, with the step of a path that leads there."""
    if isinstance(value, (type, types.ModuleType, Tensor)):
        return
    whole: object = value
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", item) for key, item in cast("dict[object, object]", value).items())
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((f"[{position}]", item) for position, item in enumerate(cast("Iterable[object]", value)))
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
    elif isinstance(value, weakref.ref):
        # Recurrent layers keep such references to their own tensors, and do not read them.
        target = cast("object", value())
        if not isinstance(target, Tensor):
            yield "()", target
    elif isinstance(value, functools.partial):
        partial = cast("functools.partial[object]", value)
        yield from ((".func", partial.func), (".args", partial.args), (".keywords", partial.keywords))
    elif isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        yield from ((f" (closure over {name})", cell.cell_contents) for name, cell in cells if not _is_empty(cell))
        yield from ((" (default)", item) for item in (value.__defaults__, value.__kwdefaults__))
    # Modules, objects of any class, and what functools wraps around a function.
    yield from ((f".{key}", item) for key, item in getattr(whole, "__dict__", {}).items())
    yield from ((f".{slot}", getattr(whole, slot)) for slot in _slots(type(whole)) if hasattr(whole, slot))


def _slots(kind: type) -> list[str]:
    found: list[str] = []
    for base in kind.__mro__:
        slots: str | Iterable[str] = vars(base).get("__slots__", ())
        found += [slots] if isinstance(slots, str) else list(slots)
    return [slot for slot in found if slot not in ("__dict__", "__weakref__") and not slot.startswith("__")]


def _is_empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # a cell is asked by looking into it
    except ValueError:
        return True
    return False
