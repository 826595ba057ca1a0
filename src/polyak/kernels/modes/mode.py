"""`Mode`: what each mode must define."""

from __future__ import annotations

import abc
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor


class Sources(NamedTuple):
    """The sources of a batch, in the dtype in which the mode computes.

    Attributes:
        pieces: of the scratch buffer, in the shapes of the averages.
        flat: the same numbers, one after another.
        words: 32 random bits for each, as int64, if the mode draws.
    """

    pieces: list[Tensor]
    flat: Tensor
    words: Tensor | None = None


class Mode(abc.ABC):
    """How averages are moved and rounded.

    A new mode is a file here, functions in `native/update.c`, and one in `gpu/update.py`.

    Attributes:
        name: as plans print it. The C functions are called `{name}_{source}_{average}`.
        in_c: the dtypes of averages for which there are functions in C.
        in_triton: those that the kernel in Triton knows.
        draws: whether an average depends on random bits, and so on the place of each element in its tensor.
    """

    name: ClassVar[str]
    in_c: ClassVar[tuple[torch.dtype, ...]]
    in_triton: ClassVar[tuple[torch.dtype, ...]]
    draws: ClassVar[bool] = False

    @abc.abstractmethod
    def takes(self, dtype: torch.dtype) -> bool:
        """Whether averages of this dtype can be kept in this mode."""

    def beside(self, average: Tensor) -> Tensor | None:
        """Memory for what is kept beside an average, zero at first; None if there is nothing."""
        del average
        return None

    def key(self, name: str) -> int:
        """64 bits that make the random bits of a tensor its own; 0 for modes that draw none."""
        del name
        return 0

    def configuration(self, *, seed: int) -> dict[str, Any]:
        """What a state says of the mode, so that no other mode continues from it."""
        del seed
        return {}

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the arithmetic, for averages of a dtype."""
        return dtype

    @abc.abstractmethod
    def move(self, averages: list[Tensor], beside: list[Tensor], sources: Sources, *, weight: float) -> None:
        """Moves averages towards their sources, in place, in torch's own operations: the definition of the mode.

        Args:
            averages: real, in pieces that correspond to those of the sources.
            beside: what is kept beside each.
            sources: those of a batch.
            weight: not 0. 1 copies, whatever the averages hold.
        """

    def __repr__(self) -> str:
        return self.name
