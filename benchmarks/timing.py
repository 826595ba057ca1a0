"""Times calls in turn, so that what drifts on the machine hits all of them equally."""

import gc
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

LEAST_ROUNDS = 5


@dataclass(frozen=True)
class Spread:
    """Milliseconds: the median, and the quartiles around it."""

    median: float
    lower: float
    upper: float


def spread(milliseconds: Sequence[float]) -> Spread:
    if len(milliseconds) == 1:
        return Spread(*milliseconds * 3)
    lower, median, upper = statistics.quantiles(milliseconds, n=4, method="inclusive")
    return Spread(median, lower, upper)


def nothing() -> None:
    """There is nothing to wait for on a CPU."""


def waiting(device: torch.device) -> Callable[[], object]:
    """What waits until a device has done all that it was given."""
    return torch.cuda.synchronize if device.type == "cuda" else nothing


def milliseconds(call: Callable[[], object], wait: Callable[[], object] = nothing) -> float:
    wait()
    started = perf_counter()
    call()
    wait()
    return (perf_counter() - started) * 1e3


@dataclass(frozen=True)
class Turns:
    """Milliseconds of one contender, a number for each of its turns.

    Attributes:
        first: the first call of a turn, after others filled the caches.
        time: the median of the calls that followed; or the first, where there was one call only.
    """

    first: list[float]
    time: list[float]


def in_turn(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    num_calls: int = 1,
    wait: Callable[[], object] = nothing,
    seconds: float = math.inf,
) -> dict[str, Turns]:
    """Gives each call one turn a round, of `num_calls` calls in a row, in another order every round.

    After `seconds` no round begins, but for the first few.
    """
    names = list(calls)
    shuffle = random.Random(0).shuffle
    turns = {name: Turns([], []) for name in names}
    gc.collect()
    gc.disable()
    started = perf_counter()
    try:
        for number in range(rounds):
            if number >= LEAST_ROUNDS and perf_counter() - started > seconds:
                break
            shuffle(names)
            for name in names:
                first, *others = [milliseconds(calls[name], wait) for _ in range(num_calls)]
                turns[name].first.append(first)
                turns[name].time.append(statistics.median(others or [first]))
    finally:
        gc.enable()
    return turns
