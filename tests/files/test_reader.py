"""Numbers that are read a stretch at a time, against those that torch wrote."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import polyak
from polyak.files.containers import Between, Pieced, Reader, Span, Stored, open_content
from polyak.files.containers.reader import _MAX_OPEN
from polyak.files.containers.stored import dense_stride
from polyak.files.dtypes import DTYPES


def plain(path, shape, *, dtype="int32", start=0):
    return Stored(dtype, shape, dense_stride(shape), start, Span(path, 0, path.stat().st_size))


@pytest.fixture
def numbers(tmp_path):
    """A file of the numbers from 0 on, and what is in it."""
    found = np.arange(10_000, dtype="<i4")
    found.tofile(tmp_path / "x")
    return tmp_path / "x", found


@pytest.mark.parametrize("dtype", [name for name in DTYPES if hasattr(torch, name)])
def test_every_dtype_as_torch_has_it(dtype, tmp_path):
    every = torch.arange(256).to(torch.uint8)
    every = every % 2 if dtype == "bool" else every
    expected = every.view(getattr(torch, dtype)).reshape(4, -1)
    torch.save({"contiguous": expected, "transposed": expected.T}, tmp_path / "x.pt")
    tree = open_content(tmp_path / "x.pt").tree
    assert DTYPES[dtype].num_bytes == expected.element_size()
    with Reader() as reader:
        for name, tensor in (("contiguous", expected), ("transposed", expected.T)):
            raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            assert reader.read(tree[name]) == raw
            found = torch.from_numpy(np.array(reader.array(tree[name]), order="C"))
            same = tensor.float() if DTYPES[dtype].numpy is None else tensor
            torch.testing.assert_close(found, same, rtol=0, atol=0, equal_nan=True, check_dtype=dtype != "uint16")


class TestParts:
    def test_regions(self, numbers):
        path, every = numbers
        leaf, whole = plain(path, (100, 100)), every.reshape(100, 100)
        region = ((3, 50), (7, 9))
        with Reader() as reader:
            assert (reader.array(leaf, region) == whole[3:50, 7:9]).all()
            assert reader.read(leaf, region) == whole[3:50, 7:9].tobytes()
            assert reader.read(leaf, ((3, 3), (0, 100))) == b""
            assert reader.array(leaf, ((3, 3), (0, 100))).shape == (0, 100)

    def test_pieces_have_bytes_too(self, numbers):
        path, every = numbers
        whole = every[:200].reshape(20, 10)
        leaf = Pieced("int32", (20, 10), (((0, 0), plain(path, (5, 10))), ((5, 0), plain(path, (15, 10), start=50))))
        with Reader() as reader:
            assert reader.read(leaf) == whole.tobytes()
            assert reader.read(leaf, ((4, 7), (2, 3))) == whole[4:7, 2:3].tobytes()
            assert b"".join(reader.stretches(leaf, 64)) == whole.tobytes()

    def test_between_is_computed(self, numbers):
        path, every = numbers
        one, two = plain(path, (8,)), plain(path, (8,), start=100)
        with Reader() as reader:
            assert (reader.array(Between(one, two, 0.5)) == every[:8] + 50.0).all()

    @pytest.mark.parametrize("shape", [(10_000,), (100, 100), (), (0, 3)])
    def test_stretches_are_bounded_and_all(self, numbers, shape):
        path, every = numbers
        with Reader() as reader:
            found = list(reader.stretches(plain(path, shape), 1000))
        assert b"".join(found) == every[: int(np.prod(shape))].tobytes()
        assert all(0 < len(stretch) <= 1000 for stretch in found)


@pytest.mark.protects
@pytest.mark.parametrize("num_files", [1, 2 * _MAX_OPEN])
def test_two_threads_use_one_reader(num_files, tmp_path):
    """The same file; and more files than are kept open, so that each thread closes those that the other one reads."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    leaves = []
    for number in range(num_files):
        np.arange(number, number + 1000, dtype="<i4").tofile(tmp_path / str(number))
        leaves.append(plain(tmp_path / str(number), (1000,)))
    wrong, begin = [], threading.Barrier(2)

    def read(order):
        begin.wait()
        try:
            for number in order:
                expected = np.arange(number, number + 1000, dtype="<i4")
                if b"".join(reader.stretches(leaves[number], 64)) != expected.tobytes():
                    wrong.append(number)
        except BaseException as error:
            wrong.append(error)

    everything = [*range(num_files)] * (512 // num_files)
    with Reader() as reader:
        threads = [threading.Thread(target=read, args=(order,)) for order in (everything, everything[::-1])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    sys.setswitchinterval(before)
    assert wrong == []


def test_files_are_closed(tmp_path, numbers):
    path, _ = numbers
    fds = "/proc/self/fd"
    if not sys.platform.startswith("linux"):
        pytest.skip("needs /proc")
    with Reader() as reader:
        reader.read(plain(path, (3,)))
        during = [os.path.realpath(f"{fds}/{fd}") for fd in os.listdir(fds)]
    after = [os.path.realpath(f"{fds}/{fd}") for fd in os.listdir(fds)]
    assert str(path.resolve()) in during
    assert str(path.resolve()) not in after


def test_a_file_that_has_become_shorter(numbers):
    path, _ = numbers
    leaf = plain(path, (10_000,))
    path.write_bytes(path.read_bytes()[:-4])
    with Reader() as reader, pytest.raises(polyak.FileFormatError, match="x' has become shorter since it was opened"):
        reader.read(leaf)


def test_counters_are_read_without_numpy(tmp_path):
    torch.save({"module.w": torch.ones(2), "n_averaged": torch.tensor(7)}, tmp_path / "x.pt")
    code = (
        f"import sys; from polyak.files.layouts import examine; found = examine({str(tmp_path / 'x.pt')!r});"
        "print(found.counters, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'n_averaged': 7} False"
