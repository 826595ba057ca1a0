"""Files of averages and states: read without running anything that is in them, and saved whole."""

from .checkpoint import Checkpoint as Checkpoint
from .checkpoint import Tensors as Tensors
from .read import read as read
from .read import read_dictionary as read_dictionary
from .save import load as load
from .save import save as save
