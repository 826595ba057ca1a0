"""Shows that every timed call averaged: the averages are compared with the formula in float64.

At first all averages equal their sources, so the warm-up calls leave them where they are. Then every source is moved
by one, and stays there while the calls are timed.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from benchmarks.contenders import DECAY, Contender, Pair

# In float32's roundings of the larger of average and source. An update moves an average by some 800 of them.
MOST_ERROR_AN_UPDATE = 2
MOST_ERROR_OF_THE_START = 8
PIECE = 1 << 18  # elements at a time: their temporaries stay in the cache


@torch.no_grad()
def move(pairs: Iterable[Pair]) -> None:
    for source in {pair.source.data_ptr(): pair.source for pair in pairs}.values():
        source.add_(1)


def check(contender: Contender, pairs: list[Pair], updates: int, parameters: int) -> float:
    """Returns the largest error an update, in roundings, and raises where these are not that many updates."""
    averaged = sum(pair.average.numel() for pair in pairs)
    if averaged < parameters:
        raise RuntimeError(f"{contender.name} averages {averaged} of {parameters} elements")
    errors = [error(pair, updates * pair.times) for pair in pairs]
    most = MOST_ERROR_AN_UPDATE * updates * max(pair.times for pair in pairs) + MOST_ERROR_OF_THE_START
    if not max(errors) <= most:
        raise RuntimeError(f"{contender.name} is off by {max(errors):.3g} roundings after {updates} updates")
    return max(errors) / updates


def error(pair: Pair, updates: int) -> float:
    pieces = zip(pair.average.flatten().split(PIECE), pair.source.flatten().split(PIECE), strict=True)
    return max(error_of_piece(average, source, updates) for average, source in pieces)


def error_of_piece(average: Tensor, source: Tensor, updates: int) -> float:
    if not average.numel():
        return 0.0
    source = source.double()
    start = source - 1
    expected = source - DECAY**updates
    rounding = torch.maximum(start.abs(), source.abs()) * torch.finfo(average.dtype).eps
    return ((expected - average).abs() / rounding).max().item()
