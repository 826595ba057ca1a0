"""Which library keeps its averages where, as a table, and what a file of any of them holds. Without torch."""

from .examine import examine as examine
from .finding import Found as Found
from .table import LAYOUTS as LAYOUTS
from .table import formats as formats
