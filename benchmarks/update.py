"""Times one update of every contender on one shape."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.check import check, move
from benchmarks.contenders import CONTENDERS, Contender, Kind
from benchmarks.shapes import Shape
from benchmarks.timing import Spread, in_turn, spread

WARM_UPS = 2
MOST_OF_THE_PEER = 1.0
LEAST_SPEED_UP = 3.0


@dataclass(frozen=True)
class Row:
    """One contender on one shape."""

    contender: Contender
    time: Spread
    error: float


@dataclass(frozen=True)
class Verdict:
    """One of our classes beside the fastest peer, the seed's formula and the limit. Ratios of medians."""

    contender: str
    fastest_peer: str
    of_peer: float
    of_limit: float
    speed_up: float

    @property
    def never_slower(self) -> bool:
        return self.of_peer <= MOST_OF_THE_PEER

    @property
    def fast_enough(self) -> bool:
        return self.speed_up >= LEAST_SPEED_UP


@dataclass(frozen=True)
class Measurement:
    shape: Shape
    rounds: int
    rows: list[Row]

    def of_kind(self, kind: Kind) -> list[Row]:
        """The fastest first."""
        return sorted((row for row in self.rows if row.contender.kind is kind), key=lambda row: row.time.median)

    def verdicts(self) -> list[Verdict]:
        """None where only some contenders were timed."""
        peers, seeds, limits = map(self.of_kind, (Kind.PEER, Kind.SEED, Kind.LIMIT))
        if not (peers and seeds and limits):
            return []
        peer, seed, limit = peers[0], seeds[0], limits[0]
        return [
            Verdict(
                contender=row.contender.name,
                fastest_peer=peer.contender.name,
                of_peer=row.time.median / peer.time.median,
                of_limit=row.time.median / limit.time.median,
                speed_up=seed.time.median / row.time.median,
            )
            for row in self.rows
            if row.contender.kind is Kind.OURS
        ]


def measure(shape: Shape, rounds: int | None = None, contenders: Sequence[Contender] = CONTENDERS) -> Measurement:
    rounds = rounds or shape.rounds
    settle_allocator()
    model = shape.model()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    running = {contender: contender.build(model) for contender in contenders}
    for each in running.values():
        for _ in range(WARM_UPS):
            each.update()
    move(pair for each in running.values() for pair in each.pairs())
    times = in_turn({contender.name: each.update for contender, each in running.items()}, rounds)
    rows = [
        Row(contender, spread(times[contender.name]), check(contender, each.pairs(), rounds, parameters))
        for contender, each in running.items()
    ]
    return Measurement(shape, rounds, rows)


def settle_allocator() -> None:
    """Lets every run begin in the same state, the one that suits temporaries best.

    glibc takes fresh pages for each block larger than the largest it has seen freed, up to 32 MiB; so what ran before
    would decide how long the formulas with temporaries take, by factors.
    """
    torch.empty(31 << 20, dtype=torch.uint8)
