"""The average stands in the source for a while: in place, bit-exact both ways, whatever interrupts it.

Each pair of tensors goes one of three ways, chosen when the swap is made, which also takes all memory that it needs.
The operations of all pairs are two journals, in and out, of which each runs to its end however often it is interrupted.
Out begins by asking which parameters were changed inside, by sums of bits that were taken at the end of in; it can only
undo what in has finished, so that it finishes that first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from polyak.kernels import (
    Checksums,
    Journal,
    Versions,
    average_inside,
    copy_,
    exchange,
    exchange_halves,
    raw_inside,
    take_no_memory,
)

_Way = Literal["exchange", "halves", "keep"]


class Swap:
    """One swap of an average and its source.

    Pairs of one dtype exchange their values, and a bfloat16 source shares the 32 bits of its average: both need a
    small scratch buffer only. For the others (another device, float16, buffers of another dtype) and for all of them
    with `aside`, the source's values are kept in `room` or new memory, and the average stays in the store as it is.

    Attributes:
        is_light: whether keeping it for the next swap costs no memory.

    Args:
        pairs: source and average by name.
        buffers: the names of those that are no parameters: what is written to them inside belongs to the average.
        aside: leave the averages where they are.
        room: memory, in the sources' shapes and dtypes, that may be written as long as the swap lasts, by name.
        wholes: by name, all of each source of which only this rank's share is exchanged; so the raw weights are kept
            among the ranks as well.
        gathering: the operations by which the shares of all ranks become whole again, whenever they are asked for.
    """

    def __init__(
        self,
        pairs: Mapping[str, tuple[Tensor, Tensor]],
        *,
        buffers: frozenset[str],
        aside: bool,
        room: Mapping[str, Tensor],
        wholes: Mapping[str, Tensor],
        gathering: Callable[[Mapping[str, Tensor]], list[Callable[[], None]]],
    ) -> None:
        self._pairs = dict(pairs)
        self._wholes = wholes
        self._ways: dict[str, _Way] = {
            name: _way(*pair, is_buffer=name in buffers, aside=aside) for name, pair in pairs.items()
        }
        self._buffers = buffers
        self._kept = {
            name: room[name] if name in room else torch.empty_like(pairs[name][0]) for name in self._names("keep")
        }
        enter, leave = exchange_halves(*self._columns(self._names("halves")))
        sources, averages = self._columns(self._names("keep"))
        keep = [partial(copy_, list(self._kept.values()), sources), partial(copy_, sources, averages)]
        gather, gather_back = gathering(wholes), gathering(wholes)
        there, back = exchange(*self._columns(self._names("exchange")))
        self._in = Journal([*keep, *there, *enter, *gather])
        restore = partial(copy_, sources, list(self._kept.values()))
        self._out = Journal([self._look, self._keep_buffers, restore, *back, *leave, *gather_back])
        parameters = self._parameters()
        self._parameter_names = list(parameters)
        # Bits are summed because torch's own count of changes misses fused optimizers and writes to `.data`.
        self._checksums = Checksums(list(parameters.values()))
        # The sum of each parameter's bits, as the average put them there.
        self._sums: list[int] | None = None
        self._changed: list[str] = []
        self._versions = Versions([tensor for pair in pairs.values() for tensor in pair])
        self.is_light = not gather and self._kept.keys() <= room.keys() and take_no_memory([*there, *enter])

    def _names(self, way: _Way) -> list[str]:
        return [name for name, its_way in self._ways.items() if its_way == way]

    def _columns(self, names: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        return [self._pairs[name][0] for name in names], [self._pairs[name][1] for name in names]

    def _parameters(self) -> dict[str, Tensor]:
        sources = {name: source for name, (source, _) in self._pairs.items()} | dict(self._wholes)
        return {name: source for name, source in sources.items() if name not in self._buffers}

    def begin_again(self) -> None:
        """Allows another swap of the same pairs, after this one was left."""
        self._in.begin_again()
        self._out.begin_again()
        self._sums, self._changed = None, []

    def enter(self) -> None:
        """Puts the average into the source."""
        self._in.run()
        self._note_changes()
        self._sums = self._checksums.find()

    def leave(self) -> list[str]:
        """Puts the source's own values back; returns the names of parameters that were changed in the source."""
        if self._in.started:
            self._in.run()
            self._out.run()
            self._note_changes()
        return self._changed

    def _note_changes(self) -> None:
        """So that a graph which needs a tensor as it was raises, whichever kernel wrote to it."""
        self._versions.count_change()

    def _look(self) -> None:
        if self._sums is not None:
            sums = self._checksums.find()
            self._changed = [name for name, a, b in zip(self._parameter_names, self._sums, sums, strict=True) if a != b]

    def _keep_buffers(self) -> None:
        """Takes what was written to buffers into averages that stayed in the store; exchanged ones need no help."""
        for name in self._kept.keys() & self._buffers:
            source, average = self._pairs[name]
            if not torch.equal(source, average.to(source.device, source.dtype)):
                average.copy_(source)

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


def _way(source: Tensor, average: Tensor, *, is_buffer: bool, aside: bool) -> _Way:
    if aside or source.device != average.device:
        return "keep"
    if source.dtype == average.dtype:
        return "exchange"
    # What is written to a buffer inside must come out exactly, and the shared bits hold a rest of the old value.
    halves = (source.dtype, average.dtype) == (torch.bfloat16, torch.float32) and not is_buffer
    return "halves" if halves else "keep"
