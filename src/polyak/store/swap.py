"""The average stands in the source for a while: in place, bit-exact both ways, whatever interrupts it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyak.kernels import Journal, exchange_copies


class Swap:
    """One swap of an average and its source.

    Pairs of the same dtype and device exchange their values through a small scratch buffer. For the others (and for
    all of them with `aside`) the source's values are kept in new memory, and the average stays in the store.
    """

    def __init__(self, pairs: Mapping[str, tuple[Tensor, Tensor]], *, aside: bool) -> None:
        self._pairs = dict(pairs)
        self._kept: dict[str, Tensor] = {
            name: torch.empty_like(source)
            for name, (source, average) in pairs.items()
            if aside or _differ(source, average)
        }
        exchanged = [pair for name, pair in pairs.items() if name not in self._kept]
        sources = [pairs[name][0] for name in self._kept]
        self._exchange = exchange_copies([source for source, _ in exchanged], [average for _, average in exchanged])
        self._in = Journal(
            [
                (list(self._kept.values()), sources),
                (sources, [pairs[name][1] for name in self._kept]),
                *self._exchange,
            ]
        )
        self._out: Journal | None = None
        self._versions: dict[str, int] = {}
        self._changed: list[str] = []
        self._buffers = frozenset[str]()

    def enter(self, buffers: frozenset[str]) -> None:
        """Puts the average into the source."""
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
            buffers = [self._pairs[name] for name in changed if name in self._buffers and name in self._kept]
            self._out = Journal(
                [
                    ([average for _, average in buffers], [source for source, _ in buffers]),
                    ([self._pairs[name][0] for name in self._kept], list(self._kept.values())),
                    *self._exchange,
                ]
            )
        self._out.run()
        return self._changed

    def averages(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Where tensors of the store are while this swap lasts."""
        exchanged = {id(average): source for name, (source, average) in self._pairs.items() if name not in self._kept}
        return {name: exchanged.get(id(tensor), tensor) for name, tensor in stored.items()}

    def raw(self) -> dict[str, Tensor]:
        """Where the source's own values are while this swap lasts."""
        return {name: self._kept.get(name, average) for name, (_, average) in self._pairs.items()}


def _differ(source: Tensor, average: Tensor) -> bool:
    return source.dtype != average.dtype or source.device != average.device
