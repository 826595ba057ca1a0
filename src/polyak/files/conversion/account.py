"""The account of a conversion."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What `convert` did.

    Attributes:
        path: what was written.
        to: its layout.
        input: what was read.
        format: its layout.
        average: the name that the average has there.
        num_tensors: of the average, in what was written.
        num_bytes: of the average, in what was written.
        notes: what a user should know: what was assumed, filled in or lost.
    """

    path: Path
    to: str
    input: Path
    format: str
    average: str
    num_tensors: int
    num_bytes: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        size = f"{self.num_tensors} tensors, {self.num_bytes:,} bytes"
        lines = [f"{self.input}: {self.format}, average {self.average!r}", f"{self.path}: {self.to}, {size}"]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])
