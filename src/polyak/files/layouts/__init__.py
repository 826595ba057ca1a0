"""Which library keeps its averages where, as a table, and what a file of any of them holds. Without torch."""

from .examination import examine as examine
from .layout import Found as Found
from .layout import Layout as Layout
from .layout import Note as Note
from .table import LAYOUTS as LAYOUTS
from .table import formats as formats
from .table import layout_called as layout_called
