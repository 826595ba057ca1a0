"""What can be said of a file of averages without a model and without torch: an account of plain data."""

from .account import Account as Account
from .account import Copy as Copy
from .account import Distance as Distance
from .account import NonFinite as NonFinite
from .account import Other as Other
from .account import ProfileAccount as ProfileAccount
from .account import plain as plain
from .inspecting import inspect as inspect
