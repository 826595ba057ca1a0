"""Profiles from the plain data that is saved with an average."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .base import Profile
from .exponential import Exponential
from .power import Power
from .schedule import Schedule
from .uniform import Uniform


def _schedule(name: str, arguments: Mapping[str, Any]) -> Profile:
    return Schedule(name, **arguments)


_PROFILES: dict[str, Callable[..., Profile]] = {
    "exponential": Exponential,
    "power": Power,
    "schedule": _schedule,
    "uniform": Uniform,
}


def profile_from_description(description: Mapping[str, Any]) -> Profile:
    """Returns the profile that `Profile.describe` described.

    Args:
        description: What `describe()` returned, perhaps by way of JSON.

    Raises:
        ValueError: It describes no known profile, or one that cannot be.

    Example:
        >>> profile_from_description({"profile": "exponential", "half_life": 2000})
        Exponential(half_life=2000.0)
    """
    arguments = dict(description)
    kind = arguments.pop("profile", None)
    if kind not in list(_PROFILES):
        raise ValueError(f"{description!r} describes no known profile: 'profile' must be one of {list(_PROFILES)}")
    try:
        return _PROFILES[kind](**arguments)
    except TypeError as error:
        raise ValueError(f"{description!r} does not describe a profile: {error}") from error
