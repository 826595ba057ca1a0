"""How tensors lie in memory: which are plain, which share it, which elements are one."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

# Tensor subclasses that only add attributes do not define it; DTensor and its like do.
_PLAIN_DISPATCH: object = vars(Tensor).get("__torch_dispatch__", getattr(Tensor, "__torch_dispatch__", None))


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is a stretch of this process's memory, seen with strides, and nothing more.

    Example:
        >>> is_plain(torch.ones(2)), is_plain(torch.eye(2).to_sparse())
        (True, False)
    """
    return _is_plain(type(tensor)) and tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta


@functools.lru_cache(maxsize=256)
def _is_plain(kind: type) -> bool:
    return getattr(kind, "__torch_dispatch__", None) is _PLAIN_DISPATCH


def is_freed(tensor: Tensor) -> bool:
    """Whether the memory of a plain tensor was given back, as offloading and sharding do, while its shape stays.

    torch itself reads such a tensor all the same, from wherever it points to.
    """
    if not is_plain(tensor) or tensor.numel() == 0:
        return False
    last = tensor.storage_offset() + _reach(tensor)
    return tensor.untyped_storage().nbytes() < (last + 1) * tensor.element_size()


def identity(tensor: Tensor) -> object:
    """Equal for two tensors exactly when they are one: the same memory, seen in the same way.

    Example:
        >>> whole = torch.ones(2, 2)
        >>> identity(whole) == identity(whole.detach()), identity(whole) == identity(whole.t())
        (True, False)
    """
    if not is_plain(tensor) or tensor.numel() == 0:
        return id(tensor)
    view = (tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return (tensor.data_ptr(), tensor.device, *view)


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether one element in memory stands for several of a plain tensor, so that it cannot be written.

    Example:
        >>> overlaps_itself(torch.ones(1).expand(3)), overlaps_itself(torch.ones(1).expand(1))
        (True, False)
    """
    return (
        is_plain(tensor)
        and not tensor.is_contiguous()
        and any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    )


def span(tensor: Tensor) -> tuple[int, int]:
    """The address of the first byte of a plain tensor, and the one after its last."""
    start = tensor.data_ptr()
    return start, start + (_reach(tensor) + 1) * tensor.element_size()


def _reach(tensor: Tensor) -> int:
    """The distance in memory from the first element to the last, in elements."""
    if tensor.is_contiguous():
        return tensor.numel() - 1
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def overlapping(tensors: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """The positions of every two plain tensors of which an element of one lies where an element of the other does.

    Example:
        >>> whole = torch.ones(4, 6)
        >>> list(overlapping([whole[:, :3], whole[:, 3:], whole[2:], torch.ones(2)]))
        [(0, 2), (1, 2)]
    """
    devices: dict[torch.device, int] = {}
    spans = sorted(
        (devices.setdefault(tensor.device, len(devices)), *span(tensor), position)
        for position, tensor in enumerate(tensors)
        if tensor.numel() > 0 and is_plain(tensor)
    )
    if all(one[0] != other[0] or one[2] <= other[1] for one, other in pairwise(spans)):
        return
    # In the order of their beginnings; those that reach beyond the beginning of the next are still open.
    opened: list[tuple[int, int, int]] = []
    found: list[tuple[int, int]] = []
    for device, start, end, position in spans:
        opened = [each for each in opened if each[0] == device and each[1] > start]
        found += [
            (min(position, other), max(position, other))
            for _, _, other in opened
            if share_memory(tensors[position], tensors[other])
        ]
        opened.append((device, end, position))
    yield from sorted(found)


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether an element of one plain tensor lies where an element of the other does, given that their spans meet.

    Example:
        >>> whole = torch.ones(4, 6)
        >>> share_memory(whole[:, :3], whole[:, 3:]), share_memory(whole, whole[2:])
        (False, True)
    """
    if one.element_size() != other.element_size():
        return True
    return bool(torch.isin(_addresses(one), _addresses(other)).any())


def _addresses(tensor: Tensor) -> Tensor:
    addresses = torch.tensor(tensor.data_ptr())
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        addresses = addresses.unsqueeze(-1) + torch.arange(size) * (stride * tensor.element_size())
    return addresses.flatten()
