"""Copies from one list of tensors to another, planned once and made many times."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import native
from .pieces import copy_


class Copies:
    """Copies each source into its target, whatever their dtypes, devices and layouts.

    Args:
        targets: what is written; it must not be replaced.
        sources: of the same shapes.
    """

    def __init__(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        self._targets: list[Tensor] = []
        self._sources: list[Tensor] = []
        in_c: list[tuple[Tensor, Tensor]] = []
        usable = native.is_usable()
        for target, source in zip(targets, sources, strict=True):
            if usable and target.dtype == source.dtype and native.is_reachable(target, source):
                in_c.append((target, source))
            else:
                self._targets.append(target)
                self._sources.append(source)
        self._in_c: Callable[[], None] | None = native.copy(in_c) if in_c else None

    def run(self) -> None:
        """Makes all of them."""
        if self._in_c is not None:
            self._in_c()
        if self._targets:
            with torch.no_grad():
                copy_(self._targets, self._sources)
