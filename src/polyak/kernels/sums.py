"""What one pass over tensors finds: numbers that are not finite; and sums of bits, to tell later what has changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from . import native
from .pieces import PIECE_ELEMENTS, pieces_of

_DEVICE_ELEMENTS = 1 << 26
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
            self._groups.append((positions, native.non_finite(group) if in_c else partial(_find_bad, group)))

    def find(self) -> list[int]:
        """The positions of the tensors that hold a NaN or an infinity."""
        return sorted(positions[i] for positions, find in self._groups for i in find())


def _find_bad(tensors: Sequence[Tensor]) -> list[int]:
    finite = torch.stack([tensor.sum() for tensor in tensors]).isfinite().cpu()
    suspects = [int(i) for i in finite.logical_not().nonzero()]
    return [i for i in suspects if not bool(tensors[i].isfinite().all())]


class Checksums:
    """The sums of the bits of tensors, planned once and taken many times.

    Args:
        tensors: their addresses must not change.

    Example:
        >>> tensor = torch.tensor([1, 2])
        >>> sums = Checksums([tensor])
        >>> first = sums.find()
        >>> tensor.add_(1).sum().item() - first[0]
        2
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._num_tensors = len(tensors)
        groups: dict[int, list[int]] = {}
        usable = native.is_usable()
        for position, tensor in enumerate(tensors):
            size = tensor.element_size()
            in_c = usable and size in (2, 4, 8) and not tensor.is_complex() and native.is_reachable(tensor)
            groups.setdefault(size if in_c else 0, []).append(position)
        self._groups: list[tuple[list[int], Callable[[], list[int]]]] = []
        for size, positions in groups.items():
            group = [tensors[position] for position in positions]
            self._groups.append((positions, native.sums(group) if size else partial(_checksums, group)))

    def find(self) -> list[int]:
        """The sum of each tensor, modulo 2 ** 64; reads each once, and waits for a device once."""
        sums = [0] * self._num_tensors
        for positions, find in self._groups:
            for position, found in zip(positions, find(), strict=True):
                sums[position] = found
        return sums


def checksums(tensors: Sequence[Tensor]) -> list[int]:
    """The sum, modulo 2 ** 64, of the bits of each tensor read as integers.

    Example:
        >>> checksums([torch.tensor([1, 2]), torch.tensor([0.0, -0.0])])
        [3, -2147483648]
    """
    return Checksums(tensors).find()


def _checksums(tensors: Sequence[Tensor]) -> list[int]:
    device = tensors[0].device
    sums = torch.stack([_checksum(tensor.detach()).to(device) for tensor in tensors])
    return cast("Any", sums).tolist()  # nested lists have no type that a checker could know


def _checksum(tensor: Tensor) -> Tensor:
    # On a CPU a sum in another dtype first makes a copy in that dtype, so it is taken in small pieces. A GPU makes no
    # copy, but each piece costs launches.
    most = PIECE_ELEMENTS if tensor.device.type == "cpu" else _DEVICE_ELEMENTS
    first, *others = (_bits(piece).sum(dtype=torch.int64) for piece in pieces_of(tensor, most=most))
    return torch.stack([first, *others]).sum() if others else first


def _bits(tensor: Tensor) -> Tensor:
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(_INTEGERS[tensor.element_size()])
