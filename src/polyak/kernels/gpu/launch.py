"""Launches of the Triton kernels: every average of many tensors in one, and copies that the device decides about."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from polyak.errors import outside
from polyak.kernels.choice import is_interpreted
from polyak.kernels.eager import Staged
from polyak.kernels.modes import MODES
from polyak.kernels.pieces import is_dense
from polyak.kernels.row import Row

from .control import Control
from .encoding import AVERAGE_UNIT, COPIES, LEAVES, digits
from .table import BLOCK, fits, make_table, strides

# The oldest that Triton makes code for.
_MIN_CAPABILITY = (8, 0)
# Four warps take a block of 1024 elements with two accesses of 16 bytes a thread and tensor. No product is fused with a
# sum but where the kernel says so.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@functools.cache
def works_on(device: torch.device) -> bool:
    """Whether the kernel runs on a device with the bits of torch's operations; where it does not, that is said once."""
    problem = _problem_on(device)
    if problem:
        warnings.warn(
            f"polyak's kernel in Triton is not used on {device} ({problem}); torch's own operations do the same, more "
            "slowly",
            stacklevel=outside(),
        )
    return not problem


def _problem_on(device: torch.device) -> str:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _MIN_CAPABILITY:
        return "Triton makes no code for its compute capability"
    try:
        import_module("triton")
        mine, others = _samples(device), _samples(device)
        Triton(mine).run([0.25], 1)
        for row in others:
            Staged([row]).run([0.25], 1)
        same = all(
            torch.equal(one, other)
            for row, twin in zip(mine, others, strict=True)
            for one, other in zip(row.tensors, twin.tensors, strict=True)
        )
        return "" if same else "its results are not those of torch's operations"
    except Exception as error:  # whatever a compiler or a driver raises
        return f"{type(error).__name__}: {error}"


def _samples(device: torch.device) -> list[Row]:
    """A row of each mode."""
    source = torch.arange(-20.0, 20.0, device=device) / 7
    rows: list[Row] = []
    for mode in MODES:
        average = torch.full_like(source, 0.3, dtype=mode.in_triton[0])
        beside = mode.beside(average)
        rows.append(Row("", source, (average,), mode, () if beside is None else (beside.fill_(99),), mode.key("")))
    return rows


def is_supported(row: Row) -> bool:
    """Whether the kernel can update these averages from this source, here."""
    device = row.source.device
    return device.type == ("cpu" if is_interpreted() else "cuda") and fits(row) and works_on(device)


class Triton:
    """A table in device memory, made once; a launch goes through it at each update.

    `run` and `run_pending` allocate nothing on the device and wait for nothing.

    Args:
        rows: those that fit, all on one device and with as many averages each. Their tensors must stay where they are.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        assert all(map(fits, rows))
        self._rows = tuple(rows)
        self.device = rows[0].source.device
        self._table = table = make_table(rows)
        self._grid = (len(table.chunks),)
        self._bad_rows = torch.zeros(len(rows), dtype=torch.int32, device=self.device)
        # Triton is imported by the first plan that needs it, and not with the package.
        self._update: Any = import_module("polyak.kernels.gpu.update")
        self._skip: Any = import_module("polyak.kernels.gpu.skip")
        self._constants = {
            "KINDS": tuple(map(digits, table.kinds)),
            "PROFILES": table.num_profiles,
            "BLOCK": table.block,
            "INTERPRETED": is_interpreted(),
        }

    def run(self, weights: Sequence[float], step: int) -> None:
        """Moves the averages of each column towards the sources, with one weight a column."""
        if not self._grid[0]:
            return
        encoded = tuple(map(_encoded, weights))
        with here(self.device):
            self._update.update[self._grid](
                self._table.rows, self._table.chunks, step, encoded, **self._constants, **OPTIONS
            )

    def find_bad(self, control: Control) -> None:
        """Raises the flag of the control where a source holds a NaN or an infinity."""
        if not self._grid[0]:
            return
        with here(self.device):
            self._skip.find_bad[self._grid](
                self._table.rows,
                self._table.chunks,
                control.flag,
                self._bad_rows,
                SOURCES=tuple(map(digits, sorted({kind % AVERAGE_UNIT for kind in self._table.kinds}))),
                PROFILES=self._table.num_profiles,
                BLOCK=self._table.block,
                **OPTIONS,
            )

    def bad_names(self) -> list[str]:
        """The names of the rows in which `find_bad` found something since this was asked last; waits for the device."""
        bad = [bool(flag) for flag in self._bad_rows.cpu()]
        self._bad_rows.zero_()
        return list(dict.fromkeys(row.name for row, is_bad in zip(self._rows, bad, strict=True) if is_bad))

    def run_pending(self, control: Control) -> None:
        """Applies the growth that is pending where an update is due, unless the flag is raised; lowers the flag."""
        torch.expm1(control.minus_pending, out=control.minus_weights)
        num_profiles = len(control.weights)
        with here(self.device):
            self._skip.settle[(1,)](
                control.minus_weights,
                control.minus_pending,
                control.flag,
                control.counts,
                control.weights,
                PROFILES=num_profiles,
                SIZE=1 << (num_profiles - 1).bit_length(),
                num_warps=1,
            )
            if self._grid[0]:
                self._update.update_settled[self._grid](
                    self._table.rows,
                    self._table.chunks,
                    control.counts,
                    control.weights,
                    **self._constants,
                    **OPTIONS,
                )


def here(device: torch.device) -> AbstractContextManager[Any]:
    """Where Triton launches: it takes the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _encoded(weight: float) -> float:
    """The weight as the kernel takes it."""
    return {0.0: LEAVES, 1.0: COPIES}.get(weight, float(weight))


class SettledCopies:
    """Copies each source into its target in one launch, unless the last verdict was that the step was bad.

    Args:
        targets: what is written; they must stay where they are.
        sources: such that `can_copy` says so.
    """

    def __init__(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        pairs = list(zip(targets, sources, strict=True))
        assert all(can_copy(target, source) for target, source in pairs)
        self._pairs = pairs  # addresses stay valid as long as these live
        chunks = [chunk for target, source in pairs for chunk in _chunks(target, source)]
        self._sizes = tuple(sorted({size for *_, size in chunks}))
        self._device = targets[0].device if targets else torch.device("cpu")
        self._chunks = torch.tensor(chunks, dtype=torch.int64, device=self._device)
        self._kernels: Any = import_module("polyak.kernels.gpu.skip")

    def run(self, control: Control) -> None:
        """Makes all of them, after `settle`."""
        if len(self._chunks):
            with here(self._device):
                self._kernels.copy_settled[(len(self._chunks),)](
                    self._chunks, control.counts, SIZES=self._sizes, BLOCK=BLOCK
                )


def can_copy(target: Tensor, source: Tensor) -> bool:
    """Whether a copy is one of plain memory."""
    return (
        target.dtype == source.dtype
        and target.device == source.device
        and strides(target) == strides(source)
        and all(is_dense(t) and not t.is_neg() and not t.is_conj() for t in (target, source))
    )


def _chunks(target: Tensor, source: Tensor) -> list[list[int]]:
    size = min(target.element_size(), 8)
    count = target.numel() * target.element_size() // size
    return [
        [source.data_ptr() + start * size, target.data_ptr() + start * size, min(BLOCK, count - start), size]
        for start in range(0, count, BLOCK)
    ]
