"""Times one update of every contender of a suite on one shape."""

import ctypes
import platform
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.check import check, move
from benchmarks.contender import Contender, Kind, Running
from benchmarks.machine import free_bytes
from benchmarks.shapes import Shape
from benchmarks.suites import Suite
from benchmarks.timing import Spread, in_turn, spread, timer_for

WARM_UPS = 2
NEVER_LEFT_OUT = 2  # contenders
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
SECONDS = 12.0  # of turns, for one model


@dataclass(frozen=True)
class Row:
    """One contender on one shape: the first call of a turn, those that follow, and the largest error an update."""

    contender: Contender
    first: Spread
    time: Spread
    error: float | None


@dataclass(frozen=True)
class Measurement:
    suite: Suite
    shape: Shape
    device: str
    parameters: int
    rounds: int
    rows: list[Row]
    left_out: list[str]

    def of_kind(self, kind: Kind) -> list[Row]:
        """The fastest first."""
        return sorted((row for row in self.rows if row.contender.kind is kind), key=lambda row: row.time.median)

    def fastest(self, kind: Kind) -> Row | None:
        return next(iter(self.of_kind(kind)), None)

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.contender.name == name), None)


def measure(
    suite: Suite,
    shape: Shape,
    *,
    device: torch.device | str = "cpu",
    rounds: int | None = None,
    contenders: Sequence[Contender] | None = None,
) -> Measurement:
    device = torch.device(device)
    rounds = rounds or shape.rounds
    if device.type == "cpu":
        settle_allocator()
    model = shape.model(dtype=suite.source, device=device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    running: dict[Contender, Running] = {}
    left_out: list[str] = []
    for contender in suite.all_contenders(device) if contenders is None else contenders:
        # As much again for what its formula makes on the way.
        needed = 2 * contender.num_averages * parameters * suite.average.itemsize
        if len(running) >= NEVER_LEFT_OUT and needed > free_bytes(device):
            left_out.append(contender.name)
            continue
        running[contender] = contender.build(model)
        for _ in range(WARM_UPS):
            running[contender].update()
    move(pair for each in running.values() if each.pairs for pair in each.pairs())
    turns = in_turn(
        {contender.name: each.update for contender, each in running.items()},
        rounds,
        num_calls=shape.num_calls,
        timer=timer_for(device, in_all=shape.num_calls > 1),
        seconds=SECONDS,
    )
    rounds = min(len(turn.time) for turn in turns.values())
    updates = rounds * shape.num_calls
    rows = [
        Row(
            contender,
            first=spread(turns[contender.name].first),
            time=spread(turns[contender.name].time),
            error=check(contender, each.pairs(), updates, parameters) if each.pairs else None,
        )
        for contender, each in running.items()
    ]
    return Measurement(suite, shape, device.type, parameters, rounds, rows, left_out)


def settle_allocator() -> None:
    """Lets every run begin in the same state, the one that suits temporaries best.

    glibc takes fresh pages for each block larger than the largest it has seen freed, up to 32 MiB, and gives back what
    is free at the end of its heap; so what ran before would decide how long the formulas with temporaries take, by
    factors. Larger blocks get fresh pages always.
    """
    if platform.libc_ver()[0] == "glibc":
        c = ctypes.CDLL(None)
        c.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        c.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
