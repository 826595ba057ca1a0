"""Times one update of every contender of a suite on one shape."""

import ctypes
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from benchmarks.check import check, move
from benchmarks.contender import Contender, Kind, Pair, Running
from benchmarks.machine import free_bytes
from benchmarks.shapes import Shape
from benchmarks.suites import Suite
from benchmarks.timing import Spread, in_turn, spread, timer_for

NEVER_LEFT_OUT = 2  # contenders that are tried whatever memory they are expected to need
NO_MEMORY = "not enough memory"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
SECONDS = 12.0  # of turns, for one model


@dataclass(frozen=True)
class Row:
    """One contender on one shape: the first call of a turn, those that follow, and the largest error an update."""

    contender: Contender
    first: Spread
    time: Spread
    error: float | None


class LeftOut(dict[str, str]):
    """The contenders that cannot take part, by name, and why."""

    @contextmanager
    def on_failure(self, contender: Contender) -> Iterator[None]:
        """Leaves a contender out that runs out of memory, and another library's whatever it raises."""
        try:
            yield
        except torch.OutOfMemoryError:
            self[contender.name] = NO_MEMORY
        except Exception as error:
            if contender.kind is not Kind.PEER:
                raise
            first_line, *_ = *str(error).splitlines(), ""
            self[contender.name] = f"{type(error).__name__}: {first_line}"


@dataclass(frozen=True)
class Measurement:
    suite: Suite
    shape: Shape
    device: str
    parameters: int
    rounds: int
    rows: list[Row]
    left_out: dict[str, str]

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
    left_out = LeftOut()
    for contender in suite.all_contenders(device) if contenders is None else contenders:
        # As much again for the temporaries of other formulas; this library's kernels make none.
        times = 1 if contender.kind in (Kind.OURS, Kind.REFERENCE) else 2
        needed = times * contender.num_averages * parameters * suite.average.itemsize
        if len(running) >= NEVER_LEFT_OUT and needed > free_bytes(device):
            left_out[contender.name] = NO_MEMORY
            continue
        with left_out.on_failure(contender):
            begun = contender.build(model)
            begun.update()
            running[contender] = begun
    # A second time, because the others have taken memory meanwhile.
    pairs: list[Pair] = []
    for contender in list(running):
        with left_out.on_failure(contender):
            running[contender].update()
            pairs += running[contender].checked()
        if contender.name in left_out:
            del running[contender]
    move(pairs)
    del pairs
    turns = in_turn(
        {contender.name: each.update for contender, each in running.items()},
        rounds,
        num_calls=shape.num_calls,
        timer=timer_for(device, in_all=shape.num_calls > 1),
        seconds=SECONDS,
    )
    rounds = min(len(turn.time) for turn in turns.values())
    updates = rounds * shape.num_calls
    rows: list[Row] = []
    for contender, each in running.items():
        first, time = spread(turns[contender.name].first), spread(turns[contender.name].time)
        with left_out.on_failure(contender):
            error = check(contender, each.pairs(), updates, parameters) if each.pairs else None
            rows.append(Row(contender, first, time, error))
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
