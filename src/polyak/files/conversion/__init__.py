"""From the layout of one library to that of another."""

from .convert import Conversion as Conversion
from .convert import convert as convert
from .written import WRITTEN as WRITTEN
