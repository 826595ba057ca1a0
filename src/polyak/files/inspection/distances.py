"""Distances of averages by part of the model, from what was summed over their tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from .account import Distance, NonFiniteTensor
from .comparing import Row


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
    """The tensors with numbers that are none."""
    return tuple(
        NonFiniteTensor(key, row.name, num_nan, num_infinite)
        for row in rows
        for key, (num_nan, num_infinite) in row.nonfinite.items()
        if num_nan or num_infinite
    )
