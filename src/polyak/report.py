"""What an average did so far, and what it does to which tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyak.core import Core
from polyak.entries import Action


@dataclass(frozen=True)
class AverageReport:
    """One average.

    Attributes:
        name: of the average.
        profile: how past weights count, as text.
        mean_age: of the weights in it, in units of the time axis.
        initial_weight: how much of it is still the weights from before the first update.
        distance: norm(average - source) / norm(source) over all averaged entries.
    """

    name: str
    profile: str
    mean_age: float
    initial_weight: float
    distance: float


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
    """

    name: str
    aliases: tuple[str, ...]
    action: Action
    reason: str
    shape: tuple[int, ...]
    source_dtype: torch.dtype
    dtype: torch.dtype | None
    num_bytes: int


@dataclass(frozen=True)
class Report:
    """The state of a `WeightAverage`, for reading and for printing."""

    num_calls: int
    num_updates: int
    time: float
    averages: tuple[AverageReport, ...]
    entries: tuple[EntryReport, ...]

    @property
    def num_bytes(self) -> int:
        """What the store takes."""
        return sum(entry.num_bytes for entry in self.entries)

    def __str__(self) -> str:
        head = f"{self.num_updates} updates in {self.num_calls} calls, time {self.time:g}, {self.num_bytes:,} bytes"
        averages = [("average", "profile", "mean age", "initial weights", "distance to source")]
        averages += [
            (a.name, a.profile, f"{a.mean_age:.4g}", f"{a.initial_weight:.3g}", f"{a.distance:.3g}")
            for a in self.averages
        ]
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
        return "\n\n".join([head, _table(averages), _table(entries)])


def make_report(core: Core) -> Report:
    """Looks at a `WeightAverage`."""
    clock, store = core.clock, core.store
    raw = store.raw()
    averages: list[AverageReport] = []
    for name, profile in core.profiles.items():
        tensors = store.tensors(name)
        averaged = [(tensors[key], raw[key]) for key in store.averages[name]]
        averages.append(
            AverageReport(
                name,
                repr(profile),
                profile.mean_age(clock.profile_time),
                profile.initial_weight(clock.profile_time),
                _distance(averaged),
            )
        )
    entries: list[EntryReport] = []
    for entry in core.source.entries:
        kept = [a[entry.name] for a in store.averages.values() if entry.name in a]
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
            )
        )
    return Report(clock.num_calls, clock.num_updates, clock.time, tuple(averages), tuple(entries))


def _distance(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    apart = size = 0.0
    for average, source in pairs:
        wide = torch.complex128 if average.is_complex() else torch.float64
        reference = source.to(average.device, wide)
        apart += float((average.to(wide) - reference).abs().square().sum())
        size += float(reference.abs().square().sum())
    return (apart / size) ** 0.5 if size else float(apart > 0)


def _dtypes(entry: EntryReport) -> str:
    source = str(entry.source_dtype).removeprefix("torch.")
    kept = source if entry.dtype is None else str(entry.dtype).removeprefix("torch.")
    return source if source == kept else f"{source} in {kept}"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
