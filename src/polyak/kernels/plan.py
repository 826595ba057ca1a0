"""The plan of an update: which tensors go through which kernel, decided once and run every time.

>>> plan = Plan([Row("weight", torch.ones(2), (torch.zeros(2),))], kernels=["foreach"])
>>> print(plan)
foreach: 1 tensor, 2 elements (same dtype and device): weight
>>> plan.run([0.25])
>>> plan.rows[0].averages[0]
tensor([0.2500, 0.2500])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from polyak.errors import listed

from .choice import allowed_kernels
from .eager import Foreach, Staged
from .gpu import Triton
from .gpu import is_supported as is_for_triton
from .modes import Mode, plain
from .native import Native, is_supported, library
from .rounding import step_key
from .row import Row, real_rows

KERNELS = {"native": Native, "triton": Triton, "foreach": Foreach, "staged": Staged}

_MAX_NAMES = 4


@dataclass(frozen=True)
class _Group:
    kernel: str
    reason: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        names = ", ".join(row.name for row in self.rows[:_MAX_NAMES])
        more = f" and {len(self.rows) - _MAX_NAMES} more" if len(self.rows) > _MAX_NAMES else ""
        tensors = f"{len(self.rows)} tensor" + "s" * (len(self.rows) != 1)
        elements = sum(row.source.numel() for row in self.rows)
        modes = "".join(f"{name}, " for name in sorted({row.mode.name for row in self.rows} - {plain.name}))
        return f"{self.kernel}: {tensors}, {elements} elements ({modes}{self.reason}): {names}{more}"


class Plan:
    """How to update a list of averages from their sources.

    `native` is the kernel in C, for tensors on a CPU that fill their memory; `triton` the one for tensors on a GPU that
    do, all of them in one launch. `foreach` takes the other plain pairs that are alike in dtype and device, all in one
    call; `staged` the rest, through scratch buffers. All have the same bits.
    Averages and sources are updated in place and must not be replaced.

    Args:
        rows: what to update.
        kernels: those that may be used, the first that fits is taken. Default: all; or those that the environment
            variable POLYAK_KERNELS names, separated by commas.
        seed: of the random bits, for modes that draw.
        note: the first line, where it is printed.

    Raises:
        ValueError: a kernel is unknown, or none of them fits a tensor.
    """

    def __init__(
        self, rows: Sequence[Row], *, kernels: Sequence[str] | None = None, seed: int = 0, note: str = ""
    ) -> None:
        self.rows = tuple(rows)
        self._seed = seed
        self._note = note
        self._draws = any(row.mode.draws for row in self.rows)
        allowed = allowed_kernels(kernels)
        grouped: dict[tuple[str, str, torch.device, tuple[Mode, torch.dtype, torch.dtype] | None], list[Row]] = {}
        for row in self.rows:
            kernel, reason = _choose(row, allowed)
            average = row.averages[0]
            alike = None if kernel == "triton" else (row.mode, row.source.dtype, average.dtype)
            grouped.setdefault((kernel, reason, average.device, alike), []).append(row)
        self.groups = tuple(_Group(kernel, reason, tuple(group)) for (kernel, reason, *_), group in grouped.items())
        self._kernels = [
            KERNELS[group.kernel]([real for row in group.rows for real in real_rows(row)]) for group in self.groups
        ]

    def run(self, weights: Sequence[float], number: int = 0) -> None:
        """Updates every average.

        Args:
            weights: one for each of a row's averages.
            number: of this update, from which random bits are drawn.
        """
        step = step_key(self._seed, number) if self._draws else 0
        for kernel in self._kernels:
            kernel.run(weights, step)

    @property
    def deciding_kernel(self) -> Triton | None:
        """The kernel of all rows, where there is one that can leave it to the device whether to update."""
        only = self._kernels[0] if len(self._kernels) == 1 else None
        return only if isinstance(only, Triton) else None

    def __str__(self) -> str:
        return "\n".join([*filter(None, [self._note]), *map(str, self.groups)])


def _choose(row: Row, allowed: Sequence[str]) -> tuple[str, str]:
    source, average = row.source, row.averages[0]
    for kernel in allowed:
        if kernel == "native" and all(map(is_supported, real_rows(row))) and library() is not None:
            return kernel, "dense, on the CPU"
        if kernel == "triton" and all(map(is_for_triton, real_rows(row))):
            return kernel, f"dense, on {average.device}"
        alike = source.device == average.device and source.dtype == average.dtype
        if kernel == "foreach" and alike and row.mode is plain:
            return kernel, "same dtype and device"
        if kernel == "staged":
            other = f"{source.dtype} to {average.dtype}" if source.dtype != average.dtype else "through scratch memory"
            return kernel, f"{source.device} to {average.device}" if source.device != average.device else other
    mode = "" if row.mode is plain else f" {row.mode.name}"
    raise ValueError(
        f"no kernel of {listed(allowed)} fits {row.name!r}, {source.dtype} on {source.device} into{mode} "
        f"{average.dtype} on {average.device}; allow 'staged' too, by kernels= or POLYAK_KERNELS, which takes all"
    )
