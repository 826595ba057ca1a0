"""The schedule profile: an average whose decay is given step by step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from .base import Profile, check_decay, check_times
from .decays import decay_function

# math.exp underflows to 0.0 below minus this.
_FORGOTTEN = 746.0


@dataclass(frozen=True, init=False, repr=False)
class Schedule(Profile):
    """An average whose decay is given step by step, by a registered function.

        g(step) = g(step - 1) / decay(step)
        weight(step - 1, step) = 1 - decay(step)

    Its time axis is steps, whole ones; step 1 is the first update. `register_schedule` adds others to these:

        "inverse-gamma"   decay=0.9999, min_decay=0, update_after=0, gamma=1, power=2/3; timm, ema-pytorch, k-diffusion
        "tensorflow"      decay=0.999; torch-ema, too
        "diffusers"       decay=0.9999, min_decay=0, update_after=0
        "ultralytics"     decay=0.9999, tau=2000
        "cosine"          num_steps, base=0.996; BYOL, DINO
        "linear"          first_decay, last_decay, num_steps; Ignite
        "polynomial"      eta=3; Shamir and Zhang
        "mmengine"        decay=0.9998, gamma=100
        "half-life-ramp"  half_life, ratio=0.09; EDM2

    Args:
        name: name of a registered function.
        **arguments: its keyword arguments: numbers, strings or None, since they are saved with the average. Those
            whose names end in `decay` must lie in [0, 1].

    Raises:
        ValueError: the name is unknown, or the function gives no decay in [0, 1] for these arguments.
        TypeError: an argument is missing, not one of the function's, or nothing that can be saved.

    Example:
        >>> profile = Schedule("cosine", num_steps=100_000)
        >>> profile
        Schedule('cosine', base=0.996, num_steps=100000)
        >>> [round(profile.decay(step), 6) for step in (1, 50_001, 100_001)]
        [0.996, 0.998, 1.0]
    """

    name: str
    _arguments: tuple[tuple[str, Any], ...]

    def __init__(self, name: str, /, **arguments: Any) -> None:
        parameters = inspect.signature(decay_function(name)).parameters.values()
        # Defaults are saved, too: a later change of a default does not change an average that goes on.
        defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
        for argument, value in arguments.items():
            if argument.endswith("decay"):
                arguments[argument] = check_decay(argument, value)
            elif isinstance(value, Integral):
                arguments[argument] = int(value)
            elif isinstance(value, Real):
                arguments[argument] = float(value)
            elif not isinstance(value, str | None):
                raise TypeError(
                    f"schedule {name!r}: {argument}={value!r} must be a number, a string or None, "
                    "to be saved with the average"
                )
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "_arguments", tuple(sorted((defaults | arguments).items())))
        self.decay(1)

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the function, its defaults among them."""
        return dict(self._arguments)

    def decay(self, step: int) -> float:
        """The decay of a step, 1 being the first.

        Raises:
            ValueError: the function gives no number in [0, 1].
        """
        [decay] = self._decays([step])
        return decay

    def growth(self, previous: float, now: float) -> float:
        """The sum of -log(decay(step)) over the steps after `previous` up to `now`; see `Profile.growth`.

        Raises:
            ValueError: a time is no whole number, or is refused by every profile.
        """
        check_times(previous, now)
        if previous % 1 or now % 1:
            raise ValueError(
                f"previous={previous!r} and now={now!r} must be whole numbers: a decay is given step by step; "
                "on another time axis use Power, Exponential or Uniform"
            )
        return math.fsum(self._step_growths(range(int(previous) + 1, int(now) + 1)))

    def initial_weight(self, now: float) -> float:
        """The product of the decays of all steps up to `now`; see `Profile.initial_weight`."""
        if now >= 1 and self.decay(1) == 0:
            return 0.0
        growth = 0.0
        for _, growth in self._growth_since(now):
            if growth > _FORGOTTEN:
                return 0.0
        return math.exp(-growth)

    def describe(self) -> dict[str, Any]:
        """The name of the function and its arguments."""
        return {"profile": "schedule", "name": self.name, "arguments": self.arguments}

    def _step_growths(self, steps: Iterable[int]) -> Iterator[float]:
        for decay in self._decays(steps):
            yield abs(math.log(decay)) if decay else math.inf

    def _decays(self, steps: Iterable[int]) -> Iterator[float]:
        function, arguments = decay_function(self.name), self.arguments
        for step in steps:
            try:
                decay = function(step, **arguments)
            except ArithmeticError as error:
                raise ValueError(f"{self!r} cannot be computed at step {step}: {error}") from error
            if not 0 <= decay <= 1:
                raise ValueError(f"{self!r} gives {decay!r} at step {step}: a decay lies in [0, 1]")
            yield decay

    def __repr__(self) -> str:
        return f"Schedule({', '.join([repr(self.name), *(f'{name}={value!r}' for name, value in self._arguments)])})"
