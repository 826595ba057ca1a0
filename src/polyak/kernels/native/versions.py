"""Counts changes that torch does not see, so that a graph which needs a tensor as it was raises."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from .trial import tried_way, why_not_in_c


class Versions:
    """Counts changes of the same tensors again and again; for many of them ten times as fast as torch does.

    Args:
        tensors: what is changed. Inference tensors have no count, and are left out.

    Example:
        >>> tensor = torch.zeros(2)
        >>> Versions([tensor]).count_change()
        >>> tensor._version
        1
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = [tensor for tensor in tensors if not tensor.is_inference()]
        self._addresses = array("Q", map(id, self._tensors))
        self._way = None if why_not_in_c() else tried_way()

    def count_change(self) -> None:
        """Counts one change of each."""
        way = self._way
        if way is None or way.count_changes is None:
            torch.autograd.graph.increment_version(self._tensors)
        else:
            address, num_tensors = self._addresses.buffer_info()
            way.count_changes(ctypes.addressof(way.api), address, num_tensors)
