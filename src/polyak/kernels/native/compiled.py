"""The compiled kernels: found, loaded, and called."""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from polyak.errors import outside

# Of the functions and structures in C; it must equal the number in passes.c.
_VERSION = 3


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, with a warning, if the package was installed without them or cannot use them."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.exists():
            try:
                found = ctypes.CDLL(str(path))
                if found.polyak_version() == _VERSION:
                    return found
                problem = "it was built for another version"
            except (AttributeError, OSError) as error:
                problem = str(error)
            warnings.warn(
                f"polyak's C kernel cannot be used ({problem}); torch's own operations do the same, more slowly. "
                "Reinstall polyak to rebuild it",
                stacklevel=outside(),
            )
            return None
    warnings.warn(
        "polyak has no C kernel here: it was installed without a working compiler, or is a checkout that is not "
        "installed. torch's own operations do the same, more slowly",
        stacklevel=outside(),
    )
    return None


def function(name: str, *arguments: Any) -> Callable[..., None]:
    """A function of the library, which must be there, by its name and the types of its arguments."""
    compiled = library()
    assert compiled is not None
    found = compiled[f"polyak_{name}"]
    found.argtypes = arguments
    found.restype = None
    return found
