"""What has to be reached, as data, and whether a run reached it. All are ratios of medians of one run, or microseconds.

A new bound is one more row of CPU_BOUNDS or GPU_BOUNDS.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.contender import Kind
from benchmarks.suites import COMPENSATED, FLOAT32, MIXED, PROFILES, STOCHASTIC, Suite
from benchmarks.update import Measurement

OURS = "polyak.WeightAverage"
CLASSIC = "polyak.ModelEma"

Measure = Callable[[Measurement], float | None]


@dataclass(frozen=True)
class Bound:
    """`value` gives None where a run lacks the contenders that it compares; `beside` is whose fastest is named."""

    what: str
    suite: Suite
    shapes: Sequence[str]
    value: Measure
    least: float | None = None
    most: float | None = None
    beside: Kind | None = None

    def reached(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        return f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"


@dataclass(frozen=True)
class Verdict:
    what: str
    suite: str
    shape: str
    bound: str
    value: float
    reached: bool
    beside: str


def times_faster(measurement: Measurement, kind: Kind, name: str = OURS) -> float | None:
    """How many times as fast as the fastest of a kind."""
    own, other = measurement.row(name), measurement.fastest(kind)
    return other.time.median / own.time.median if own and other else None


def times_as_long(measurement: Measurement, name: str, other: str) -> float | None:
    one, two = measurement.row(name), measurement.row(other)
    return one.time.median / two.time.median if one and two else None


def of_the_limit(measurement: Measurement, name: str = OURS) -> float | None:
    faster = times_faster(measurement, Kind.LIMIT, name)
    return 1 / faster if faster else None


def percent_of_the_limit(measurement: Measurement) -> float | None:
    faster = times_faster(measurement, Kind.LIMIT)
    return 100 * faster if faster else None


def microseconds(measurement: Measurement) -> float | None:
    own = measurement.row(OURS)
    return own.time.median * 1e3 if own else None


def times_timm(measurement: Measurement) -> float | None:
    return times_as_long(measurement, "timm ModelEmaV3", OURS)


faster_than_peers = partial(times_faster, kind=Kind.PEER)
faster_than_seed = partial(times_faster, kind=Kind.SEED)
classic_faster_than_peers = partial(times_faster, kind=Kind.PEER, name=CLASSIC)
classic_faster_than_seed = partial(times_faster, kind=Kind.SEED, name=CLASSIC)
two_profiles = partial(times_as_long, name="2 profiles", other="2 averages")
four_profiles = partial(times_as_long, name="4 profiles", other="4 averages")
compensated = partial(times_as_long, name="compensated", other="plain")
of_its_bytes = partial(times_as_long, name=OURS, other="flat lerp_ of as many bytes")
compensated_of_the_limit = partial(of_the_limit, name="compensated")

SMALL, RESNET, LARGE = ("small",), ("resnet50",), ("resnet50", "vit", "gpt2")
EVERY = (*SMALL, *LARGE)
FLOAT32_ONLY = ("convnext", "bert")

CPU_BOUNDS = (
    Bound("times as fast as the fastest peer", FLOAT32, SMALL, faster_than_peers, least=20, beside=Kind.PEER),
    Bound("times as fast as the seed's formula", FLOAT32, SMALL, faster_than_seed, least=88),
    Bound("microseconds of update() in all", FLOAT32, SMALL, microseconds, most=250),
    Bound("times as fast as the fastest peer", FLOAT32, RESNET, faster_than_peers, least=1.5, beside=Kind.PEER),
    Bound("times as fast as the seed's formula", FLOAT32, RESNET, faster_than_seed, least=4),
    Bound("of the limit's time", FLOAT32, LARGE, of_the_limit, most=1.10, beside=Kind.LIMIT),
    Bound("of the limit's time", FLOAT32, FLOAT32_ONLY, of_the_limit, most=1.15, beside=Kind.LIMIT),
    Bound(
        "times as fast as the fastest peer",
        FLOAT32,
        (*LARGE, *FLOAT32_ONLY),
        faster_than_peers,
        least=1,
        beside=Kind.PEER,
    ),
    Bound(
        "ModelEma: times as fast as the fastest peer",
        FLOAT32,
        EVERY,
        classic_faster_than_peers,
        least=1,
        beside=Kind.PEER,
    ),
    Bound("ModelEma: times as fast as the seed's formula", FLOAT32, EVERY, classic_faster_than_seed, least=3),
    Bound("times as fast as the fastest peer", MIXED, SMALL, faster_than_peers, least=30, beside=Kind.PEER),
    Bound("times as fast as the fastest peer", MIXED, ("vit", "gpt2"), faster_than_peers, least=2, beside=Kind.PEER),
    Bound("of the limit's time", MIXED, LARGE, of_the_limit, most=1.2, beside=Kind.LIMIT),
    Bound("of its bytes' time", STOCHASTIC, LARGE, of_its_bytes, most=2),
    Bound("of plain's time", COMPENSATED, LARGE, compensated, most=1.5),
    Bound("2 profiles: of two averages' time", PROFILES, ("resnet50", "vit"), two_profiles, most=0.9),
    Bound("4 profiles: of four averages' time", PROFILES, ("resnet50", "vit"), four_profiles, most=0.8),
)

BILLION = ("llama-1b",)
GPU_BOUNDS = (
    Bound("times as fast as timm ModelEmaV3", FLOAT32, SMALL, times_timm, least=20),
    Bound("percent of the copy rate", FLOAT32, BILLION, percent_of_the_limit, least=90),
    Bound("percent of the copy rate", MIXED, BILLION, percent_of_the_limit, least=90),
    Bound("of its bytes at the copy rate", STOCHASTIC, BILLION, of_the_limit, most=1.15),
    Bound("of its bytes at the copy rate", COMPENSATED, BILLION, compensated_of_the_limit, most=1.15),
    Bound("2 profiles: of two averages' time", PROFILES, BILLION, two_profiles, most=0.88),
    Bound("4 profiles: of four averages' time", PROFILES, BILLION, four_profiles, most=0.8),
)


def verdicts(measurements: Iterable[Measurement]) -> list[Verdict]:
    """In the order of the bounds; none where only some contenders were timed."""
    found: list[Verdict] = []
    timed = {(each.device, each.suite.name, each.shape.name): each for each in measurements}
    for device, bounds in (("cpu", CPU_BOUNDS), ("cuda", GPU_BOUNDS)):
        for bound in bounds:
            for shape in bound.shapes:
                measurement = timed.get((device, bound.suite.name, shape))
                value = bound.value(measurement) if measurement else None
                if measurement and value is not None:
                    found.append(verdict(bound, measurement, value))
    return found


def verdict(bound: Bound, measurement: Measurement, value: float) -> Verdict:
    beside = measurement.fastest(bound.beside) if bound.beside else None
    return Verdict(
        what=bound.what,
        suite=bound.suite.name,
        shape=measurement.shape.title,
        bound=str(bound),
        value=value,
        reached=bound.reached(value),
        beside=beside.contender.name if beside else "",
    )
