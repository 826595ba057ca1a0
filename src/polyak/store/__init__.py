"""Where averages live: a store takes the growth of each update and knows nothing of clocks and profiles."""

from .modes import Modes as Modes
from .shares import Shares as Shares
from .store import Store as Store
from .updates.device import OnDevice as OnDevice
from .updates.protocol import Ledger as Ledger
from .updates.protocol import Refused as Refused
