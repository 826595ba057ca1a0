"""Whether tensors hold nothing but finite numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def find_non_finite(tensors: Sequence[Tensor]) -> list[int]:
    """The positions of the tensors that hold a NaN or an infinity.

    Reads each tensor once, and waits for the device once: a sum is finite where all of its terms are, unless it
    overflows, and then a second look decides.

    Example:
        >>> find_non_finite([torch.ones(2), torch.tensor([1.0, float("nan")]), torch.full((2,), 3e38)])
        [1]
    """
    if not tensors:
        return []
    device = tensors[0].device
    sums = torch.stack([tensor.sum().abs().to(device, torch.float64) for tensor in tensors])
    suspects = [position for position, is_finite in enumerate(sums.isfinite().cpu()) if not bool(is_finite)]
    return [position for position in suspects if not bool(tensors[position].isfinite().all())]
