"""Sums of the bits of tensors, to tell later whether anything has changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from polyak.kernels import native
from polyak.kernels.pieces import PART_ELEMENTS, parts_of

_DEVICE_ELEMENTS = 1 << 26
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksums(tensors: Sequence[Tensor]) -> list[int]:
    """The sum, modulo 2 ** 64, of the bits of each tensor read as integers; reads each once, waits for a device once.

    Example:
        >>> checksums([torch.tensor([1, 2]), torch.tensor([0.0, -0.0])])
        [3, -2147483648]
    """
    groups: dict[int, list[int]] = {}
    for position, tensor in enumerate(tensors):
        in_c = tensor.element_size() in (2, 4, 8) and not tensor.is_complex() and native.is_reachable(tensor)
        groups.setdefault(tensor.element_size() if in_c else 0, []).append(position)
    sums = [0] * len(tensors)
    for size, positions in groups.items():
        group = [tensors[position] for position in positions]
        for position, found in zip(positions, native.sums(group) if size else _checksums(group), strict=True):
            sums[position] = found
    return sums


def _checksums(tensors: Sequence[Tensor]) -> list[int]:
    device = tensors[0].device
    sums = torch.stack([_checksum(tensor.detach()).to(device) for tensor in tensors])
    return cast("Any", sums).tolist()  # nested lists have no type that a checker could know


def _checksum(tensor: Tensor) -> Tensor:
    # On a CPU a sum in another dtype first makes a copy in that dtype, so it is taken in small parts. A GPU makes no
    # copy, and each part takes launches.
    most = PART_ELEMENTS if tensor.device.type == "cpu" else _DEVICE_ELEMENTS
    first, *others = (_bits(part).sum(dtype=torch.int64) for part in parts_of(tensor, most=most))
    return torch.stack([first, *others]).sum() if others else first


def _bits(tensor: Tensor) -> Tensor:
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(_INTEGERS[tensor.element_size()])
