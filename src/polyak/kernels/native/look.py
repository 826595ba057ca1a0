"""A check in C that dictionaries still hold the same objects, and tensors the same memory, dtypes and layouts."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from polyak.kernels.memory import is_plain

from .way import COUNT, POINTER, Way, words
from .work import CREW, ELEMENTS_PER_THREAD

# Entries of a dictionary that one thread takes at once; and what an entry costs, in elements of an update.
_SECTION = 64
_ELEMENTS_PER_ENTRY = 64


# The fields are those of the structures in look.c.
class _Holder(ctypes.Structure):
    _fields_ = (
        ("dictionary", POINTER), ("size", COUNT), ("count", COUNT), ("first", COUNT), ("position", COUNT),
        ("entries", POINTER),
    )  # fmt: skip


class _Seen(ctypes.Structure):
    _fields_ = (
        ("key", POINTER), ("object", POINTER), ("plain", POINTER), ("type", POINTER), ("place", ctypes.c_uint64),
        ("layout", ctypes.c_uint64), ("implementation", POINTER), ("storage", POINTER),
    )  # fmt: skip


class _Look(ctypes.Structure):
    _fields_ = (
        ("api", POINTER), ("holders", POINTER), ("num_holders", COUNT), ("seen", POINTER), ("num_seen", COUNT),
        ("start", COUNT), ("num_threads", COUNT), ("nanoseconds", COUNT),
    )  # fmt: skip


class Look:
    """What dictionaries hold now, to tell later whether it is still the same.

    Attributes:
        has_followed: whether another tensor object in the same memory took the place of one.

    Args:
        holders: the dictionaries.
        plain: for each tensor in them whose memory matters, by its `id`: the tensor itself, or the local part of a
            DTensor.
        way: how to look.

    Raises:
        ValueError: torch cannot tell the address of a tensor.
    """

    def __init__(self, holders: Sequence[dict[str, Any]], plain: Mapping[int, Tensor], way: Way) -> None:
        self.has_followed = False
        # Addresses stay valid as long as these live.
        self._places: list[tuple[dict[str, Any], str]] = []
        self._values: list[Any] = []
        self._held: list[object] = [list(plain.values()), way]
        rows = list(_rows(holders))
        self._holders = (_Holder * len(rows))(*rows)
        numbers = array("Q")
        for holder in holders:
            for key, value in dict[str, Any].items(holder):
                self._places.append((holder, key))
                self._values.append(value)
                numbers.extend(_seen(key, value, plain.get(id(value))))
        self._seen = (_Seen * len(self._values)).from_buffer(numbers) if numbers else (_Seen * 0)()
        self._look = _Look(
            ctypes.addressof(way.api),
            ctypes.addressof(self._holders), len(rows), ctypes.addressof(self._seen), len(self._values), 0, 1,
        )  # fmt: skip
        self._address = ctypes.addressof(self._look)
        self._call = way.look
        num_empty = way.begin(self._address)
        if num_empty < 0:
            raise ValueError("torch cannot tell the address of a tensor")
        may_share = num_empty == 0 and all(id(tensor) == whole for whole, tensor in plain.items())
        self._num_elements = _ELEMENTS_PER_ENTRY * len(self._values) if may_share else 0

    def is_same(self) -> bool:
        """Whether all keys, objects, addresses, dtypes, shapes and strides are the same.

        Another tensor object of the same memory, dtype and layout is followed, as forward passes make them.
        """
        if self._num_elements < ELEMENTS_PER_THREAD:
            changed = self._call(self._address)
        else:
            threads = self._look.num_threads = CREW.size(self._num_elements)
            changed = self._call(self._address)
            if threads > 1:
                CREW.took(self._look.nanoseconds, self._num_elements)
        return changed == -1 or self._is_same_from(changed)

    def _is_same_from(self, changed: int) -> bool:
        look, start = self._look, -1
        look.num_threads = 1
        try:
            # The same entry twice has changed in more than its object.
            while changed not in (-1, start) and self._follow(changed):
                look.start = start = changed
                changed = self._call(self._address)
            return changed == -1
        finally:
            look.start = 0

    def _follow(self, number: int) -> bool:
        """Takes the tensor object that is there now for the one that was, if it may be one of the same memory."""
        if number == len(self._values):
            return False
        holder, key = self._places[number]
        value, known, seen = dict[str, Any].get(holder, key), self._values[number], self._seen[number]
        if seen.plain != seen.object or not isinstance(value, Tensor) or not is_plain(value):
            return False
        if value.is_conj() != known.is_conj() or value.is_neg() != known.is_neg():
            return False
        _, seen.object, seen.plain, seen.type, *_, seen.implementation, seen.storage = _seen(key, value, value)
        self._values[number] = value
        self.has_followed = True
        return True


def _rows(holders: Iterable[dict[str, Any]]) -> Iterator[tuple[int, ...]]:
    """Each dictionary, in sections that threads can share."""
    first = 0
    for holder in holders:
        # The fifth word of a dictionary is where it keeps its entries. Only prefetched: a wrong guess is harmless.
        entries = words(holder, 5)[4]
        for start in range(0, max(len(holder), 1), _SECTION):
            count = min(len(holder) - start, _SECTION)
            yield id(holder), len(holder), count, first, start, entries
            first += count


def _seen(key: str, value: object, plain: Tensor | None) -> tuple[int, ...]:
    if plain is None:
        return id(key), id(value), 0, 0, 0, 0, 0, 0
    return id(key), id(value), id(plain), id(type(plain)), 0, 0, plain._cdata, plain.untyped_storage()._cdata
