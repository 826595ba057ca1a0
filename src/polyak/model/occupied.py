"""In which models an average stands at the moment, for everyone who would take it for the trained weights."""

from __future__ import annotations

import weakref

from torch import nn

from polyak.errors import StateError

# Models in which an average stands. Other averagers of the same model must know, or they would average an average.
_STANDING: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def occupy(model: nn.Module, name: str) -> None:
    """Notes that the average of that name stands in a bare model from now on."""
    _STANDING[model] = name


def leave(model: nn.Module) -> None:
    """Notes that a bare model has its own weights again."""
    _STANDING.pop(model, None)


def check_not_standing(model: nn.Module, call: str) -> None:
    """Raises where an average stands in a bare model or in a part of it, whoever put it there."""
    if not len(_STANDING):  # the usual case, and faster than an empty loop over a weak dictionary
        return
    for other, name in _STANDING.items():
        if other is model or not {*map(id, other.modules())}.isdisjoint(map(id, model.modules())):
            raise StateError(
                f"{call} inside of swapped(): the average {name!r} stands in the model now, not the trained "
                "weights. Leave the swap first"
            )
