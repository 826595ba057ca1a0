"""The kernels in Triton, for tensors on a GPU that fill their memory without gaps. Triton is imported at first use."""

from .control import Control as Control
from .control import is_capturing as is_capturing
from .launch import SettledCopies as SettledCopies
from .launch import Triton as Triton
from .launch import can_copy as can_copy
from .launch import is_supported as is_supported
