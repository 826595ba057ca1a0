"""In which dtype an average is kept, and where one would not move."""

from __future__ import annotations

import torch

_HALF = (torch.float16, torch.bfloat16)


def average_dtype(source: torch.dtype) -> torch.dtype:
    """The dtype of the average of a source: its own, but float32 for 16-bit floats.

    Example:
        >>> average_dtype(torch.bfloat16), average_dtype(torch.float64), average_dtype(torch.int64)
        (torch.float32, torch.float64, torch.int64)
    """
    return torch.float32 if source in _HALF else source


def kind_of(dtype: torch.dtype) -> str:
    """What a dtype may stand for: any complex one for another, any floating-point one, or itself alone.

    Example:
        >>> kind_of(torch.bfloat16), kind_of(torch.complex64), kind_of(torch.int64)
        ('floating', 'complex', 'torch.int64')
    """
    if dtype.is_complex:
        return "complex"
    return "floating" if dtype.is_floating_point else str(dtype)


def check_floating_point(dtype: torch.dtype) -> None:
    """Raises TypeError for what is no dtype, ValueError for one that is not floating-point."""
    if not isinstance(dtype, torch.dtype):  # pyright: ignore[reportUnnecessaryIsInstance]  # users pass strings
        raise TypeError(f"dtype={dtype!r}: a torch.dtype is needed, such as torch.float32")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype}: floating-point tensors cannot be cast to {dtype}")


def check_average_dtype(dtype: torch.dtype) -> None:
    """Raises ValueError where averages of this dtype would freeze, or are none.

    Nearest rounding drops an update of `weight * (source - average)` that is below half the average's last bit, so an
    average in 16 bits stands still unless its source is far away. With `u = eps / 4` to `eps / 2`, the relative
    distance that it ignores at a weight of 1e-4 (decay 0.9999) is `u / weight`.
    """
    check_floating_point(dtype)
    if dtype in _HALF:
        eps = torch.finfo(dtype).eps
        raise ValueError(
            f"dtype={dtype}: an average in 16 bits does not move. With nearest rounding and decay 0.9999 it ignores "
            f"every change below {eps / 4 / 1e-4:.3g} to {eps / 2 / 1e-4:.3g} times its value; "
            "use torch.float32, and give dtype= to export() for a small file"
        )
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype={dtype}: averages are kept in torch.float32 or torch.float64")
