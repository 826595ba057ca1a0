"""The compiled library; and how the work of a call is cut into chunks, and shared among threads."""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak.errors import outside

# Of the functions and structures in C; it must equal the number in passes.c.
_VERSION = 3
# Elements of one row of a table: a chunk of the source stays in the cache while all its averages are updated.
CHUNK_ELEMENTS = 1 << 14
# Elements for each further thread: waking a thread costs about as much as updating that many.
ELEMENTS_PER_THREAD = 1 << 15
# A call over at most this many elements is faster alone than with a thread that is waited for.
_SMALL = 1 << 23
# A call that takes longer than this did not work but wait: a scheduler gives others milliseconds.
_PATIENCE_NANOSECONDS = 500_000
_NANOSECONDS_PER_ELEMENT = 1
# How many calls are made alone after a wait, and how many must be in time for the next wait to be a rare one.
_FEWEST_ALONE, _MOST_ALONE = 16, 1024
_RARE = 256


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, with a warning, if the package was installed without them or cannot use them."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.exists():
            try:
                found = ctypes.CDLL(str(path))
                if found.polyak_version() == _VERSION:
                    return found
                problem = "it was built for another version"
            except (AttributeError, OSError) as error:
                problem = str(error)
            warnings.warn(
                f"polyak's C kernel cannot be used ({problem}); torch's own operations do the same, more slowly. "
                "Reinstall polyak to rebuild it",
                stacklevel=outside(),
            )
            return None
    warnings.warn(
        "polyak has no C kernel here: it was installed without a working compiler, or is a checkout that is not "
        "installed. torch's own operations do the same, more slowly",
        stacklevel=outside(),
    )
    return None


def function(name: str, *arguments: Any) -> Callable[..., None]:
    """A function of the library, which must be there, by its name and the types of its arguments."""
    compiled = library()
    assert compiled is not None
    found = compiled[f"polyak_{name}"]
    found.argtypes = arguments
    found.restype = None
    return found


class Work(ctypes.Structure):
    """The structure of this name in common.h: how threads share the chunks of a table.

    Args:
        counts: the elements of each chunk.
    """

    _fields_ = (("num_chunks", ctypes.c_int64), ("num_threads", ctypes.c_int64), ("ends", ctypes.c_void_p))

    def __init__(self, counts: Tensor) -> None:
        self._ends = counts.cumsum(0)  # the address stays valid as long as this lives
        super().__init__(len(counts), 1, self._ends.data_ptr())


@dataclass(frozen=True)
class Chunks:
    """Rows of corresponding tensors, cut into chunks.

    Attributes:
        rows: for each chunk, the number of its row.
        starts: its first element.
        counts: how many elements it has.
        addresses: where it is in each tensor of the row; one column for each.
    """

    rows: Tensor
    starts: Tensor
    counts: Tensor
    addresses: Tensor


def integers(values: Iterable[int]) -> Tensor:
    """A tensor of int64 on the CPU, made several times as fast as by `torch.tensor` from a list.

    Example:
        >>> integers([1, 2])
        tensor([1, 2])
    """
    found = array("q", values)
    return torch.frombuffer(found, dtype=torch.int64) if found else torch.empty(0, dtype=torch.int64, device="cpu")


def cut_into_chunks(rows: Sequence[Sequence[Tensor]], firsts: Sequence[int] | None = None) -> Chunks:
    """Cuts rows of corresponding tensors, each of one size.

    Args:
        rows: tensors that belong together.
        firsts: for each row the number of its first element in a whole, whose chunks it shares. Default: 0.
    """
    columns = list(zip(*rows, strict=True))
    sizes = integers(map(Tensor.numel, columns[0]))
    before = integers(firsts or [0] * len(rows)) % CHUNK_ELEMENTS
    num_chunks = torch.where(sizes > 0, (before + sizes + CHUNK_ELEMENTS - 1) // CHUNK_ELEMENTS, 0)
    # Not by `repeat_interleave`, which waits for threads that a forked process does not have.
    row = integers(chain.from_iterable(map(repeat, range(len(rows)), map(int, num_chunks))))
    number = torch.arange(len(row), device="cpu") - (num_chunks.cumsum(0) - num_chunks)[row]
    starts = (number * CHUNK_ELEMENTS - before[row]).clamp_(min=0)
    ends = torch.minimum((number + 1) * CHUNK_ELEMENTS - before[row], sizes[row])
    bases = torch.stack([integers(map(Tensor.data_ptr, column)) for column in columns], dim=1)
    widths = torch.stack([integers(map(Tensor.element_size, column)) for column in columns], dim=1)
    return Chunks(row, starts, ends - starts, bases[row] + starts[:, None] * widths[row])


class Crew:
    """As many threads as torch has, fewer for little work, and one alone for a while after others were waited for.

    With more busy processes than cores, a descheduled thread holds up the end of a parallel call for milliseconds,
    however little there was to do. So the small calls after such a wait are made alone. Their number doubles if the
    next wait comes soon after them.

    A forked process gets one thread: it has none of its parent's, and the OpenMP runtime would wait for them forever.
    """

    def __init__(self) -> None:
        self._is_forked = False
        self._alone = 0
        self._next_alone = _FEWEST_ALONE
        self._in_time = 0

    def size(self, num_elements: int) -> int:
        """The number of threads for a call over `num_elements`."""
        if num_elements < ELEMENTS_PER_THREAD or self._is_forked:
            return 1
        if self._alone > 0 and num_elements <= _SMALL:
            self._alone -= 1
            return 1
        return min(torch.get_num_threads(), 1 + num_elements // ELEMENTS_PER_THREAD)

    def took(self, nanoseconds: int, num_elements: int) -> None:
        """Notes how long a call took that had more than one thread."""
        if num_elements > _SMALL:
            return
        if nanoseconds <= _PATIENCE_NANOSECONDS + _NANOSECONDS_PER_ELEMENT * num_elements:
            self._in_time += 1
            return
        self._alone = _FEWEST_ALONE if self._in_time >= _RARE else self._next_alone
        self._next_alone = min(2 * self._alone, _MOST_ALONE)
        self._in_time = 0

    def note_fork(self) -> None:
        """Notes that this process was forked."""
        self._is_forked = True


CREW = Crew()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=CREW.note_fork)
