"""Where averages live: a store takes the growth of each update and knows nothing of clocks and profiles."""

from .local import LocalStore as LocalStore
from .modes import Modes as Modes
from .step import Step as Step
