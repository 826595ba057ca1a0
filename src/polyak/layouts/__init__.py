"""Which library keeps its averages where, as a table, and what a file of any of them holds. Without torch."""

from .examine import examine as examine
from .finding import ALONE as ALONE
from .finding import Found as Found
from .layout import Layout as Layout
from .pattern import items_of as items_of
from .table import LAYOUTS as LAYOUTS
from .table import formats as formats
