"""Files: read safely, written whole or not at all."""

from .checkpoint import Checkpoint as Checkpoint
from .read import read as read
from .read import read_dictionary as read_dictionary
from .tensors import Tensors as Tensors
from .write import write_safetensors as write_safetensors
