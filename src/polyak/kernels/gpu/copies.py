"""Copies that are left out, like the update, where the step was bad."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from polyak.kernels.pieces import is_dense

from .control import Control
from .launch import here
from .table import BLOCK, strides


class SettledCopies:
    """Copies each source into its target in one launch, unless the last verdict was that the step was bad.

    Args:
        targets: what is written; they must stay where they are.
        sources: such that `can_copy` says so.
    """

    def __init__(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        pairs = list(zip(targets, sources, strict=True))
        assert all(can_copy(target, source) for target, source in pairs)
        self._pairs = pairs  # addresses stay valid as long as these live
        chunks = [chunk for target, source in pairs for chunk in _chunks(target, source)]
        self._sizes = tuple(sorted({size for *_, size in chunks}))
        self._device = targets[0].device if targets else torch.device("cpu")
        self._chunks = torch.tensor(chunks, dtype=torch.int64, device=self._device)
        self._kernels: Any = import_module("polyak.kernels.gpu.skip")

    def run(self, control: Control) -> None:
        """Makes all of them, after `settle`."""
        if len(self._chunks):
            with here(self._device):
                self._kernels.copy_settled[(len(self._chunks),)](
                    self._chunks, control.counts, SIZES=self._sizes, BLOCK=BLOCK
                )


def can_copy(target: Tensor, source: Tensor) -> bool:
    """Whether a copy is one of plain memory."""
    return (
        target.dtype == source.dtype
        and target.device == source.device
        and strides(target) == strides(source)
        and all(is_dense(t) and not t.is_neg() and not t.is_conj() for t in (target, source))
    )


def _chunks(target: Tensor, source: Tensor) -> list[list[int]]:
    size = min(target.element_size(), 8)
    count = target.numel() * target.element_size() // size
    return [
        [source.data_ptr() + start * size, target.data_ptr() + start * size, min(BLOCK, count - start), size]
        for start in range(0, count, BLOCK)
    ]
