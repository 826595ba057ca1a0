"""Whether tensors hold nothing but finite numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def find_non_finite(tensors: Sequence[Tensor]) -> list[int]:
    """The positions of the tensors that hold a NaN or an infinity.

    Reads each tensor once, and waits for each device once a dtype: a sum is finite where all of its terms are, unless
    it overflows, and then a second look decides.

    Example:
        >>> find_non_finite([torch.ones(2), torch.tensor([1.0, float("nan")]), torch.full((2,), 3e38)])
        [1]
    """
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for position, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(position)
    suspects: list[int] = []
    for positions in groups.values():
        finite = torch.stack([tensors[position].sum() for position in positions]).isfinite().cpu()
        suspects += [positions[int(i)] for i in finite.logical_not().nonzero()]
    return sorted(position for position in suspects if not bool(tensors[position].isfinite().all()))
