"""How many threads a call in C takes."""

from __future__ import annotations

import os

import torch

# Elements for each further thread: waking a thread costs about as much as updating that many.
ELEMENTS_PER_THREAD = 1 << 15
# A call that takes longer than this has waited for a descheduled thread: memory is not as slow, and a scheduler gives
# other processes milliseconds at a time.
_PATIENCE_NANOSECONDS = 500_000
_NANOSECONDS_PER_ELEMENT = 1
_FEWEST_ALONE, _MOST_ALONE = 16, 1024


class Crew:
    """Torch's number of threads; fewer for little work, and only one for a while after a call had to wait.

    With more busy processes than cores, a descheduled thread delays the end of a parallel call by milliseconds,
    however little there was to do. Large calls have to live with that; small ones are faster on one thread. The number
    of calls on one thread doubles each time that a call has waited again.

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
        if self._alone:
            self._alone -= 1
            return 1
        return min(torch.get_num_threads(), 1 + num_elements // ELEMENTS_PER_THREAD)

    def took(self, nanoseconds: int, num_elements: int) -> None:
        """Notes the time of a call that had more than one thread."""
        if nanoseconds > _PATIENCE_NANOSECONDS + _NANOSECONDS_PER_ELEMENT * num_elements:
            self._alone, self._in_time = self._next_alone, 0
            self._next_alone = min(2 * self._next_alone, _MOST_ALONE)
        else:
            self._in_time += 1
            if self._in_time >= _MOST_ALONE:
                self._next_alone = _FEWEST_ALONE

    def note_fork(self) -> None:
        """Notes that this process was forked."""
        self._is_forked = True


CREW = Crew()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=CREW.note_fork)
