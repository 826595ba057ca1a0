"""The random bits of a batch of pieces, for the kernel in torch's own operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .pieces import Batch
from .rounding import part_key, random_bits, swap_halves
from .row import Row

_MASK_32 = (1 << 32) - 1


def draw(batch: Batch, rows: Sequence[Row], step: int) -> Tensor:
    """32 random bits for each element of a batch, as int64.

    Places are counted in the memory of the averages, so that their layout decides and not how they were cut.

    Args:
        batch: its second column holds pieces of the first averages of the rows.
        rows: those that it was cut from.
        step: the key of the update.
    """
    places: list[Tensor] = []
    halves: list[Tensor] = []
    for piece, number in zip(batch.columns[1], batch.rows, strict=True):
        row = rows[number]
        here = _offsets(piece).add_(row.first + piece.storage_offset() - row.averages[0].storage_offset())
        parts = here >> 33
        lowest, highest = int(parts.min()), int(parts.max())
        keys = [part_key(step, row.key or 0, part << 32) for part in range(lowest, highest + 1)]
        key = torch.tensor(keys, dtype=torch.int64, device=piece.device)
        halves.append(key.expand(len(here), 2) if len(key) == 1 else key[parts - lowest])
        places.append(here)
    first_halves, second_halves = torch.cat(halves).unbind(1)
    place = torch.cat(places)
    words = random_bits((place >> 1).bitwise_and_(_MASK_32), first_halves, second_halves)
    return torch.where(place & 1 == 1, swap_halves(words), words)


def _offsets(piece: Tensor) -> Tensor:
    """How far each element is from the first, in elements of memory, in the order of the shape."""
    offsets = torch.zeros(1, dtype=torch.int64, device=piece.device)
    for size, stride in zip(piece.shape, piece.stride(), strict=True):
        offsets = (offsets.unsqueeze(-1) + torch.arange(size, device=piece.device) * stride).flatten()
    return offsets
