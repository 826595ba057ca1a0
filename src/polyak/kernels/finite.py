"""Whether tensors hold nothing but finite numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from . import native


class FiniteTest:
    """Finds infinities and NaNs in tensors, planned once and made many times.

    Reads each tensor once, and waits for each device once a dtype. In torch's own operations a sum is taken, which is
    finite where all of its terms are, unless it overflows, and then a second look decides.

    Args:
        tensors: floating-point or complex; they must stay where they are.

    Example:
        >>> FiniteTest([torch.ones(2), torch.tensor([1.0, float("nan")]), torch.full((2,), 3e38)]).find()
        [1]
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        groups: dict[tuple[torch.device, torch.dtype, bool], list[int]] = {}
        usable = native.is_usable()
        for position, tensor in enumerate(tensors):
            in_c = usable and tensor.is_floating_point() and native.is_reachable(tensor)
            groups.setdefault((tensor.device, tensor.dtype, in_c), []).append(position)
        self._groups: list[tuple[list[int], Callable[[], list[int]]]] = []
        for (*_, in_c), positions in groups.items():
            group = [tensors[position] for position in positions]
            self._groups.append((positions, native.non_finite(group) if in_c else partial(_find, group)))

    def find(self) -> list[int]:
        """The positions of the tensors that hold a NaN or an infinity."""
        return sorted(positions[i] for positions, find in self._groups for i in find())


def _find(tensors: Sequence[Tensor]) -> list[int]:
    finite = torch.stack([tensor.sum() for tensor in tensors]).isfinite().cpu()
    suspects = [int(i) for i in finite.logical_not().nonzero()]
    return [i for i in suspects if not bool(tensors[i].isfinite().all())]
