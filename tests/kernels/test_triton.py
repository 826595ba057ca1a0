"""The kernel in Triton, as far as it can be tested without a GPU: its table, how it is chosen, and all of its cases in
Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from polyak.kernels import Plan, Row, stochastic
from polyak.kernels.gpu import launch
from polyak.kernels.gpu.encoding import COUNT_MASK, COUNT_SHIFT, KIND_SHIFT, ROW_MASK, SOURCE_UNIT, VECTOR_SIZE
from polyak.kernels.gpu.table import BLOCK, fits, make_chunks, make_table

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("cases", ["triton_cases.py", "control_cases.py", "device_cases.py"])
def test_all_cases_in_the_interpreter(cases):
    """In a process of its own: Triton has to know it before it is imported, and other tests may import it."""
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(SUPPORT / cases)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=SUPPORT.parents[1],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr


def row_on_meta(elements, *, source=torch.float32, average=torch.float32, **more):
    """A row without memory, at address 0."""
    tensor = torch.empty(elements, dtype=source, device="meta")
    return Row("x", tensor, (torch.empty(elements, dtype=average, device="meta"),), **more)


@pytest.mark.parametrize("first", [0, 5, 2**33 - 1000, 2**34 - 1])
@pytest.mark.parametrize("elements", [1, 3, 1024, 1030, 8 * BLOCK, 2**31 + 70, 5 * 2**32 + 5])
def test_chunks_cover_each_element_once_and_cross_no_multiple_of_two_to_the_33(elements, first):
    row = row_on_meta(elements, source=torch.bfloat16, average=torch.bfloat16, mode=stochastic, key=1, first=first)
    table = make_chunks([row], 8 * BLOCK)
    starts, counts = table[:, 0], table[:, 1] >> COUNT_SHIFT & COUNT_MASK
    assert int(starts[0]) == 0
    assert torch.equal(starts[1:], (starts + counts)[:-1])
    assert int(starts[-1] + counts[-1]) == elements
    assert int(counts.min()) > 0
    assert int(counts.max()) <= 8 * BLOCK
    assert torch.equal((starts + first) >> 33, (starts + first + counts - 1) >> 33)
    vectors = table[(table[:, 1] >> KIND_SHIFT) % SOURCE_UNIT == 1]
    assert not (vectors[:, 0] % VECTOR_SIZE).any()
    assert not ((vectors[:, 0] + first) % 2).any()
    assert not ((vectors[:, 1] >> COUNT_SHIFT & COUNT_MASK) % VECTOR_SIZE).any()


def test_small_tensors_are_one_chunk_each():
    rows = [row_on_meta(elements) for elements in (1024, 10, 0, 8 * BLOCK + 2)]
    found = [
        (start, packed & ROW_MASK, packed >> COUNT_SHIFT & COUNT_MASK, bool((packed >> KIND_SHIFT) % SOURCE_UNIT))
        for start, packed in make_chunks(rows, 8 * BLOCK).tolist()
    ]
    assert found == [
        (0, 0, 1024, True),
        (0, 1, 10, False),
        (0, 3, 8 * BLOCK, True),
        (8 * BLOCK, 3, 2, False),
    ]


def test_small_models_have_as_many_chunks_as_there_is_work_for():
    room = torch.zeros(1 << 20)
    assert len(make_table([Row("x", room, (room.clone(),))]).chunks) == (1 << 20) // BLOCK


@pytest.mark.parametrize("other", [torch.float64, torch.float16, torch.complex64], ids=str)
def test_forms_that_it_does_not_know(other):
    assert fits(row_on_meta(4))
    assert not fits(row_on_meta(4, average=other))


class TestChoice:
    rows = (Row("x", torch.ones(2).half(), (torch.zeros(2),)),)

    def test_not_on_the_cpu(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(ValueError, match=r"no kernel of 'triton' fits 'x', torch.float16 on cpu into"):
            Plan(self.rows, kernels=["triton"])
        assert "triton" not in [group.kernel for group in Plan(self.rows).groups]

    def test_the_interpreter_is_for_those_who_ask_for_it(self, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert "triton" not in [group.kernel for group in Plan(self.rows).groups]

    def test_where_triton_cannot_be_imported_this_is_said_once(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        launch.works_on.cache_clear()
        try:
            with pytest.warns(UserWarning, match="kernel in Triton is not used on cpu .ModuleNotFoundError") as caught:
                plans = [Plan(self.rows, kernels=["triton", "staged"]) for _ in range(2)]
            assert len(caught) == 1
            assert [group.kernel for plan in plans for group in plan.groups] == ["staged", "staged"]
        finally:
            launch.works_on.cache_clear()


@pytest.mark.protects
def test_the_package_and_plans_without_gpu_never_import_triton():
    code = (
        "import sys, torch, polyak; polyak.WeightAverage(torch.nn.Linear(2, 2)).update();"
        "print([name for name in sys.modules if name.split('.')[0] == 'triton'])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
