"""The errors that polyak raises for its users; all are ValueErrors."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

_MAX_LISTED = 8
_INSIDE = ("polyak", "contextlib")
# How to give what is needed, if "give argument=" does not say it.
_ADVICE: Mapping[tuple[str, ...], str] = {
    ("average",): "choose one by average=, or of .averages",
    ("decay",): "give decay= for another",
    ("format",): "choose one by format=",
    ("model", "names"): "give model=, or names= in the order of model.parameters()",
    ("skip_objects", "run_pickled_code"): "skip_objects=True reads the tensors and plain values around it, and nothing "
    "runs; run_pickled_code=True runs the code, if you trust whoever wrote the file",
}


class PolyakError(ValueError):
    """The base of polyak's own errors.

    Args:
        text: what happened, and what was expected.
        needs: the arguments that would help. The library and the command line each say how to give them.
        argument: the argument that is wrong; the text begins with its value.
    """

    def __init__(self, text: str = "", *, needs: tuple[str, ...] = (), argument: str | None = None) -> None:
        super().__init__(text)
        self.text = text
        self.needs = needs
        self.argument = argument

    def __str__(self) -> str:
        return with_advice(self.text if self.argument is None else f"{self.argument}={self.text}", self.needs)

    def inside(self, what: str) -> PolyakError:
        """The same error as part of something, whose name comes first."""
        return type(self)(f"{what} {self.text}", needs=self.needs)


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


def with_advice(text: str, needs: tuple[str, ...]) -> str:
    """What happened, and how a user of the library gives what is needed.

    Example:
        >>> with_advice("it has no configuration", ("config",))
        'it has no configuration; give config='
    """
    advice = _ADVICE.get(needs, f"give {' or '.join(f'{need}=' for need in needs)}")
    return f"{text}; {advice}" if needs else text


def outside() -> int:
    """The `stacklevel` at which a warning shows the user's own line, called where the warning is given."""
    level, frame = 0, sys._getframe(0)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _INSIDE:
        level, frame = level + 1, frame.f_back
    return level
