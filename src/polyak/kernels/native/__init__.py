"""The kernels in C, for tensors on a CPU that fill their memory without gaps."""

from .look import Look as Look
from .passes import Call as Call
from .passes import copy as copy
from .passes import exchange as exchange
from .passes import exchange_halves as exchange_halves
from .passes import is_reachable as is_reachable
from .passes import is_usable as is_usable
from .passes import non_finite as non_finite
from .passes import sums as sums
from .trial import Versions as Versions
from .trial import tried_way as tried_way
from .trial import why_not_in_c as why_not_in_c
from .update import Native as Native
from .update import is_supported as is_supported
from .work import library as library
