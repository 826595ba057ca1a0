"""Tensors by their order: names for those that a file holds without any, and whether an average is the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from polyak.errors import MismatchError, listed
from polyak.files.containers import Leaf, Reader, Stored
from polyak.files.dtypes import DTYPES

Shape = tuple[int, ...]
_BUFFERS = frozenset({"running_mean", "running_var", "num_batches_tracked"})


def positions_to_names(
    shapes: Sequence[Shape | None], raw: Mapping[str, Leaf], names: Sequence[Sequence[str]]
) -> Sequence[str] | None:
    """The names of tensors in the order of a model's parameters.

    Args:
        shapes: of the tensors, where they are known.
        raw: the model's weights in the file. They name the tensors where, statistics of BatchNorm left out, they are as
            many, each with the right shape: then no other buffer is among them that may be taken for a parameter.
        names: lists of names that the caller gave, such as all parameters and those that are trained.

    Returns:
        The names, or None where nobody knows them.

    Raises:
        MismatchError: names were given, and there are more or fewer tensors.
    """
    for given in names:
        if len(given) == len(shapes):
            return given
    if names:
        counts = " or ".join(str(len(given)) for given in names)
        raise MismatchError(
            f"has {len(shapes)} tensors without names, and there are {counts} names for them: {listed(names[0])}. Give "
            "the parameters that were averaged, in their order"
        )
    parameters = _parameters(raw)
    fits = len(parameters) == len(shapes) and all(
        shape is None or shape == leaf.shape for shape, leaf in zip(shapes, parameters.values(), strict=True)
    )
    return list(parameters) if fits and shapes else None


def _parameters(raw: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """The weights that can be parameters, tied ones once."""
    found: dict[str, Leaf] = {}
    seen: set[Leaf] = set()
    for name, leaf in raw.items():
        is_buffer = name.rpartition(".")[2] in _BUFFERS or not DTYPES[leaf.dtype].is_inexact
        if not is_buffer and leaf not in seen:
            found[name] = leaf
            seen.add(leaf)
    return found


def in_order(by_position: Mapping[str, Leaf]) -> list[Leaf]:
    """The tensors of a list."""
    return [by_position[position] for position in sorted(by_position, key=int)]


def stands_in(average: Iterable[Leaf], weights: Iterable[Leaf]) -> bool:
    """Whether all tensors of an average are among the weights, bit for bit and in the same order.

    Reads until one is not, which in a model that was trained since is the first.
    """
    rest = iter(weights)
    with Reader(in_order=True) as reader:
        return all(any(_is_same(one, other, reader) for other in rest) for one in average)


def _is_same(one: Leaf, other: Leaf, reader: Reader) -> bool:
    if not (isinstance(one, Stored) and isinstance(other, Stored)):
        return False
    if (one.dtype, one.shape, one.stride) != (other.dtype, other.shape, other.stride):
        return False
    return all(ours == theirs for ours, theirs in zip(reader.stretches(one), reader.stretches(other), strict=True))
