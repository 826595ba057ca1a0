"""In which dtype an average is kept, and where one would not move."""

from __future__ import annotations

import math

import torch

HALF = (torch.float16, torch.bfloat16)


def average_dtype(source: torch.dtype) -> torch.dtype:
    """The dtype of the average of a source: its own, but float32 for 16-bit floats.

    Example:
        >>> average_dtype(torch.bfloat16), average_dtype(torch.float64), average_dtype(torch.int64)
        (torch.float32, torch.float64, torch.int64)
    """
    return torch.float32 if source in HALF else source


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


def cast_floating_point(tensor: torch.Tensor, dtype: torch.dtype, *, what: str) -> torch.Tensor:
    """A tensor in another dtype, if it is floating-point; else as it is.

    Args:
        tensor: any.
        dtype: floating-point.
        what: the tensor, as an error calls it.

    Raises:
        ValueError: a number in it is too large for the dtype, and would be infinite.

    Example:
        >>> cast_floating_point(torch.tensor([0.5, 1e6]), torch.float16, what="'weight'")
        Traceback (most recent call last):
        ValueError: 'weight' has the number 1e+06, and torch.float16 ends at 65504; choose another dtype
    """
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    made = tensor.to(dtype)
    fits = _is_finite(made)
    if fits.all() or fits.equal(_is_finite(tensor)):
        return made
    largest = tensor.double()[_is_finite(tensor)].abs().max().item()
    raise ValueError(
        f"{what} has the number {largest:.6g}, and {dtype} ends at {torch.finfo(dtype).max:.6g}; choose another dtype"
    )


def _is_finite(tensor: torch.Tensor) -> torch.Tensor:
    # torch does not know it of floats of 8 bits.
    return torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor)


def dead_zone(dtype: torch.dtype, decay: float) -> float:
    """How far a source may be from its average, relative to the average, without ever moving it.

        dead_zone = (eps / 2) / (1 - decay)

    An update adds `(1 - decay) * (source - average)`, and nearest rounding drops what is below half of the average's
    last bit, which is at most eps / 2 of it. An average does not get nearer to its source than that. The averages of 16
    bits that are kept here are rounded stochastically, and have no such zone; compensated ones have 2 ** -16 of it.

    Args:
        dtype: of the average; floating-point.
        decay: of the average at each update, from 0 to 1.

    Raises:
        TypeError: the dtype is none.
        ValueError: the dtype is not floating-point, or the decay is outside of [0, 1].

    Example:
        >>> [float(f"{dead_zone(dtype, 0.9999):.2g}") for dtype in (torch.bfloat16, torch.float16, torch.float32)]
        [39.0, 4.9, 0.0006]

    Source: Zamirai et al., Revisiting BFloat16 training, 2020.
    """
    check_floating_point(dtype)
    if not 0 <= decay <= 1:
        raise ValueError(f"decay={decay!r} is outside [0, 1]")
    return torch.finfo(dtype).eps / 2 / (1 - decay) if decay < 1 else math.inf
