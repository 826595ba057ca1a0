"""How many threads a call in C takes."""

from __future__ import annotations

import os

import torch

# A thread more for each of these: waking one costs about as much as that many elements.
ELEMENTS_PER_THREAD = 1 << 15
# A call that takes longer than this was not at work, but waited: milliseconds are what a scheduler gives to others, and
# memory is nowhere so slow.
_PATIENCE_NANOSECONDS = 500_000
_NANOSECONDS_PER_ELEMENT = 1
_FEWEST_ALONE, _MOST_ALONE = 16, 1024


class Crew:
    """As many threads as torch has, fewer for little work, and for a while one alone after others were waited for.

    With more processes than cores, a thread that was put aside keeps the end of a parallel call waiting for
    milliseconds, however little there was to do. Large calls have to live with that; small ones are faster alone.
    The number of calls that are made alone doubles each time that others are waited for again.

    A forked process has one thread: those of its parent are gone, and the OpenMP runtime would wait for them forever.
    """

    def __init__(self) -> None:
        self._is_forked = False
        self._alone = 0
        self._next_alone = _FEWEST_ALONE
        self._in_time = 0

    def size(self, num_elements: int) -> int:
        """The threads for a call over so many elements."""
        if num_elements < ELEMENTS_PER_THREAD or self._is_forked:
            return 1
        if self._alone:
            self._alone -= 1
            return 1
        return min(torch.get_num_threads(), 1 + num_elements // ELEMENTS_PER_THREAD)

    def took(self, nanoseconds: int, num_elements: int) -> None:
        """Notes how long a call took that had more than one thread."""
        if nanoseconds > _PATIENCE_NANOSECONDS + _NANOSECONDS_PER_ELEMENT * num_elements:
            self._alone, self._in_time = self._next_alone, 0
            self._next_alone = min(2 * self._next_alone, _MOST_ALONE)
        else:
            self._in_time += 1
            if self._in_time >= _MOST_ALONE:
                self._next_alone = _FEWEST_ALONE

    def note_fork(self) -> None:
        """Notes that this process is a forked one."""
        self._is_forked = True


CREW = Crew()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=CREW.note_fork)
