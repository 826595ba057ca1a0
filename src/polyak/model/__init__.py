"""What a model is to an average: its tensors by name, whatever wraps it, and whether they are still the same."""

from .entries import AVERAGEABLE as AVERAGEABLE
from .entries import Action as Action
from .entries import Entry as Entry
from .entries import Rules as Rules
from .entries import gather as gather
from .entries import resolve as resolve
from .matching import check_same_names as check_same_names
from .matching import match_sites as match_sites
from .module_copy import build_module as build_module
from .peft import ADAPTER_FILE as ADAPTER_FILE
from .peft import adapter_weights as adapter_weights
from .peft import is_adapted as is_adapted
from .peft import write_adapter_config as write_adapter_config
from .source import Source as Source
from .source import check_not_standing as check_not_standing
from .source import leave as leave
from .source import occupy as occupy
from .walk import Site as Site
from .walk import extra_states as extra_states
from .walk import unwrap as unwrap
from .walk import walk as walk
from .watch import Watch as Watch
