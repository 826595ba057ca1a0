"""How many threads a call in C takes."""

from __future__ import annotations

import os

import torch

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
