"""How tensors lie over the ranks of a process group, and what ranks send to each other. No modules, no averages."""

from .messages import Question as Question
from .messages import all_or_none as all_or_none
from .messages import any_rank as any_rank
from .messages import apart as apart
from .messages import given_by_all as given_by_all
from .messages import is_alone as is_alone
from .messages import is_first as is_first
from .messages import is_initialized as is_initialized
from .messages import meshes_of as meshes_of
from .messages import reduced as reduced
from .messages import sending as sending
from .messages import sums_of_parts as sums_of_parts
from .messages import whole as whole
from .sharding import Sharding as Sharding
from .sharding import describe as describe
from .sharding import is_sharded as is_sharded
from .sharding import local as local
from .sharding import sharding_of as sharding_of
