"""Arithmetic on lists of plain tensors: kernels know no modules and no profiles."""

from .checksum import checksums as checksums
from .copies import Copies as Copies
from .eager import copy_ as copy_
from .finite import FiniteTest as FiniteTest
from .halves import average_inside as average_inside
from .halves import exchange_halves as exchange_halves
from .halves import raw_inside as raw_inside
from .journal import Journal as Journal
from .journal import exchange as exchange
from .memory import identity as identity
from .memory import is_freed as is_freed
from .memory import is_plain as is_plain
from .memory import overlapping as overlapping
from .memory import overlaps_itself as overlaps_itself
from .pieces import parts_of as parts_of
from .plan import Plan as Plan
from .precision import average_dtype as average_dtype
from .precision import check_average_dtype as check_average_dtype
from .precision import check_floating_point as check_floating_point
from .precision import dead_zone as dead_zone
from .precision import kind_of as kind_of
from .rounding import tensor_key as tensor_key
from .row import Row as Row
