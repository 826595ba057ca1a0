"""Where averages live: a store takes the growth of each update and knows nothing of clocks and profiles."""

from .modes import Modes as Modes
from .shares import Shares as Shares
from .store import Store as Store
from .updates import Ledger as Ledger
from .updates import OnDevice as OnDevice
from .updates import Refused as Refused
from .updates import Updates as Updates
