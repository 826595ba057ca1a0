"""Whether tensors hold nothing but finite numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyak.kernels import native


def find_non_finite(tensors: Sequence[Tensor]) -> list[int]:
    """The positions of the tensors that hold a NaN or an infinity.

    Reads each tensor once, and waits for each device once a dtype. In torch's own operations a sum is taken, which is
    finite where all of its terms are, unless it overflows, and then a second look decides.

    Example:
        >>> find_non_finite([torch.ones(2), torch.tensor([1.0, float("nan")]), torch.full((2,), 3e38)])
        [1]
    """
    groups: dict[tuple[torch.device, torch.dtype, bool], list[int]] = {}
    for position, tensor in enumerate(tensors):
        in_c = tensor.is_floating_point() and native.is_reachable(tensor)
        groups.setdefault((tensor.device, tensor.dtype, in_c), []).append(position)
    found: list[int] = []
    for (*_, in_c), positions in groups.items():
        group = [tensors[position] for position in positions]
        found += [positions[i] for i in (native.find_non_finite(group) if in_c else _find(group))]
    return sorted(found)


def _find(tensors: Sequence[Tensor]) -> list[int]:
    finite = torch.stack([tensor.sum() for tensor in tensors]).isfinite().cpu()
    suspects = [int(i) for i in finite.logical_not().nonzero()]
    return [i for i in suspects if not bool(tensors[i].isfinite().all())]
