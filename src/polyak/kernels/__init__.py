"""Arithmetic on lists of plain tensors: kernels know no modules and no profiles.

A plan groups rows by the kernel that updates them: in C (`native/`), in Triton (`gpu/`), or in torch's operations
(`eager`). What an update does to an average is its mode (`modes/`), and all kernels have the same bits.

The words for what tensors are cut into:
    row         a source and its averages, one a profile
    part        what a rank has of a whole tensor; `first` and `strides` say where it lies
    stretch     memory that elements fill without gaps
    piece       a view of a tensor, small enough for a temporary or the scratch buffer
    batch       pieces that go through the scratch buffer together
    chunk       an entry of a table in C or Triton: the elements of a row that are gone through at once
    portion     the chunks that a thread takes at once
    block       the elements of a chunk that a program on the GPU takes at once
    segment     the 2 ** 33 elements of a tensor whose random bits share a key
"""

from .eager import Copies as Copies
from .gpu import Control as Control
from .gpu import SettledCopies as SettledCopies
from .gpu import Triton as Triton
from .gpu import can_copy as can_copy
from .gpu import is_capturing as is_capturing
from .halves import average_inside as average_inside
from .halves import exchange_halves as exchange_halves
from .halves import raw_inside as raw_inside
from .journal import Journal as Journal
from .journal import exchange as exchange
from .journal import take_no_memory as take_no_memory
from .memory import identity as identity
from .memory import is_freed as is_freed
from .memory import is_plain as is_plain
from .memory import overlapping as overlapping
from .memory import overlaps_itself as overlaps_itself
from .modes import Mode as Mode
from .modes import compensated as compensated
from .modes import plain as plain
from .modes import stochastic as stochastic
from .native import Look as Look
from .native import Versions as Versions
from .native import tried_way as tried_way
from .native import why_not_in_c as why_not_in_c
from .pieces import copy_ as copy_
from .pieces import is_dense as is_dense
from .pieces import pieces_of as pieces_of
from .pieces import stretches_of as stretches_of
from .plan import Plan as Plan
from .precision import HALF as HALF
from .precision import average_dtype as average_dtype
from .precision import cast_floating_point as cast_floating_point
from .precision import check_floating_point as check_floating_point
from .precision import dead_zone as dead_zone
from .precision import kind_of as kind_of
from .row import Row as Row
from .sums import Checksums as Checksums
from .sums import FiniteTest as FiniteTest
from .sums import checksums as checksums
