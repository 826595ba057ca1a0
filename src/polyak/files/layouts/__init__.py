"""Which library keeps its averages where, as a table, and what a file of any of them holds. Without torch."""

from .examination import examine as examine
from .examination import formats as formats
from .layout import Found as Found
from .layout import Layout as Layout
from .layout import Note as Note
from .table import BY_NAME as BY_NAME
from .table import LAYOUTS as LAYOUTS
