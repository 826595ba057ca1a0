"""What `read` returns: the averages of a file, and an account of what else is in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from polyak.errors import FileFormatError, listed
from polyak.profiles import Profile

from .tensors import Tensors


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The averages of a checkpoint, whichever library wrote it.

    Attributes:
        path: of the file or folder.
        format: the layout that it was read by.
        averages: tensors by the name of the average and the name in the bare model. A single one is called "average".
        raw_weights: the weights that were trained, where the file has them.
        counters: numbers that say how far the training was, by the names that the library gives them.
        decay: of the average, where the file knows it.
        profiles: of the averages, where the file knows them.
        has_names: whether the averages go by names; if not, by positions, as in the file, because nobody gave names.
        missing: names that the raw weights or the model have and an average lacks.
        notes: what else a user should know of it.
    """

    path: Path
    format: str
    averages: Mapping[str, Tensors]
    raw_weights: Tensors | None
    counters: Mapping[str, int | float]
    decay: float | None
    profiles: Mapping[str, Profile]
    has_names: bool
    missing: tuple[str, ...]
    notes: tuple[str, ...]

    def choose(self, name: str | None = None) -> str:
        """The name of an average that is there: the given one, or that of the only one.

        Raises:
            FileFormatError: there is none, or no such one, or there are several and none was given.
        """
        names = list(self.averages)
        if not names:
            raise FileFormatError(f"{str(self.path)!r} has no average, but only raw weights")
        if name is not None and name not in names:
            raise FileFormatError(f"average={name!r} is not in {str(self.path)!r}, which has {listed(names)}")
        if name is None and len(names) > 1:
            raise FileFormatError(
                f"{str(self.path)!r} has several averages, {listed(names)}; choose one by average=, or of .averages"
            )
        return names[0] if name is None else name

    @property
    def average(self) -> Tensors:
        """The average, where there is just one.

        Raises:
            FileFormatError: there is none, or several; take one of `averages`.
        """
        return self.averages[self.choose()]

    def weights(self, average: str | None = None) -> dict[str, Tensor]:
        """All of the model's tensors: the average, and the raw weights' own for what is missing in it.

        Raw weights that have no name in common with the average are those of another model, and give nothing.

        Args:
            average: its name; needed where there are several.

        Raises:
            FileFormatError: there is none, or no such one, or there are several and none was given.
        """
        chosen = self.averages[self.choose(average)]
        raw: Mapping[str, Tensor] = self.raw_weights or {}
        return {**raw, **chosen} if raw.keys() & chosen.keys() else dict(chosen)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.format}"]
        lines += [f"  average {name!r}: {tensors!r}" for name, tensors in self.averages.items()]
        lines += [] if self.raw_weights is None else [f"  raw weights: {self.raw_weights!r}"]
        lines += [f"  {name}: {value}" for name, value in self.counters.items()]
        lines += [] if self.decay is None else [f"  decay: {self.decay}"]
        lines += [f"  profile of {name!r}: {profile}" for name, profile in self.profiles.items()]
        lines += [f"  missing in the average: {listed(self.missing)}"] if self.missing else []
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])
