"""Files: read safely, written whole or not at all."""

from .checkpoint import Checkpoint as Checkpoint
from .content import load as load
from .content import save as save
from .conversion import Conversion as Conversion
from .convert import convert as convert
from .read import read as read
from .read import read_dictionary as read_dictionary
from .safetensors_file import in_file_order as in_file_order
from .safetensors_file import write_safetensors as write_safetensors
from .shards import write_sharded as write_sharded
from .tensors import Tensors as Tensors
from .written_layouts import WRITTEN as WRITTEN
