"""A check in C that dictionaries still hold the same objects, and tensors the same memory, dtypes and layouts.

It relies on Python's stable ABI, on torch's C shim, and on one fact that neither promises: the offset of the C++ tensor
in a tensor's Python object. The offset is found before the first check and then tested: tensors are changed in every
way that matters, and each change must be detected. If one is not, `can_look` is False.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor

from polyak.kernels.choice import allowed_kernels
from polyak.kernels.native.compiled import library
from polyak.kernels.native.crew import CREW, ELEMENTS_PER_THREAD

_POINTER, _COUNT = ctypes.c_void_p, ctypes.c_int64
_PYTHON = ("PyDict_Size", "PyDict_Next", "PyObject_GetAttr", "Py_DecRef", "PyErr_Clear")
_TORCH = ("data_ptr", "dim", "sizes", "strides", "dtype")
# Entries of a dictionary that one thread takes at once; and what an entry costs, in elements of an update.
_STRETCH = 64
_ELEMENTS_PER_ENTRY = 64
# Kept alive here, because C is given its address.
_LOCAL_TENSOR = sys.intern("_local_tensor")


# The fields are those of the structures in look.c.
class _Api(ctypes.Structure):
    _fields_ = (*((name, _POINTER) for name in (*_PYTHON, *_TORCH)), ("offset", _COUNT), ("local_tensor", _POINTER))


class _Holder(ctypes.Structure):
    _fields_ = (
        ("dictionary", _POINTER), ("size", _COUNT), ("count", _COUNT), ("first", _COUNT), ("position", _COUNT),
        ("entries", _POINTER),
    )  # fmt: skip


class _Seen(ctypes.Structure):
    _fields_ = (
        ("key", _POINTER), ("object", _POINTER), ("plain", _POINTER), ("place", ctypes.c_uint64),
        ("layout", ctypes.c_uint64), ("implementation", _POINTER), ("storage", _POINTER),
    )  # fmt: skip


class _Look(ctypes.Structure):
    _fields_ = (
        ("api", _POINTER), ("holders", _POINTER), ("num_holders", _COUNT), ("seen", _POINTER), ("num_seen", _COUNT),
        ("num_threads", _COUNT), ("nanoseconds", _COUNT),
    )  # fmt: skip


@dataclass(frozen=True)
class _Way:
    """The functions of Python and torch that C calls, and the C functions that prepare a look and make it."""

    api: _Api
    begin: Callable[[int], int]
    look: Callable[[int], int]


class Look:
    """What dictionaries hold now, to tell later whether it is still the same.

    Args:
        holders: the dictionaries.
        plain: for each tensor in them whose memory matters, by its `id`: the tensor itself, or the local part of a
            DTensor.
        way: how to look; default: the one that `can_look` has found to work.

    Raises:
        ValueError: torch cannot tell the address of a tensor.
    """

    def __init__(
        self, holders: Sequence[dict[str, Any]], plain: Mapping[int, Tensor], *, way: _Way | None = None
    ) -> None:
        way = way or _tried_way()
        assert way is not None
        items = list(chain.from_iterable(map(dict[str, Any].items, holders)))
        rows = list(_rows(holders))
        # Addresses stay valid as long as these live.
        self._held: list[object] = [holders, items, list(plain.values()), way]
        self._holders = (_Holder * len(rows))(*rows)
        self._seen = (_Seen * len(items))(*(_seen(key, value, plain.get(id(value))) for key, value in items))
        self._look = _Look(
            ctypes.addressof(way.api),
            ctypes.addressof(self._holders), len(rows), ctypes.addressof(self._seen), len(items), 1,
        )  # fmt: skip
        self._address = ctypes.addressof(self._look)
        self._call = way.look
        # Only the thread that has Python's lock may read attributes, so models with DTensors get one thread.
        is_plain = all(id(tensor) == whole for whole, tensor in plain.items())
        self._num_elements = _ELEMENTS_PER_ENTRY * len(items) if is_plain else 0
        if way.begin(self._address) != -1:
            raise ValueError("torch cannot tell the address of a tensor")

    def is_same(self) -> bool:
        """Whether all keys, objects, addresses, dtypes, shapes and strides are the same."""
        if self._num_elements < ELEMENTS_PER_THREAD:
            return self._call(self._address) == 1
        threads = self._look.num_threads = CREW.size(self._num_elements)
        same = self._call(self._address) == 1
        if threads > 1:
            CREW.took(self._look.nanoseconds, self._num_elements)
        return same


def _rows(holders: Iterable[dict[str, Any]]) -> Iterator[tuple[int, ...]]:
    """Each dictionary, in stretches that threads can share."""
    first = 0
    for holder in holders:
        # The fifth word of a dictionary is where it keeps its entries. Only prefetched: a wrong guess is harmless.
        entries = _words(holder, 5)[4]
        for start in range(0, max(len(holder), 1), _STRETCH):
            count = min(len(holder) - start, _STRETCH)
            yield id(holder), len(holder), count, first, 0, entries
            first += count


def _seen(key: str, value: object, plain: Tensor | None) -> tuple[int, ...]:
    if plain is None:
        return id(key), id(value)
    return id(key), id(value), id(plain), 0, 0, plain._cdata, plain.untyped_storage()._cdata


def _words(value: object, count: int) -> list[int]:
    return list((ctypes.c_uint64 * count).from_address(id(value)))


def can_look() -> bool:
    """Whether `Look` can be used with this Python and this torch, and the C kernel is allowed."""
    return "native" in allowed_kernels() and _tried_way() is not None


@functools.cache
def _tried_way() -> _Way | None:
    """The way to look; None if this Python or torch does not allow it, or if a trial change is not detected."""
    compiled = library()
    has_lock = sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()
    if compiled is None or not has_lock or ctypes.sizeof(_POINTER) != 8:
        return None
    try:
        way = _find_way(compiled)
        return way if all(_sees(change, way) for change in _CHANGES) else None
    except (AttributeError, OSError, ValueError):
        return None


def _find_way(compiled: ctypes.CDLL) -> _Way:
    shim = ctypes.CDLL(torch._C.__file__)
    functions = [getattr(ctypes.pythonapi, name) for name in _PYTHON]
    functions += [getattr(shim, f"aoti_torch_get_{name}") for name in _TORCH]
    api = _Api(
        *(ctypes.cast(function, _POINTER).value for function in functions),
        _offset(torch.zeros(2, device="cpu")),
        id(_LOCAL_TENSOR),
    )
    # Python's lock is kept while these run.
    with_lock = ctypes.PyDLL(compiled._name)
    begin, look = with_lock.polyak_begin_look, with_lock.polyak_look
    begin.argtypes, begin.restype = (_POINTER,), _COUNT
    look.argtypes, look.restype = (_POINTER,), ctypes.c_int
    return _Way(api, begin, look)


def _offset(tensor: Tensor) -> int:
    """The offset in bytes of the C++ tensor, a pointer whose value is `_cdata`, in a tensor's Python object."""
    return 8 * _words(tensor, type(tensor).__basicsize__ // 8).index(tensor._cdata)


# torch's stubs know too little of what is called here.
_Change = Callable[[dict[str, Any], Any, Any], object]


def _sees(change: _Change, way: _Way) -> bool:
    with torch.inference_mode(False), torch.no_grad():
        one, other = (torch.zeros(2, 3, device="cpu") for _ in range(2))
        holder: dict[str, Any] = {"one": one, "two": None}
        look = Look([holder], {id(one): one}, way=way)
        if look._seen[0].place != one.data_ptr() or not look.is_same():
            return False
        change(holder, one, other)
        return not look.is_same()


def _replace_data(_: dict[str, Any], tensor: Tensor, other: Tensor) -> None:
    tensor.data = other.data


def _transpose(_: dict[str, Any], tensor: Tensor, __: Tensor) -> None:
    tensor.data = tensor.data.t()


def _cast(_: dict[str, Any], tensor: Tensor, __: Tensor) -> None:
    tensor.data = tensor.data.view(torch.int32)


def _rename(holder: dict[str, Any], tensor: Tensor, _: Tensor) -> None:
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
