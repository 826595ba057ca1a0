"""Profiles from what users give and from the plain data that is saved with an average."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from .base import Profile
from .exponential import Exponential
from .power import Power
from .schedule import Schedule
from .uniform import Uniform

_ONLY = "average"


def _schedule(name: str, arguments: Mapping[str, Any]) -> Profile:
    return Schedule(name, **arguments)


_PROFILES: dict[str, Callable[..., Profile]] = {
    "exponential": Exponential,
    "power": Power,
    "schedule": _schedule,
    "uniform": Uniform,
}


def profile_from_description(description: Mapping[str, Any]) -> Profile:
    """The profile that `Profile.describe` described.

    Args:
        description: what `describe()` returned, perhaps by way of JSON.

    Raises:
        ValueError: it describes no known profile, or one that cannot be.

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


def named_profiles(profile: Profile | Mapping[str, Profile] | None) -> dict[str, Profile]:
    """Profiles by the names of their averages, of what a user gave for them; a single one is called "average".

    Raises:
        TypeError: something is no profile.
        ValueError: there is none, or a name is none.

    Example:
        >>> named_profiles(None)
        {'average': Power(relative_std=0.1)}
    """
    if profile is None:
        return {_ONLY: Power(relative_std=0.10)}
    named = cast("dict[object, object]", dict(profile) if isinstance(profile, Mapping) else {_ONLY: profile})
    if not named:
        raise ValueError("profile={}: at least one profile is needed, such as polyak.Power(relative_std=0.10)")
    for name, value in named.items():
        if not isinstance(value, Profile):
            hint = f"; for a decay, polyak.Exponential({value!r})" if isinstance(value, float) else ""
            raise TypeError(f"profile: {value!r} is not a profile, such as polyak.Power(relative_std=0.10){hint}")
        if not isinstance(name, str) or not name or not name.isprintable():
            raise ValueError(f"profile: {name!r} is not a name for an average")
    return cast("dict[str, Profile]", named)
