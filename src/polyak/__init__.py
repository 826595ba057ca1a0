"""Weight averaging for PyTorch: exact, restartable averages of a model's weights."""

from importlib import import_module as _import_module
from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

# A name is loaded when it is first used: torch takes seconds and hundreds of megabytes, which reading a file's header
# can do without. `__init__.pyi` says the same to type checkers.
_NAMES = {
    "attach": "Attachment",
    "average": "WeightAverage",
    "batchnorm": "recalibrate_batchnorm",
    "checkpoints": "Checkpoint Conversion convert load read save",
    "errors": "FileFormatError MismatchError PolyakError StateError",
    "kernels": "dead_zone",
    "layouts": "formats",
    "model_ema": "ModelEma",
    "profiles": """Exponential Power Profile Schedule Uniform decay_to_half_life decay_to_mean_age decay_to_relative_std
        exponent_to_mean_age exponent_to_relative_std half_life_to_decay mean_age_to_decay mean_age_to_exponent
        profile_from_description register_schedule relative_std_to_decay relative_std_to_exponent scale_decay""",
    "report": "Report",
    "targets": "lerp_",
    "view": "AverageView",
}
_ROOMS = {name: room for room, names in _NAMES.items() for name in names.split()}

try:
    __version__ = _version("polyak")
except _PackageNotFoundError:  # in a checkout that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> object:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_import_module(f".{_ROOMS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
