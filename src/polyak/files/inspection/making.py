"""How the averages of a file were made, as far as it says so."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from polyak.files.layouts import Found
from polyak.profiles import Exponential, Power, Profile, Uniform, profile_from_description

from .account import ProfileAccount

_MAX_TIME = 1 << 63


def profiles(found: Found) -> tuple[ProfileAccount, ...]:
    """The profile of each average that the file describes."""
    time = found.counters.get("time", math.inf)
    now = float(time) if time < _MAX_TIME else math.inf
    return tuple(_profile(name, about, now) for name, about in found.profiles.items())


def ages_of_decay(decay: float | None) -> tuple[float | None, float | None]:
    """Half-life and mean age, in updates, of an average that keeps so much of itself at each of them."""
    return (None, None) if decay is None or not 0 <= decay < 1 else _ages(Exponential(decay), math.inf)


def _profile(name: str, about: Mapping[str, Any], now: float) -> ProfileAccount:
    # The text of what is wrong with it would hold all of it, and that may be endless.
    if not all(value is None or isinstance(value, (bool, int, float, str)) for value in about.values()):
        return ProfileAccount(name, "not understood", None, None)
    try:
        profile = profile_from_description(about)
        return ProfileAccount(name, repr(profile), *_ages(profile, now))
    except (ValueError, TypeError, ArithmeticError) as error:
        return ProfileAccount(name, f"not understood: {error}", None, None)


def _ages(profile: Profile, now: float) -> tuple[float | None, float | None]:
    """Half-life and mean age, where there is a formula for them and not a sum over all steps."""
    if not isinstance(profile, (Exponential, Power, Uniform)) or not now > 0:
        return None, None
    ages = profile.half_life(now), profile.mean_age(now)
    half_life, mean_age = (age if math.isfinite(age) else None for age in ages)
    return half_life, mean_age
