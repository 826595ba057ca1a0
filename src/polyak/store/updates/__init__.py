"""Who decides about an update, and makes it: this thread, a device, or a worker beside the training."""

from .device import OnDevice as OnDevice
from .finite import FiniteCheck as FiniteCheck
from .host import OnHost as OnHost
from .inline import Inline as Inline
from .protocol import Ledger as Ledger
from .protocol import Refused as Refused
from .protocol import Updates as Updates
from .protocol import check_intact as check_intact
from .transfer import transfer_for as transfer_for
