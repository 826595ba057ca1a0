"""What is said of a file, as plain data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, cast

from polyak.files.containers import Verification
from polyak.files.layouts import Note

_MAX_INTEGER = 1 << 63


# Bytes of tensors that are read for an account at most, about, unless more are asked for.
BUDGET = 1 << 26


@dataclass(frozen=True, slots=True)
class WeightSet:
    """One average, or the weights that are trained.

    Attributes:
        name: of the average; "raw" for the weights that are trained.
        is_average: which of the two it is.
        where: its places in the file, as in the table of layouts; none where it is in another file.
        files: that its bytes lie in, beginning at the folder of the file.
        num_tensors: names.
        num_distinct: tensors, those that several names share counted once.
        num_numbers: of the distinct tensors that are of floating point or complex: parameters, and such buffers.
        num_bytes: of the distinct tensors.
        dtypes: how many distinct tensors are of each.
        ties: names that are one tensor.
    """

    name: str
    is_average: bool
    where: tuple[str, ...]
    files: tuple[str, ...]
    num_tensors: int
    num_distinct: int
    num_numbers: int
    num_bytes: int
    dtypes: dict[str, int]
    ties: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class ProfileAccount:
    """How an average was made.

    Attributes:
        average: its name.
        profile: as text.
        half_life: in units of the time axis, where it is known.
        mean_age: of the weights in it, likewise.
    """

    average: str
    profile: str
    half_life: float | None
    mean_age: float | None


@dataclass(frozen=True, slots=True)
class Distance:
    """How far an average is from the weights that are trained: norm(average - raw) / norm(raw).

    Attributes:
        average: its name.
        module: the part of the model; None for all of it.
        relative: the distance; NaN where a number is not finite, infinite where the raw weights are zero.
        num_numbers: that it is about.
        num_read: how many of them were read; it is an estimate where these are fewer.
    """

    average: str
    module: str | None
    relative: float
    num_numbers: int
    num_read: int


@dataclass(frozen=True, slots=True)
class NonFiniteTensor:
    """A tensor with NaN or infinite values among those read."""

    weights: str
    name: str
    num_nan: int
    num_infinite: int


@dataclass(frozen=True, slots=True)
class Other:
    """What is in a file beside the averages and the weights."""

    name: str
    kind: str
    num_tensors: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Reading:
    """How much of the averages and weights was read.

    Attributes:
        num_numbers: of floating point or complex in the averages and weights.
        num_read: how many of them were looked at: all, or a few stretches of every tensor.
    """

    num_numbers: int
    num_read: int

    @property
    def is_exact(self) -> bool:
        """Whether everything was looked at."""
        return self.num_numbers == self.num_read


@dataclass(frozen=True, slots=True)
class Account:
    """All that is said of a file.

    Attributes:
        path: as it was given.
        kind: torch, safetensors, folder or distributed.
        format: the name of its layout.
        writer: the library that writes such files.
        num_bytes: of the file or folder.
        sets: the averages, and last the weights that are trained, where they are there.
        counters: how far the training was.
        decay: of the average, where the file says it.
        half_life: in updates, of that decay.
        mean_age: of the weights in such an average, likewise.
        profiles: how each average was made, where the file says it.
        has_names: whether the averages go by names; if not, by positions.
        missing: names that the averages lack.
        notes: what should be known of it.
        others: what else is in it.
        metadata: keys of what is written beside the tensors.
        reading: how much of the numbers the distances and the search for non-finite ones are about.
        distances: of each average, whole and by module; none where there are no raw weights.
        nonfinite: tensors with NaN or infinity.
        verification: where it was asked for.
    """

    path: str
    kind: str
    format: str
    writer: str
    num_bytes: int
    sets: tuple[WeightSet, ...]
    counters: dict[str, int | float]
    decay: float | None
    half_life: float | None
    mean_age: float | None
    profiles: tuple[ProfileAccount, ...]
    has_names: bool
    missing: tuple[str, ...]
    notes: tuple[Note, ...]
    others: tuple[Other, ...]
    metadata: tuple[str, ...]
    reading: Reading
    distances: tuple[Distance, ...]
    nonfinite: tuple[NonFiniteTensor, ...]
    verification: Verification | None


def plain(account: Account) -> dict[str, Any]:
    """The account as JSON can hold it: NaN and infinity become null, integers beyond 64 bits strings.

    Example:
        >>> plain(Distance("average", None, math.nan, 3, 3))["relative"] is None
        True
    """
    return cast("dict[str, Any]", _plain(asdict(account)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in cast("dict[str, Any]", value).items()}
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in cast("list[Any]", value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int) and abs(value) >= _MAX_INTEGER:
        return f"an integer of {value.bit_length()} bits"
    return value
