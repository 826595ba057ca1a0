"""How far averages are from the weights that are trained, and which numbers are none: read in parts, summed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from polyak.files.containers import (
    Leaf,
    Reader,
    Region,
    all_regions,
    flattened,
    item_bytes,
    sizes,
    spread_regions,
    wide,
)
from polyak.files.dtypes import DTYPES

from .account import Distance, NonFiniteTensor

# How many numbers are read at a time: in 64 bits they are still below what an allocator gives back to the system at
# once, and having it back, page by page, takes several times as long as all that is done here.
_CHUNK = 1 << 14


@dataclass(slots=True)
class Row:
    """Tensors of one name and shape in several sets of weights, and what is summed over their numbers.

    Attributes:
        name: the first of its names.
        leaves: by set.
        num_numbers: of one of them.
        num_read: how many of these were read.
        squares: sums of squares over what was read, by set; of a set that is compared, those of the difference.
        nonfinite: how many numbers are NaN, and how many infinite, by set.
    """

    name: str
    leaves: dict[str, Leaf]
    num_numbers: int
    num_read: int = 0
    squares: dict[str, float] = field(default_factory=dict[str, float])
    nonfinite: dict[str, tuple[int, int]] = field(default_factory=dict[str, "tuple[int, int]"])

    @property
    def num_bytes(self) -> int:
        """What reading all of it takes."""
        return self.num_numbers * sum(item_bytes(leaf) for leaf in dict.fromkeys(self.leaves.values()))

    def scaled(self, key: str) -> float:
        """The sum of squares over all of the tensor, as far as one can tell from what was read."""
        return self.squares[key] * (self.num_numbers / self.num_read)


def is_looked_at(leaf: Leaf) -> bool:
    """Whether a tensor has numbers that can be compared."""
    return DTYPES[leaf.dtype].is_inexact and math.prod(leaf.shape) > 0


def rows(sets: Mapping[str, Mapping[str, Leaf]]) -> list[Row]:
    """What there is to read, by name; tensors with several names once."""
    found: dict[tuple[tuple[str, Leaf], ...], Row] = {}
    for name in dict.fromkeys(name for tensors in sets.values() for name in tensors):
        by_shape: dict[tuple[int, ...], dict[str, Leaf]] = {}
        for key, tensors in sets.items():
            if name in tensors and is_looked_at(tensors[name]):
                by_shape.setdefault(tensors[name].shape, {})[key] = tensors[name]
        for shape, leaves in by_shape.items():
            found.setdefault(tuple(leaves.items()), Row(name, leaves, math.prod(shape)))
    return list(found.values())


def look(
    reader: Reader, given: Sequence[Row], *, raw: str, budget: int | None, progress: Callable[[int], None] | None = None
) -> None:
    """Reads tensors and fills in the sums.

    Args:
        reader: reads them.
        given: the rows.
        raw: the set that the others are compared with.
        budget: bytes that are read at most, about; None for all.
        progress: told how many bytes more were read.
    """
    level = math.inf if budget is None else _level([row.num_bytes for row in given], budget)
    jobs = [_Job(row, level) for row in given]
    if level < math.inf:
        for job in jobs:
            for region in job.regions():
                for leaf in job.distinct:
                    reader.expect(leaf, region)
    for job in jobs:
        row = job.row
        for region in job.regions():
            _add(row, reader, job.leaves, region, raw)
            if progress is not None:
                progress(math.prod(sizes(region)) * row.num_bytes // row.num_numbers)


def _level(sizes: Iterable[int], budget: int) -> float:
    """How much of each tensor can be read within a budget: of smaller ones all, and the rest shared by the others.

    Example:
        >>> _level([10, 100, 100], 110), _level([10, 20], 110)
        (50.0, inf)
    """
    left = sorted(sizes)
    rest = float(budget)
    for place, size in enumerate(left):
        if size * (len(left) - place) > rest:
            return rest / (len(left) - place)
        rest -= size
    return math.inf


class _Job:
    """What of a row is read."""

    def __init__(self, row: Row, level: float) -> None:
        self.row = row
        self.leaves = dict(zip(row.leaves, flattened(list(row.leaves.values())), strict=True))
        self.distinct = list(dict.fromkeys(self.leaves.values()))
        self._level = level

    def regions(self) -> Iterator[Region]:
        """All of it, or stretches that take a given number of bytes in all."""
        if self.row.num_bytes <= self._level:
            return all_regions(self.distinct, _CHUNK)
        share = max(int(self._level / sum(map(item_bytes, self.distinct))), 1)
        stretch = min(share, _CHUNK)
        return spread_regions(self.distinct, stretch, share // stretch)


def _add(row: Row, reader: Reader, leaves: Mapping[str, Leaf], region: Region, raw: str) -> None:
    import numpy as np

    given = {leaf: reader.array(leaf, region) for leaf in dict.fromkeys(leaves.values())}
    row.num_read += math.prod(sizes(region))
    with np.errstate(all="ignore"):
        numbers = {leaf: wide(values).ravel() for leaf, values in given.items()}
        # Numbers that are none make the sum one, too: then they are counted.
        sums = {leaf: _square(values) for leaf, values in numbers.items()}
        for key, leaf in leaves.items():
            if not math.isfinite(sums[leaf]):
                num_nan = int(np.isnan(given[leaf]).sum())
                num_infinite = int((~np.isfinite(given[leaf])).sum()) - num_nan
                before = row.nonfinite.get(key, (0, 0))
                row.nonfinite[key] = (before[0] + num_nan, before[1] + num_infinite)
            is_alone = key == raw or raw not in leaves
            square = sums[leaf] if is_alone else _square(numbers[leaf] - numbers[leaves[raw]])
            row.squares[key] = row.squares.get(key, 0.0) + square


def _square(numbers: Any) -> float:
    """Its norm, squared. Not by BLAS, whose threads wait for each other longer than all of this takes."""
    import numpy as np

    parts = numbers.view(np.float64)
    return float(np.einsum("i,i->", parts, parts))


def distances(rows: Iterable[Row], averages: Iterable[str], *, raw: str) -> tuple[Distance, ...]:
    """Those of each average, of the whole first."""
    found: list[Distance] = []
    for average in averages:
        compared = [row for row in rows if average in row.leaves and raw in row.leaves]
        if not compared:
            continue
        found.append(_distance(average, None, compared, raw))
        parts: dict[str, list[Row]] = {}
        for row, part in zip(compared, modules([row.name for row in compared]), strict=True):
            parts.setdefault(part, []).append(row)
        found += [_distance(average, part, inside, raw) for part, inside in parts.items()]
    return tuple(found)


def _distance(average: str, module: str | None, rows: Sequence[Row], raw: str) -> Distance:
    difference = math.fsum(row.scaled(average) for row in rows)
    size = math.fsum(row.scaled(raw) for row in rows)
    if not (math.isfinite(difference) and math.isfinite(size)):
        relative = math.nan
    elif size == 0:
        relative = math.inf if difference else 0.0
    else:
        relative = math.sqrt(difference / size)
    return Distance(average, module, relative, sum(row.num_numbers for row in rows), sum(row.num_read for row in rows))


def modules(names: Sequence[str]) -> list[str]:
    """The top-level module of each name; one level deeper, as long as that is the same for all.

    Example:
        >>> modules(["net.stem.weight", "net.head.weight", "net.head.bias"])
        ['net.stem', 'net.head', 'net.head']
    """
    parts = [name.split(".") for name in names]
    depth = 1
    while len({tuple(part[:depth]) for part in parts}) == 1 and all(len(part) > depth + 1 for part in parts):
        depth += 1
    return [".".join(part[:depth]) for part in parts]


def nonfinite(rows: Iterable[Row]) -> tuple[NonFiniteTensor, ...]:
    """The tensors with NaN or infinite values."""
    return tuple(
        NonFiniteTensor(key, row.name, num_nan, num_infinite)
        for row in rows
        for key, (num_nan, num_infinite) in row.nonfinite.items()
        if num_nan or num_infinite
    )
