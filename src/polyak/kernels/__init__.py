"""Arithmetic on lists of plain tensors: kernels know no modules and no profiles."""

from .eager import copy_ as copy_
from .eager import lerp_ as lerp_
from .journal import Journal as Journal
from .journal import exchange_copies as exchange_copies
from .plan import Plan as Plan
from .plan import Row as Row
from .precision import average_dtype as average_dtype
from .precision import check_average_dtype as check_average_dtype
