"""Profiles: how an average weighs the past. Plain float64 mathematics, no tensors."""

from .base import Profile as Profile
from .decays import register_schedule as register_schedule
from .exponential import Exponential as Exponential
from .power import Power as Power
from .registry import named_profiles as named_profiles
from .registry import profile_from_description as profile_from_description
from .schedule import Schedule as Schedule
from .uniform import Uniform as Uniform
from .units import decay_to_relative_std as decay_to_relative_std
from .units import mean_age_to_exponent as mean_age_to_exponent
from .units import relative_std_to_decay as relative_std_to_decay
from .units import scale_decay as scale_decay
