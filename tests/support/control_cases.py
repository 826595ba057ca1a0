"""Growth and verdicts in device memory, and what is done where the kernel in Triton fails; run as `triton_cases` is."""

import itertools
import math

import pytest
import torch

from polyak.kernels import Plan, Row, plain, rounding
from polyak.kernels.gpu import launch
from polyak.kernels.gpu.control import Control
from polyak.kernels.gpu.launch import SettledCopies, Triton, can_copy
from triton_cases import (
    DEVICE,
    FORMS,
    LAYOUTS,
    SOURCES,
    assert_same,
    bits,
    clone,
    expected,
    make_row,
    make_rows,
    pytestmark,
)

__all__ = ["TestControl", "TestFallback", "pytestmark"]


def weight_of(growth):
    """As the host computes it."""
    return -math.expm1(-growth)


def control_for(rows, **more):
    return Control(len(rows[0].averages), device=DEVICE, seed=7, **more)


class TestControl:
    """Growth on the device, and steps that are skipped."""

    growths = ((0.1, float("inf")), (0.3, 0.01), (0.05, 0.0), (1e-5, 1e-3), (40.0, 0.2))
    bad_steps = (1, 3)

    def replay(self, rows, spoil):
        """Five updates, two of them bad, against the same averages updated three times with the sums."""
        twins = [clone(row) for row in rows]
        kernel, control = Triton(rows), control_for(rows)
        pending = [0.0, 0.0]
        number = 0
        for step, growths in enumerate(self.growths):
            bad = step in self.bad_steps
            before = [bits(t) for row in rows for t in row.tensors[1:]]
            restore = spoil(rows, bad)
            control.add(growths)
            kernel.find_bad(control)
            kernel.run_pending(control)
            restore()
            pending = [one + other for one, other in zip(pending, growths, strict=True)]
            assert kernel.bad_names() == ([rows[3].name] if bad else [])
            if bad:
                assert all(map(torch.equal, before, (bits(t) for row in rows for t in row.tensors[1:])))
                assert control.read() == (pending, number)
                continue
            number += 1
            right = [expected(row, list(map(weight_of, pending)), rounding.step_key(7, number)) for row in twins]
            for row, twin, tensors in zip(rows, twins, right, strict=True):
                assert_same(row, tensors, step)
                for mine, other in zip(twin.tensors[1:], tensors, strict=True):
                    mine.copy_(other)
            pending = [0.0, 0.0]
            assert control.read() == ([0.0, 0.0], number)
        control.note_skipped()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        assert (number, control.num_skipped()) == (3, 2)

    @pytest.mark.protects
    @pytest.mark.parametrize("value", [float("nan"), -float("inf")])
    def test_a_bad_source_skips_and_growth_stays_pending(self, value):
        def spoil(rows, bad):
            source = rows[3].source.view(-1)
            kept = source.clone()
            if bad:
                source[-1] = value
            return lambda: source.copy_(kept)

        self.replay(make_rows("odd", profiles=2), spoil)

    @pytest.mark.protects
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_finds_what_is_not_finite_anywhere(self, value):
        rows = [row for row in make_rows("odd", "unaligned") if row.mode is plain]
        largest = {dtype: torch.finfo(dtype).max for dtype in SOURCES}
        for row in rows:
            row.source.fill_(-largest[row.source.dtype])
        kernel, control = Triton(rows), control_for(rows)
        kernel.find_bad(control)
        assert not int(control.flag)
        for row, place in itertools.product(rows, (0, 29, -1)):
            row.source[place] = value
            kernel.find_bad(control)
            assert int(control.flag)
            assert kernel.bad_names() == [row.name]
            control.flag.zero_()
            row.source[place] = 1.0

    def test_nothing_pending_changes_nothing_and_is_not_counted(self):
        rows = make_rows("odd")
        before = [bits(row.averages[0]) for row in rows]
        kernel, control = Triton(rows), control_for(rows)
        kernel.run_pending(control)
        assert all(map(torch.equal, before, (bits(row.averages[0]) for row in rows)))
        assert control.read() == ([0.0], 0)

    def test_goes_on_where_another_was(self):
        (row,) = rows = [make_row(torch.randn(60, device=DEVICE), FORMS[2])]
        right = expected(row, [weight_of(0.2)], rounding.step_key(7, 41))
        control = control_for(rows, pending=[0.15], number=40)
        assert control.read() == ([0.15], 40)
        control.add([0.05])
        Triton(rows).run_pending(control)
        assert_same(row, right)
        assert control.read() == ([0.0], 41)

    @pytest.mark.protects
    def test_copies_are_left_out_with_the_update(self):
        dtypes = [torch.bool, torch.uint8, torch.int16, torch.bfloat16, torch.float32, torch.int64, torch.complex128]
        sources = [
            layout(torch.arange(60, device=DEVICE).view(6, 10).to(dtype))
            for dtype, layout in itertools.product(dtypes, LAYOUTS.values())
        ]
        sources.append(torch.arange(3000, device=DEVICE))
        targets = [torch.zeros_like(source) for source in sources]
        copies, control = SettledCopies(targets, sources), Control(1, device=DEVICE)
        kernel = Triton([make_row(torch.ones(4, device=DEVICE), FORMS[0])])
        for is_bad, is_due in ((True, True), (False, False)):
            control.flag.fill_(is_bad)
            if is_due:
                control.add([0.1])
            kernel.run_pending(control)
            copies.run(control)
            assert not any(target.any() for target in targets)
        control.add([0.1])
        kernel.run_pending(control)
        copies.run(control)
        assert all(map(torch.equal, targets, sources))

    def test_which_copies_are_of_plain_memory(self):
        one = torch.zeros(4, 6, device=DEVICE)
        assert can_copy(one, one.clone())
        assert not can_copy(one, one.double())
        assert not can_copy(one, torch.zeros(6, 4, device=DEVICE).t())
        assert not can_copy(one[:, 1:], one[:, 1:])
        SettledCopies([], []).run(Control(1, device=DEVICE))


class TestFallback:
    """Where the kernel does not work, torch's operations do."""

    def plan(self, monkeypatch, run):
        monkeypatch.setattr(Triton, "run", run)
        launch.works_on.cache_clear()
        rows = [Row("x", torch.ones(4, device=DEVICE), (torch.zeros(4, device=DEVICE),))]
        try:
            return Plan(rows, kernels=["triton", "staged"]).groups[0].kernel
        finally:
            launch.works_on.cache_clear()

    def test_an_error_of_the_compiler(self, monkeypatch):
        def run(*_):
            raise RuntimeError("no such instruction")

        with pytest.warns(UserWarning, match=r"not used on .* \(RuntimeError: no such instruction\)"):
            assert self.plan(monkeypatch, run) == "staged"

    @pytest.mark.protects
    def test_other_results(self, monkeypatch):
        with pytest.warns(UserWarning, match=r"its results are not those of torch's operations"):
            assert self.plan(monkeypatch, lambda *_: None) == "staged"

    def test_none(self, monkeypatch):
        assert self.plan(monkeypatch, Triton.run) == "triton"
