"""Sums of the bits of tensors, to tell later whether anything has changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksums(tensors: Sequence[Tensor]) -> list[int]:
    """The sum, modulo 2 ** 64, of the bits of each tensor read as integers; reads each once, waits for a device once.

    Example:
        >>> checksums([torch.tensor([1, 2]), torch.tensor([0.0, -0.0])])
        [3, -2147483648]
    """
    if not tensors:
        return []
    device = tensors[0].device
    sums = torch.stack([_bits(tensor.detach()).sum(dtype=torch.int64).to(device) for tensor in tensors])
    return [int(total) for total in sums.cpu()]


def _bits(tensor: Tensor) -> Tensor:
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(_INTEGERS[tensor.element_size()])
