"""Canonical names: what a tensor is called in the bare model, whatever wraps it.

Strings only. Which modules wrap others is known to `entries`; here is what can be said of a name by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")

# Attribute names that only wrappers use: torch.compile, FSDP and activation checkpointing. They may stand anywhere
# in a name, so they are dropped anywhere. "module" is not among them: a model may have a part of that name.
WRAPPER_SEGMENTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def join(path: Iterable[str]) -> str:
    """Joins the segments of a path into a canonical name.

    Example:
        >>> join(["_orig_mod", "layer", "_checkpoint_wrapped_module", "weight"])
        'layer.weight'
    """
    return ".".join(segment for segment in path if segment not in WRAPPER_SEGMENTS)


def canonical(name: str) -> str:
    """Drops the segments that only wrappers use from a name.

    Example:
        >>> canonical("layer._checkpoint_wrapped_module.weight")
        'layer.weight'
    """
    return join(name.split("."))


def match(tensors: Mapping[str, T], expected: Iterable[str]) -> dict[str, T]:
    """Renames the tensors of a saved dictionary to canonical names, as far as `expected` knows them.

    Wrapper segments are dropped. A leading "module." is added to or removed from all names together, when that is
    what makes them the expected ones: data-parallel wrappers put it there, and a bare model may have it by itself.

    Example:
        >>> match({"module._orig_mod.weight": 1}, ["weight"])
        {'weight': 1}
        >>> match({"weight": 1}, ["module.weight"])
        {'module.weight': 1}
    """
    wanted = set(expected)
    bare = {canonical(name): tensor for name, tensor in tensors.items()}
    candidates = [bare]
    if all(name.startswith("module.") for name in bare):
        candidates.append({name.removeprefix("module."): tensor for name, tensor in bare.items()})
    candidates.append({f"module.{name}": tensor for name, tensor in bare.items()})
    # The first of equals wins, so that names which fit as they are stay as they are.
    return max(candidates, key=lambda candidate: len(wanted & candidate.keys()))
