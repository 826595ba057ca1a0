"""How C asks Python and torch about dictionaries and tensors.

It relies on Python's stable ABI, on torch's C shim, and on facts that neither promises: the offsets of the type and of
the C++ tensor in a tensor's Python object, and the name of the C++ function that counts changes. They are found when
they are first needed, and `trial` tests them before anything relies on them.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

POINTER, COUNT = ctypes.c_void_p, ctypes.c_int64
_PYTHON = ("PyDict_Size", "PyDict_Next", "PyObject_GetAttr", "Py_DecRef", "PyErr_Clear")
_TORCH = ("data_ptr", "dim", "sizes", "strides", "dtype")
_BUMP_VERSION = "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE"  # torch::autograd::impl::bump_version(tensor)
# Kept alive here, because C is given its address.
_LOCAL_TENSOR = sys.intern("_local_tensor")


class Api(ctypes.Structure):
    """The structure of this name in look.c."""

    _fields_ = (
        *((name, POINTER) for name in (*_PYTHON, *_TORCH, "bump_version")),
        ("offset", COUNT), ("local_tensor", POINTER),
    )  # fmt: skip


@dataclass(frozen=True)
class Way:
    """The functions of Python and torch that C calls, and the functions in C.

    Attributes:
        api: what C calls.
        begin: prepares a look.
        look: makes it.
        count_changes: counts changes of tensors; None if torch lacks the function.
    """

    api: Api
    begin: Callable[[int], int]
    look: Callable[[int], int]
    count_changes: Callable[[int, int, int], None] | None


def find_way(compiled: ctypes.CDLL) -> Way:
    """The way with this library.

    Raises:
        AttributeError: Python or torch lacks a function.
        ValueError: an offset is not found.
    """
    shim = ctypes.CDLL(torch._C.__file__)
    functions = [getattr(ctypes.pythonapi, name) for name in _PYTHON]
    functions += [getattr(shim, f"aoti_torch_get_{name}") for name in _TORCH]
    bump_version = getattr(shim, _BUMP_VERSION, None)
    tensor = torch.zeros(2, device="cpu")
    if words(tensor, 2)[1] != id(type(tensor)):
        raise ValueError("the type of an object is not its second word")
    api = Api(
        *(ctypes.cast(function, POINTER).value for function in functions),
        bump_version and ctypes.cast(bump_version, POINTER).value,
        _offset(tensor),
        id(_LOCAL_TENSOR),
    )
    # Python's lock is kept while these run.
    with_lock = ctypes.PyDLL(compiled._name)
    begin, look, count_changes = with_lock.polyak_begin_look, with_lock.polyak_look, with_lock.polyak_count_changes
    begin.argtypes = look.argtypes = (POINTER,)
    begin.restype = look.restype = COUNT
    count_changes.argtypes, count_changes.restype = (POINTER, POINTER, COUNT), None
    return Way(api, begin, look, count_changes if bump_version else None)


def _offset(tensor: Tensor) -> int:
    """The offset in bytes of the C++ tensor, a pointer whose value is `_cdata`, in a tensor's Python object."""
    return 8 * words(tensor, type(tensor).__basicsize__ // 8).index(tensor._cdata)


def words(value: object, count: int) -> list[int]:
    """The first words of a Python object."""
    return list((ctypes.c_uint64 * count).from_address(id(value)))
