"""What an average did so far, and what it does to which tensor."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from polyak.errors import listed, outside
from polyak.kernels import checksums, pieces_of
from polyak.model import Action
from polyak.profiles import Profile
from polyak.ranks import sums_of_parts

from .core import Core


@dataclass(frozen=True)
class AverageReport:
    """One average.

    Attributes:
        name: of the average.
        profile: how past weights count, as text.
        decay: what the average will keep of itself in the next unit of time.
        mean_age: of the weights in it, in units of the time axis.
        initial_weight: how much of it is still the weights from before the first update.
        distance: norm(average - source) / norm(source) over all averaged entries.
        distances: the same for each part of the model, by its name.
    """

    name: str
    profile: str
    decay: float
    mean_age: float
    initial_weight: float
    distance: float
    distances: dict[str, float]


@dataclass(frozen=True)
class EntryReport:
    """One tensor.

    Attributes:
        name: canonical.
        aliases: its other names, where it is tied.
        action: average, copy or skip.
        reason: why.
        shape: of the tensor.
        source_dtype: of the tensor in the model.
        dtype: of the tensor in the store, None where it is not there.
        num_bytes: that it takes in the store, over all averages.
        stuck: averaged, and the same since the average was made or loaded, although its source moved.
    """

    name: str
    aliases: tuple[str, ...]
    action: Action
    reason: str
    shape: tuple[int, ...]
    source_dtype: torch.dtype
    dtype: torch.dtype | None
    num_bytes: int
    stuck: bool


@dataclass(frozen=True)
class Report:
    """The state of a `WeightAverage`, for reading and for printing.

    Attributes:
        num_calls: how often it was called.
        num_updates: how many of the calls were updates.
        num_skipped: how many updates were left out, because the model was not finite, or the host busy with earlier
            ones; the next took over what they were to add.
        time: of the last call, in units of the time axis.
        source_moved: whether the model has changed since the average was made, loaded or reset.
        averages: what is to be said of each average.
        entries: what is done to each tensor.
        num_staging_bytes: the host memory beside the averages through which a worker updates them there.
        watch_note: why each update checks in Python that the model's tensors are the same, which takes several times as
            long and sees less; empty if the check is made in C.
    """

    num_calls: int
    num_updates: int
    num_skipped: int
    time: float
    source_moved: bool
    averages: tuple[AverageReport, ...]
    entries: tuple[EntryReport, ...]
    num_staging_bytes: int = 0
    watch_note: str = ""

    @property
    def num_bytes(self) -> int:
        """What the averages and copies take."""
        return sum(entry.num_bytes for entry in self.entries)

    @property
    def stuck(self) -> tuple[str, ...]:
        """The names of averaged entries that never moved, although their source did."""
        return tuple(entry.name for entry in self.entries if entry.stuck)

    def __str__(self) -> str:
        why = "not finite, or the host was busy" if self.num_staging_bytes else "not finite"
        skipped = f" ({self.num_skipped} skipped: {why})" if self.num_skipped else ""
        head = f"{self.num_updates} updates{skipped} in {self.num_calls} calls, time {self.time:g}, "
        head += f"{self.num_bytes:,} bytes"
        head += f" and {self.num_staging_bytes:,} of staging memory on the host" if self.num_staging_bytes else ""
        if self.watch_note:
            head += f"\nthe check of every update is made in Python: {self.watch_note}"
        if not self.source_moved and self.num_updates:
            head += "\nthe model has not changed since the average was made: is it trained?"
        if self.stuck:
            head += f"\nnever moved, although the model did: {listed(self.stuck)}"
        averages = [("average", "profile", "decay", "mean age", "initial weights", "distance to source")]
        averages += [
            (a.name, a.profile, f"{a.decay:.6g}", f"{a.mean_age:.4g}", f"{a.initial_weight:.3g}", f"{a.distance:.3g}")
            for a in self.averages
        ]
        parts = [("distance of part", *(a.name for a in self.averages))]
        parts += [(part, *(f"{a.distances[part]:.3g}" for a in self.averages)) for part in self.averages[0].distances]
        entries = [("entry", "action", "because", "shape", "dtype", "bytes")]
        entries += [
            (
                " = ".join((e.name, *e.aliases)),
                e.action,
                e.reason,
                "x".join(map(str, e.shape)) or "scalar",
                _dtypes(e),
                f"{e.num_bytes:,}",
            )
            for e in self.entries
        ]
        return "\n\n".join([head, _table(averages), _table(parts), _table(entries)])


def make_report(core: Core, *, total: float | None = None) -> Report:
    """Looks at a `WeightAverage`; `total` is the length of the run, for a warning where an average is longer."""
    clock, store, ledger = core.clock, core.store, core.ledger()
    if total is not None and not 0 < total < math.inf:
        raise ValueError(f"total={total!r}: the length of the run is a finite time above 0")
    if total is not None:
        _warn_of_length(core.profiles, max(total - clock.start, 0.0))
    raw = store.raw()
    averages: list[AverageReport] = []
    for name, profile in core.profiles.items():
        tensors = store.tensors(name)
        squares = {key: _squares(tensors[key], raw[key]) for key in store.names}
        parts: dict[str, list[tuple[float, ...]]] = {}
        for key, sums in sums_of_parts(squares, store.lies).items():
            parts.setdefault(key.partition(".")[0], []).append(sums)
        now = clock.profile_time(ledger.since)
        averages.append(
            AverageReport(
                name,
                repr(profile),
                math.exp(-profile.growth(now, now + 1)),
                _mean_age(profile, now),
                profile.initial_weight(now),
                _relative(list(chain.from_iterable(parts.values()))),
                {part: _relative(squares) for part, squares in parts.items()},
            )
        )
    moved = _find_moved(core, raw)
    stuck = _find_stuck(core, moved)
    entries: list[EntryReport] = []
    for entry in core.source.entries:
        kept = [a[entry.name] for a in store.averages.values() if entry.name in a]
        kept += [seconds[entry.name] for seconds in store.seconds.values() if entry.name in seconds]
        kept += [store.copies[entry.name]] if entry.name in store.copies else []
        entries.append(
            EntryReport(
                entry.name,
                entry.aliases,
                entry.action,
                entry.reason,
                tuple(entry.tensor.shape),
                entry.tensor.dtype,
                kept[0].dtype if kept else None,
                sum(tensor.numel() * tensor.element_size() for tensor in kept),
                entry.name in stuck,
            )
        )
    return Report(
        num_calls=clock.num_calls,
        num_updates=ledger.made,
        num_skipped=clock.num_due - ledger.made,
        time=clock.time,
        source_moved=bool(moved),
        averages=tuple(averages),
        entries=tuple(entries),
        num_staging_bytes=core.store.num_staging_bytes,
        watch_note=core.source.watch_note,
    )


def _mean_age(profile: Profile, now: float) -> float:
    try:
        return profile.mean_age(now)
    except ValueError:
        # A profile that is known step by step has no ages between steps.
        return math.nan


def _warn_of_length(profiles: Mapping[str, Profile], total: float) -> None:
    for name, profile in profiles.items():
        left = profile.initial_weight(total)
        # What is left of the initial weights after one mean age of an exponential average.
        if left >= math.exp(-1):
            warnings.warn(
                f"average {name!r}, {profile!r}, is longer than the run of {total:g}: {100 * left:.0f} % of it will "
                "still be the weights from before the first update. Take a shorter one, debias=True, or Power()",
                stacklevel=outside(),
            )


def _find_moved(core: Core, raw: Mapping[str, Tensor]) -> set[str]:
    """Averaged entries whose source is not, bit for bit, what it was at first."""
    names = list(core.store.names)
    sums = checksums([raw[name] for name in names])
    return _on_any_rank(core, {name: found != core.first_sums[name] for name, found in zip(names, sums, strict=True)})


def _find_stuck(core: Core, moved: set[str]) -> set[str]:
    """Those of the moved entries that are still, bit for bit, what they were at first, in every average."""
    if core.num_updates == 0:
        return set()
    # One that is rounded by chance may stay where it is.
    if core.store.modes.is_stochastic:
        return set()
    stuck = set(moved)
    for profile in core.profiles:
        first = core.first_average_sums[profile]
        sums = core.average_sums(profile, sorted(stuck))
        stuck -= _on_any_rank(core, {name: found != first[name] for name, found in sums.items()})
    return stuck


def _on_any_rank(core: Core, mine: Mapping[str, bool]) -> set[str]:
    """The names of which it is so in some rank's part."""
    found = sums_of_parts({name: (float(it_is),) for name, it_is in mine.items()}, core.store.lies)
    return {name for name, (number,) in found.items() if number}


def _squares(average: Tensor, source: Tensor) -> tuple[float, float]:
    """The squared norms of average - source and of source, in float64."""
    wide = torch.complex128 if average.is_complex() else torch.float64
    apart = size = 0.0
    # A few millions of numbers at a time: whole tensors in float64 would take more memory than the averages.
    for few, its_source in zip(pieces_of(average), pieces_of(source), strict=True):
        reference = its_source.to(few.device, wide)
        apart += float((few.to(wide) - reference).abs().square().sum())
        size += float(reference.abs().square().sum())
    return apart, size


def _relative(squares: Sequence[tuple[float, ...]]) -> float:
    apart, size = (sum(column) for column in zip(*squares, strict=True))
    return math.sqrt(apart / size) if size else float(apart > 0)


def _dtypes(entry: EntryReport) -> str:
    source = str(entry.source_dtype).removeprefix("torch.")
    kept = source if entry.dtype is None else str(entry.dtype).removeprefix("torch.")
    return source if source == kept else f"{source} in {kept}"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
