"""Files and folders that are written whole or not at all."""

from .hub_folder import write_sharded as write_sharded
from .safetensors import in_file_order as in_file_order
from .safetensors import write_safetensors as write_safetensors
from .whole import replacing as replacing
