"""The names that averages go by, each with its profile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from .base import Profile
from .power import Power

_ONLY = "average"


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
