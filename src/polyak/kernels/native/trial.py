"""Tests the way in which C asks Python and torch before it is used: every change must be detected.

Also counts changes of many tensors.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _python_dispatch

from polyak.kernels.choice import allowed_kernels

from .look import Look
from .way import Way, find_way
from .work import library

# torch's stubs know too little of what is called here.
_Change = Callable[[dict[str, Any], Any, Any], object]


def why_not_in_c() -> str:
    """Why C may not or cannot ask Python and torch about tensors; empty if it can.

    Raises:
        ValueError: POLYAK_WATCH has an unknown value.
    """
    asked = os.environ.get("POLYAK_WATCH", "")
    if asked not in ("", "python"):
        raise ValueError(f"POLYAK_WATCH={asked!r}: it is 'python', or not set")
    if asked:
        return "POLYAK_WATCH=python asks for it"
    if "native" not in allowed_kernels():
        return "POLYAK_KERNELS leaves out native"
    return "" if tried_way() else "there is no C library, or it cannot ask this Python and torch"


@functools.cache
def tried_way() -> Way | None:
    """The way to look; None if this Python or torch does not allow it, or if a trial change is not detected."""
    compiled = library()
    has_lock = sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()
    if compiled is None or not has_lock or ctypes.sizeof(ctypes.c_void_p) != 8:
        return None
    try:
        # Modes of the caller must not see the trial: one that keeps tensors would make it fail.
        with _python_dispatch._disable_current_modes(), torch.inference_mode(False), torch.no_grad():
            way = find_way(compiled)
            if not all(_sees(change, way) for change in _CHANGES):
                return None
            return way if _counts(way) else replace(way, count_changes=None)
    except (AttributeError, OSError, RuntimeError, ValueError):
        return None


def _sees(change: _Change, way: Way) -> bool:
    one, other = (torch.zeros(2, 3, device="cpu") for _ in range(2))
    holder: dict[str, Any] = {"one": one, "two": None}
    look = Look([holder], {id(one): one}, way)
    if look._seen[0].place != one.data_ptr() or not look.is_same():
        return False
    change(holder, one, other)
    return not look.is_same()


def _counts(way: Way) -> bool:
    if way.count_changes is None:
        return False
    tensor = torch.zeros(2, 3, device="cpu")
    same, before = tensor.detach(), tensor._version
    address = ctypes.c_uint64(id(tensor))
    way.count_changes(ctypes.addressof(way.api), ctypes.addressof(address), 1)
    return tensor._version == same._version == before + 1


def _replace_data(_: dict[str, Any], tensor: Any, other: Any) -> None:
    tensor.data = other.data


def _transpose(_: dict[str, Any], tensor: Any, __: Any) -> None:
    tensor.data = tensor.data.t()


def _cast(_: dict[str, Any], tensor: Any, __: Any) -> None:
    tensor.data = tensor.data.view(torch.int32)


def _rename(holder: dict[str, Any], tensor: Any, _: Any) -> None:
    holder.clear()
    holder.update(other=tensor, two=None)


# Each replaces the memory, layout, dtype or C++ object of a tensor, or changes a dictionary.
_CHANGES: tuple[_Change, ...] = (
    _replace_data,
    _transpose,
    _cast,
    _rename,
    lambda _, tensor, other: tensor.set_(other.data),
    lambda _, tensor, other: cast("Any", torch.utils).swap_tensors(tensor, other),
    lambda _, tensor, other: tensor.untyped_storage().resize_(0),
    lambda holder, _, other: holder.update(one=other),
    lambda holder, _, other: holder.update(two=other),
    lambda holder, _, other: holder.update(three=None),
    lambda holder, _, other: holder.pop("two"),
)


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
