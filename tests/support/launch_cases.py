"""Launches of the kernels in Triton as on an H100, up to the driver, which `libcuda.c` replaces.

`test_triton_launch` builds `libcuda.c`, and runs this file in a process that loads it as NVIDIA's driver. All else is
as on a GPU: how arguments become a variant of a kernel, its compilation to code for the GPU, and the launcher in C. The
tensors are on the CPU, and no kernel touches them.
"""

import ctypes
import struct

import pytest
import torch

from polyak.kernels import Row, compensated, rounding, stochastic
from polyak.kernels.gpu.control import Control
from polyak.kernels.gpu.launch import OPTIONS, SettledCopies, Triton

# pytest looks into every file for examples, also where Triton is not installed.
nvidia = pytest.importorskip("triton.backends.nvidia.driver")
runtime = pytest.importorskip("triton.runtime")
skip = pytest.importorskip("polyak.kernels.gpu.skip")
update = pytest.importorskip("polyak.kernels.gpu.update")


class StandIn(nvidia.CudaDriver):
    """Triton's own driver, except for what it asks torch about the GPU."""

    def __init__(self):
        super().__init__()
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.get_device_capability = lambda device: (9, 0)


class Launch(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 64),
        ("blocks", ctypes.c_uint),
        ("threads", ctypes.c_uint),
        ("arguments", ctypes.c_ulonglong * 5),
    )


class Cuda:
    """What the stand-in has noted."""

    def __init__(self):
        library = ctypes.CDLL("libcuda.so.1")
        self._launches = (Launch * 64).in_dll(library, "launches")
        self._count = ctypes.c_int.in_dll(library, "num_launches")

    def launches(self):
        """The launches since the last call."""
        found = [(each.name.decode(), each.blocks, each.threads) for each in self._launches[: self._count.value]]
        self._count.value = 0
        return found

    def arguments(self):
        """The arguments of the last launch, an update."""
        return list(self._launches[self._count.value - 1].arguments)


@pytest.fixture(scope="module")
def cuda():
    runtime.driver.set_active(StandIn())
    return Cuda()


@pytest.fixture
def kernel(cuda):
    """A kernel that has not been launched yet, with nothing compiled in this process."""
    cuda.launches()
    for function in (skip.find_bad, skip.settle, skip.copy_settled, update.update, update.update_settled):
        function.device_caches.clear()
    return Triton(rows())


def rows():
    """A plain, a compensated and a stochastic average, two of each."""
    source = torch.zeros(3000)
    dtypes = (torch.float32, torch.float32, torch.bfloat16)
    averages = [tuple(torch.zeros_like(source, dtype=dtype) for _ in range(2)) for dtype in dtypes]
    seconds = tuple(torch.zeros_like(source, dtype=torch.int16) for _ in range(2))
    return [
        Row("plain", source, averages[0]),
        Row("compensated", source, averages[1], compensated, seconds),
        Row("stochastic", source, averages[2], stochastic, key=1),
    ]


def variants(function):
    """The variants of a kernel that have been compiled."""
    compiled, *_ = function.device_caches[0]
    return list(compiled.values())


def as_float(argument):
    return struct.unpack("<f", (argument & 0xFFFFFFFF).to_bytes(4, "little"))[0]


def test_any_step_is_passed_whole_to_one_variant(cuda, kernel):
    for step in (0, 1, 16, 2**31, 2**32, 2**63, 2**64 - 1, rounding.step_key(7, 3)):
        kernel.run([0.25, 0.5], step)
        assert cuda.arguments()[:3] == [kernel._table.rows.data_ptr(), kernel._table.chunks.data_ptr(), step]
        assert cuda.launches() == [("update", len(kernel._table.chunks), 128)]
    assert len(variants(update.update)) == 1


def test_any_weights_are_passed_to_one_variant(cuda, kernel):
    for weights, passed in (
        ([0.25, 0.5], [0.25, 0.5]),
        ([0.0, 1.0], [-1.0, 2.0]),
        ([1.0, 0.0], [2.0, -1.0]),
        ([0, 1], [-1.0, 2.0]),
        ([1e-50, 1 - 1e-12], [0.0, 1.0]),
    ):
        kernel.run(weights, 1)
        assert [as_float(argument) for argument in cuda.arguments()[3:]] == passed
    assert len(variants(update.update)) == 1


def test_the_options_reach_the_compiler(kernel):
    kernel.run([0.25, 0.5], 1)
    (compiled,) = variants(update.update)
    assert {name: getattr(compiled.metadata, name) for name in OPTIONS} == OPTIONS
    assert compiled.metadata.target.arch == 90
    assert compiled.asm["cubin"].startswith(b"\x7fELF")
    assert compiled.n_spills == 0


def test_updates_that_a_device_decides_about(cuda, kernel):
    control = Control(2, device=torch.device("cpu"), seed=7)
    copies = SettledCopies([torch.zeros(5), torch.zeros(3, dtype=torch.bool)], [torch.zeros(5), torch.ones(3).bool()])
    for _ in range(2):
        control.add([0.1, 0.2])
        kernel.find_bad(control)
        kernel.run_pending(control)
        copies.run(control)
        num_chunks = len(kernel._table.chunks)
        assert cuda.launches() == [
            ("find_bad", num_chunks, 128),
            ("settle", 1, 32),
            ("update_settled", num_chunks, 128),
            ("copy_settled", 2, 128),
        ]
    for function in (skip.find_bad, skip.settle, update.update_settled, skip.copy_settled):
        assert len(variants(function)) == 1


def test_a_kernel_is_compiled_again_for_other_kinds_alone(kernel):
    for its_rows, expected in ((rows(), 1), (rows(), 1), (rows()[:1], 2), (rows()[1:], 3)):
        Triton(its_rows).run([0.25, 0.5], 1)
        assert len(variants(update.update)) == expected
