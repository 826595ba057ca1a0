"""Canonical names: what a tensor is called in the bare model, whatever wraps it.

Strings only. Which modules wrap others is known to `model`; here is what can be said of a name by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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


def parts_around(name: str, given: Iterable[str]) -> list[str]:
    """What stands before a name in given names: the parts of larger models that have it, the outermost first.

    Example:
        >>> parts_around("weight", ["net.head.weight", "net.weight", "weight"])
        ['net.', 'net.head.']
    """
    found = {one.removesuffix(name) for one in given if one.endswith(f".{name}")}
    return sorted(found, key=lambda part: (part.count("."), part))


def renaming(given: Iterable[str], expected: Iterable[str]) -> Callable[[str], str]:
    """How given names are to be changed to be the expected ones, as far as wrappers explain the difference.

    Wrapper segments are dropped. A leading "module." is added to or removed from all names together, when that is
    what makes them the expected ones: data-parallel wrappers put it there, and a bare model may have it by itself.

    Example:
        >>> renaming(["module._orig_mod.weight"], ["weight"])("module._orig_mod.weight")
        'weight'
        >>> renaming(["weight"], ["module.weight"])("weight")
        'module.weight'
    """
    wanted = set(expected)
    bare = [canonical(name) for name in given]
    changes: list[Callable[[str], str]] = [canonical, lambda name: canonical(f"module.{name}")]
    if all(name.startswith("module.") for name in bare):
        changes.append(lambda name: canonical(name).removeprefix("module."))
    # The first of equals wins, so that names which fit as they are stay as they are.
    return max(changes, key=lambda change: len(wanted.intersection(map(change, bare))))


def match(tensors: Mapping[str, T], expected: Iterable[str]) -> dict[str, T]:
    """Renames the tensors of a saved dictionary as `renaming` says.

    Example:
        >>> match({"module._orig_mod.weight": 1}, ["weight"])
        {'weight': 1}
    """
    rename = renaming(tensors, expected)
    return {rename(name): tensor for name, tensor in tensors.items()}
