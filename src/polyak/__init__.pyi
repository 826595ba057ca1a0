"""The public names, for type checkers. `__init__.py` loads each when it is first used."""

from . import profiles as profiles
from .average import Attachment as Attachment
from .average import Average as Average
from .average import AverageReport as AverageReport
from .average import EntryReport as EntryReport
from .average import Report as Report
from .average import WeightAverage as WeightAverage
from .batchnorm import recalibrate_batchnorm as recalibrate_batchnorm
from .errors import FileFormatError as FileFormatError
from .errors import MismatchError as MismatchError
from .errors import PolyakError as PolyakError
from .errors import StateError as StateError
from .files.checkpoints import Checkpoint as Checkpoint
from .files.checkpoints import Tensors as Tensors
from .files.checkpoints import load as load
from .files.checkpoints import read as read
from .files.checkpoints import save as save
from .files.conversion import Conversion as Conversion
from .files.conversion import convert as convert
from .files.layouts import formats as formats
from .kernels import Plan as Plan
from .kernels import dead_zone as dead_zone
from .lerp import lerp_ as lerp_
from .model import Rules as Rules
from .model_ema import ModelEma as ModelEma
from .profiles import Exponential as Exponential
from .profiles import Power as Power
from .profiles import Profile as Profile
from .profiles import Schedule as Schedule
from .profiles import Uniform as Uniform
from .profiles import profile_from_description as profile_from_description
from .profiles import register_schedule as register_schedule

__version__: str
