"""Modes: how averages are moved and rounded. Each is one object in a file of its own."""

from .compensated import compensated as compensated
from .mode import Mode as Mode
from .mode import Sources as Sources
from .plain import lerp_ as lerp_
from .plain import plain as plain
from .stochastic import stochastic as stochastic

# The kernel in Triton numbers them in this order.
MODES: tuple[Mode, ...] = (plain, compensated, stochastic)
