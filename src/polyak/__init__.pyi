"""The public names, for type checkers. `__init__.py` loads each when it is first used."""

from .average import Attachment as Attachment
from .average import Average as Average
from .average import Report as Report
from .average import WeightAverage as WeightAverage
from .batchnorm import recalibrate_batchnorm as recalibrate_batchnorm
from .errors import FileFormatError as FileFormatError
from .errors import MismatchError as MismatchError
from .errors import PolyakError as PolyakError
from .errors import StateError as StateError
from .files.checkpoints import Checkpoint as Checkpoint
from .files.checkpoints import load as load
from .files.checkpoints import read as read
from .files.checkpoints import save as save
from .files.conversion import Conversion as Conversion
from .files.conversion import convert as convert
from .files.layouts import formats as formats
from .kernels import dead_zone as dead_zone
from .model_ema import ModelEma as ModelEma
from .profiles import Exponential as Exponential
from .profiles import Power as Power
from .profiles import Profile as Profile
from .profiles import Schedule as Schedule
from .profiles import Uniform as Uniform
from .profiles import decay_to_half_life as decay_to_half_life
from .profiles import decay_to_mean_age as decay_to_mean_age
from .profiles import decay_to_relative_std as decay_to_relative_std
from .profiles import exponent_to_mean_age as exponent_to_mean_age
from .profiles import exponent_to_relative_std as exponent_to_relative_std
from .profiles import half_life_to_decay as half_life_to_decay
from .profiles import mean_age_to_decay as mean_age_to_decay
from .profiles import mean_age_to_exponent as mean_age_to_exponent
from .profiles import profile_from_description as profile_from_description
from .profiles import register_schedule as register_schedule
from .profiles import relative_std_to_decay as relative_std_to_decay
from .profiles import relative_std_to_exponent as relative_std_to_exponent
from .profiles import scale_decay as scale_decay
from .targets import lerp_ as lerp_

__version__: str
