"""What can be said of a file of averages without a model and without torch: an account of plain data."""

from .account import Account as Account
from .account import Distance as Distance
from .account import Other as Other
from .account import ProfileAccount as ProfileAccount
from .account import WeightSet as WeightSet
from .account import plain as plain
from .inspect import inspect as inspect
