"""Files: read safely, written whole or not at all."""

from .read import read_dictionary as read_dictionary
from .write import write_safetensors as write_safetensors
