"""Which kernels may be used."""

from __future__ import annotations

import os
from collections.abc import Sequence

from polyak.errors import listed

# In the order in which they are tried.
NAMES = ("native", "triton", "foreach", "staged")


def allowed_kernels(kernels: Sequence[str] | None = None) -> list[str]:
    """Those that are given; else those that the environment variable POLYAK_KERNELS names; else all.

    Raises:
        ValueError: a kernel is unknown.
    """
    if kernels is None:
        named = os.environ.get("POLYAK_KERNELS", "")
        # Triton's interpreter is for those who ask for it.
        usual = [name for name in NAMES if name != "triton" or not is_interpreted()]
        kernels = [name.strip() for name in named.split(",")] if named else usual
    unknown = [name for name in kernels if name not in NAMES]
    if unknown:
        raise ValueError(f"there is no kernel {listed(unknown)}; the kernels are {listed(NAMES)}")
    return list(kernels)


def is_interpreted() -> bool:
    """Whether Triton was told to interpret its kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
