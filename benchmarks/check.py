"""Shows that every timed call averaged: the averages are compared with the formula in float64.

At first all averages equal their sources, so the warm-up calls leave them where they are. Then every source is moved
by one, exactly, and stays there while the calls are timed.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from benchmarks.contender import Contender, Pair

# In roundings of the larger of average and source. In float32 an update moves an average by some 800 of them.
MOST_ERROR_AN_UPDATE = 2
MOST_ERROR_OF_THE_START = 8
# Of the mean error of averages in 16 bits: each element is off by its roundings, and all together must not be.
MOST_STANDARD_ERRORS = 6
PIECE = 1 << 18  # elements at a time: their temporaries stay in the cache
PIECE_ON_GPU = 1 << 24


@torch.no_grad()
def move(pairs: Iterable[Pair]) -> None:
    for source in {pair.source.data_ptr(): pair.source for pair in pairs}.values():
        source.add_(1)


def check(contender: Contender, pairs: list[Pair], updates: int, parameters: int) -> float:
    """Returns the largest error an update, in roundings, and raises where these are not that many updates."""
    averaged = sum(pair.average.numel() for pair in pairs)
    if averaged < parameters:
        raise RuntimeError(f"{contender.name} averages {averaged} of {parameters} elements")
    errors = [largest_error(pair, updates * pair.times) for pair in pairs]
    most = MOST_ERROR_AN_UPDATE * updates * max(pair.times for pair in pairs) + MOST_ERROR_OF_THE_START
    if not max(errors) <= most:
        raise RuntimeError(f"{contender.name} is off by {max(errors):.3g} roundings after {updates} updates")
    halves = [pair for pair in pairs if pair.average.element_size() == 2]
    if halves and not abs(standard_errors(halves, updates)) <= MOST_STANDARD_ERRORS:
        raise RuntimeError(
            f"{contender.name} is off by {standard_errors(halves, updates):.3g} standard errors in the mean after "
            f"{updates} updates"
        )
    return max(errors) / updates


def pieces(pair: Pair) -> Iterable[tuple[Tensor, Tensor]]:
    size = PIECE if pair.average.device.type == "cpu" else PIECE_ON_GPU
    return zip(pair.average.flatten().split(size), pair.source.flatten().split(size), strict=True)


def largest_error(pair: Pair, updates: int) -> float:
    return max(error_of_piece(average, source, pair.decay**updates) for average, source in pieces(pair))


def error_of_piece(average: Tensor, source: Tensor, left: float) -> float:
    if not average.numel():
        return 0.0
    source = source.double()
    rounding = torch.maximum((source - 1).abs(), source.abs()) * torch.finfo(average.dtype).eps
    return ((source - left - average).abs() / rounding).max().item()


def standard_errors(pairs: list[Pair], updates: int) -> float:
    """How far the mean signed error is from zero, in its standard errors."""
    count = total = squares = 0.0
    for pair in pairs:
        left = pair.decay ** (updates * pair.times)
        for average, source in pieces(pair):
            errors = average.double() - (source.double() - left)
            count += errors.numel()
            total += errors.sum().item()
            squares += errors.square().sum().item()
    mean = total / count
    deviation = math.sqrt(max(squares / count - mean**2, 0.0) / count)
    if deviation == 0.0:
        return 0.0 if mean == 0.0 else math.copysign(math.inf, mean)
    return mean / deviation
