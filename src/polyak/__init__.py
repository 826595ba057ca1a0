"""Weight averaging for PyTorch: exact, restartable averages of a model's weights."""

import re as _re
from importlib import import_module as _import_module
from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version
from pathlib import Path as _Path

# A name is loaded when it is first used: torch takes seconds and hundreds of megabytes, which reading a file's header
# can do without. Type checkers read the same list.
_LIST = _Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
_MODULES = {name: module for module, name in _re.findall(r"^from (\S+) import \w+ as (\w+)$", _LIST, _re.MULTILINE)}
__all__ = sorted(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]  # it is read from the stub

try:
    __version__ = _version("polyak")
except _PackageNotFoundError:  # in a checkout that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULES[name]
    # A package of its own stands in the list as `from . import name`.
    value = _import_module(f".{name}", __name__) if module == "." else getattr(_import_module(module, __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
