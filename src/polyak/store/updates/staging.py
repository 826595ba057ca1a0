"""How tensors lie one after another in a few buffers of bytes, for copies that are few and large."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# What the widest vectors of a CPU like, and a multiple of the size of every dtype.
_ALIGNMENT = 64
# torch rounds pinned buffers up to a power of two: many of this size, and the last, waste little.
_BUFFER_BYTES = 1 << 28


@dataclass(frozen=True)
class Buffer:
    """What is in one buffer.

    Attributes:
        offsets: the first byte of each tensor, by name.
        num_bytes: of all of them, with the gaps between.
    """

    offsets: dict[str, int]
    num_bytes: int

    def views(self, flat: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parts of a flat tensor of bytes as tensors by name, in dtypes, shapes and layouts of the given ones."""
        return {name: _view(flat, offset, tensors[name]) for name, offset in self.offsets.items()}


def pack(tensors: Mapping[str, Tensor], limit: int = _BUFFER_BYTES) -> list[Buffer]:
    """Distributes tensors over buffers, in their order; one that is larger than the limit has a buffer of its own.

    Example:
        >>> tensors = {"a": torch.ones(3), "b": torch.ones(2, 20), "c": torch.ones(300)}
        >>> pack(tensors, limit=256)
        [Buffer(offsets={'a': 0, 'b': 64}, num_bytes=256), Buffer(offsets={'c': 0}, num_bytes=1216)]
    """
    buffers: list[Buffer] = []
    offsets: dict[str, int] = {}
    end = 0
    for name, tensor in tensors.items():
        size = -(-num_bytes(tensor) // _ALIGNMENT) * _ALIGNMENT
        if offsets and end + size > limit:
            buffers.append(Buffer(offsets, end))
            offsets, end = {}, 0
        offsets[name] = end
        end += size
    return [*buffers, Buffer(offsets, end)] if offsets else buffers


def num_bytes(tensor: Tensor) -> int:
    """What the elements of a tensor take."""
    return tensor.numel() * tensor.element_size()


def _view(flat: Tensor, offset: int, like: Tensor) -> Tensor:
    # Without gaps, in the order of dimensions that the average of such a tensor has.
    layout = torch.empty_like(like, device="meta")
    stretch = flat[offset : offset + num_bytes(layout)]
    return stretch.view(like.dtype).as_strided(layout.shape, layout.stride())
