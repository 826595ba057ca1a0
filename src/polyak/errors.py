"""The errors that polyak raises for its users; all are ValueErrors."""

from __future__ import annotations

import sys
from collections.abc import Iterable

_MAX_LISTED = 8
_INSIDE = ("polyak", "contextlib")


class PolyakError(ValueError):
    """The base of polyak's own errors."""


class MismatchError(PolyakError):
    """Two sets of tensors that should agree do not; nothing was written."""


class FileFormatError(PolyakError):
    """A file is damaged, hostile, or not of a kind that can be read; nothing was changed."""


class StateError(PolyakError):
    """The call does not fit the state that the object is in."""


def listed(items: Iterable[object], *, quoted: bool = True) -> str:
    """Joins items for an error message, the first few in full and a count of the rest.

    Example:
        >>> listed(["a", "b"])
        "'a', 'b'"
        >>> listed(["a", "b"], quoted=False)
        'a, b'
        >>> listed(range(10))
        '0, 1, 2, 3, 4, 5, 6, 7 and 2 more'
    """
    texts = [repr(item) if quoted else str(item) for item in items]
    text = ", ".join(texts[:_MAX_LISTED])
    return text if len(texts) <= _MAX_LISTED else f"{text} and {len(texts) - _MAX_LISTED} more"


def outside() -> int:
    """The `stacklevel` at which a warning shows the user's own line, called where the warning is given."""
    level, frame = 0, sys._getframe(0)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _INSIDE:
        level, frame = level + 1, frame.f_back
    return level
