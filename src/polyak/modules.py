"""Modules made of an average: a copy of the model's structure whose tensors are given."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn

from polyak.entries import Entry
from polyak.errors import StateError


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
    memo: dict[int, Any] = {id(owner): None for owner in owners}
    sources: list[Tensor] = []
    for entry in entries:
        if entry.name in tensors:
            sources += [site.tensor for site in entry.sites]
        replacement = tensors.get(entry.name, entry.tensor.detach())
        for is_parameter in (True, False):
            made = nn.Parameter(replacement, requires_grad=False) if is_parameter else replacement
            memo.update({id(site.tensor): made for site in entry.sites if site.is_parameter == is_parameter})
    addresses = {tensor.untyped_storage().data_ptr(): entry.name for entry, tensor in _owned(entries, tensors)}
    for name, tensor in _cached_tensors(model):
        address = tensor.untyped_storage().data_ptr()
        if tensor.numel() and address in addresses:
            raise _cannot_copy(model, f"{name} is a view of {addresses[address]!r}")
        stale = tensor.detach().clone()
        memo[id(tensor)] = stale.fill_(float("nan")) if stale.is_floating_point() else stale
    try:
        made_module = copy.deepcopy(model, memo)
    except Exception as error:
        raise _cannot_copy(model, f"{type(error).__name__}: {error}") from error
    originals = {id(module) for module in model.modules()} | {id(tensor) for tensor in sources}
    leak = next(_find(made_module, originals), None)
    if leak is not None:
        raise _cannot_copy(model, f"{leak} would go on reading the weights that are being trained")
    return made_module.eval().requires_grad_(False)


def _owned(entries: Iterable[Entry], tensors: Mapping[str, Tensor]) -> list[tuple[Entry, Tensor]]:
    return [(entry, entry.tensor) for entry in entries if entry.name in tensors]


def _cannot_copy(model: nn.Module, why: str) -> StateError:
    return StateError(
        f"{type(model).__name__} cannot be copied: {why}. Use `with average.swapped(): ...`, which copies no module"
    )


def _cached_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors with a graph that modules hold outside of their parameters and buffers; deepcopy refuses these."""
    for name, module in cast("Iterator[tuple[str, nn.Module]]", model.named_modules()):
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules"):
                for _, item in [("", value), *_inside(value)]:
                    if isinstance(item, Tensor) and not item.is_leaf:
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
    if isinstance(value, nn.Module):
        yield from ((f".{key}", item) for key, item in vars(value).items())
    elif isinstance(value, dict):
        yield from ((f"[{key!r}]", item) for key, item in cast("dict[object, object]", value).items())
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((f"[{position}]", item) for position, item in enumerate(cast("Iterable[object]", value)))
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
    elif isinstance(value, functools.partial):
        partial = cast("functools.partial[object]", value)
        yield from ((".func", partial.func), (".args", partial.args), (".keywords", partial.keywords))
    elif isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        yield from ((f" (closure over {name})", cell.cell_contents) for name, cell in cells if not _is_empty(cell))
        yield from ((" (default)", item) for item in (value.__defaults__, value.__kwdefaults__))


def _is_empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # a cell is asked by looking into it
    except ValueError:
        return True
    return False
