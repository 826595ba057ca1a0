"""Where averages live: a store takes the growth of each update and knows nothing of clocks and profiles."""

from .modes import Modes as Modes
from .shares import Replicas as Replicas
from .store import LocalStore as LocalStore
from .updates.step import Step as Step
