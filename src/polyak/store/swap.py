"""The average stands in the source for a while: in place, bit-exact both ways, whatever interrupts it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from polyak.kernels import (
    Journal,
    Operation,
    average_inside,
    copy_,
    exchange,
    exchange_halves,
    forget_rest_,
    raw_inside,
)

_Way = Literal["exchange", "halves", "keep"]


class Swap:
    """One swap of an average and its source.

    Pairs of one dtype exchange their values, and a bfloat16 source shares the 32 bits of its average: both need a
    small scratch buffer only. For the others (another device, float16) and for all of them with `aside`, the source's
    values are kept in new memory, and the average stays in the store as it is.
    """

    def __init__(self, pairs: Mapping[str, tuple[Tensor, Tensor]], *, aside: bool) -> None:
        self._pairs = dict(pairs)
        self._ways: dict[str, _Way] = {name: _way(*pair, aside=aside) for name, pair in pairs.items()}
        self._kept = {name: torch.empty_like(pairs[name][0]) for name in self._names("keep")}
        exchanging = exchange(*self._columns(self._names("exchange")))
        enter, leave = exchange_halves(*self._columns(self._names("halves")))
        sources, averages = self._columns(self._names("keep"))
        keep = [partial(copy_, list(self._kept.values()), sources), partial(copy_, sources, averages)]
        self._in = Journal([*keep, *exchanging, *enter])
        self._back: list[Operation] = [partial(copy_, sources, list(self._kept.values())), *exchanging, *leave]
        self._out: Journal | None = None
        self._versions: dict[str, int] = {}
        self._changed: list[str] = []
        self._buffers = frozenset[str]()

    def _names(self, way: _Way) -> list[str]:
        return [name for name, its_way in self._ways.items() if its_way == way]

    def _columns(self, names: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        return [self._pairs[name][0] for name in names], [self._pairs[name][1] for name in names]

    def enter(self, buffers: frozenset[str]) -> None:
        """Puts the average into the source.

        Args:
            buffers: the names of those whose changes inside of the swap belong to the average.
        """
        self._buffers = buffers
        self._in.run()
        # torch counts the changes in place of each tensor; after this point they are the user's.
        self._versions = {
            name: source._version for name, (source, _) in self._pairs.items() if not source.is_inference()
        }

    def leave(self) -> list[str]:
        """Puts the source's own values back; returns the names of parameters that were changed in the source."""
        if not self._in.started:
            return []
        self._in.run()
        if self._out is None:
            changed = [name for name, version in self._versions.items() if self._pairs[name][0]._version != version]
            self._changed = [name for name in changed if name not in self._buffers]
            # What was exchanged goes back to the average by itself.
            written = [name for name in changed if name in self._buffers]
            sources, averages = self._columns([name for name in written if self._ways[name] == "keep"])
            slots = [self._pairs[name][1] for name in written if self._ways[name] == "halves"]
            self._out = Journal(
                [partial(copy_, averages, sources), *[partial(forget_rest_, slot) for slot in slots], *self._back]
            )
        self._out.run()
        return self._changed

    def averages(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the store as they are while this swap lasts, wherever they stand."""
        names = {id(average): name for name, (_, average) in self._pairs.items()}
        return {
            name: self._average(names[id(tensor)]) if id(tensor) in names else tensor for name, tensor in stored.items()
        }

    def raw(self) -> dict[str, Tensor]:
        """The source's own values as they are while this swap lasts, wherever they stand."""
        return {name: self._raw(name) for name in self._pairs}

    def _average(self, name: str) -> Tensor:
        source, average = self._pairs[name]
        if self._ways[name] == "halves":
            return average_inside(source, average)
        return source if self._ways[name] == "exchange" else average

    def _raw(self, name: str) -> Tensor:
        _, average = self._pairs[name]
        if self._ways[name] == "halves":
            return raw_inside(average)
        return average if self._ways[name] == "exchange" else self._kept[name]


def _way(source: Tensor, average: Tensor, *, aside: bool) -> _Way:
    if aside or source.device != average.device:
        return "keep"
    if source.dtype == average.dtype:
        return "exchange"
    return "halves" if (source.dtype, average.dtype) == (torch.bfloat16, torch.float32) else "keep"
