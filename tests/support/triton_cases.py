"""What the kernel in Triton must do, bit for bit, on a GPU or in Triton's interpreter on the CPU.

`test_triton` runs this file by itself, in a process of its own, because Triton must be told to interpret before it is
imported; `test_gpu` takes the same tests for CUDA tensors.
"""

import dataclasses
import itertools

import pytest
import torch

from polyak.kernels import Plan, Row, compensated, rounding, stochastic
from polyak.kernels.eager import Staged
from polyak.kernels.gpu import launch, table
from polyak.kernels.gpu.launch import Triton
from polyak.kernels.modes import MODES
from polyak.kernels.row import real_rows
from reference import modes

INTERPRETED = launch.is_interpreted()
DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda")
# NaN and infinity go through numpy there.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

if INTERPRETED:
    from triton.runtime import interpreter

    _call = interpreter.InterpretedFunction.__call__

    def _call_quickly(self, *args, **kwargs):
        """At each call inside of a kernel the interpreter patches all of Triton's language again, which takes long."""
        if self.fn.__module__.startswith("polyak"):
            return self.rewrite()(*args, **kwargs)
        return _call(self, *args, **kwargs)

    interpreter.InterpretedFunction.__call__ = _call_quickly

SOURCES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = [(mode, dtype) for mode in MODES for dtype in mode.in_triton]
LAYOUTS = {
    "contiguous": lambda t: t,
    "odd": lambda t: t.flatten()[:51].clone(),
    "scalar": lambda t: t.flatten()[0].clone(),
    "empty": lambda t: t[:0].clone(),
    "transposed": lambda t: t.transpose(0, 1),
    "unaligned": lambda t: t.flatten()[1:],
    "channels last": lambda t: t.view(2, 3, 2, 5).to(memory_format=torch.channels_last),
}
WEIGHTS = [0.0, 1e-50, 1e-6, 1e-4, 0.3, 0.5, 0.7, 1 - 1e-9, 1.0]
STEP = rounding.step_key(7, 3)


def make_row(source, form, *, profiles=1, name="x", spread=1.0, **more):
    """A row of one form, with averages about the source and every second term."""
    mode, dtype = form

    def like_source(values, dtype):
        # Of the layout of the source, and as unaligned.
        room = torch.empty(source.untyped_storage().size() // source.itemsize, dtype=dtype, device=DEVICE)
        return room.as_strided(source.shape, source.stride(), source.storage_offset()).copy_(values)

    noise = [torch.randn(source.shape, device=DEVICE) * spread for _ in range(profiles)]
    averages = tuple(like_source(source.float() + part, dtype) for part in noise)
    units = [torch.randint(-(1 << 15), 1 << 15, source.shape, device=DEVICE) for _ in range(profiles)]
    beside = tuple(like_source(part, torch.int16) for part in units) if mode is compensated else ()
    return Row(name, source, averages, mode, beside, mode.key(name), **more)


def make_rows(*layouts, profiles=1, spread=1.0):
    """One row for each source, form and layout; default: all layouts."""
    torch.manual_seed(0)
    chosen = {name: LAYOUTS[name] for name in layouts or LAYOUTS}
    return [
        make_row(
            layout(torch.randn(6, 10, device=DEVICE).to(source)),
            form,
            profiles=profiles,
            name=f"{layout_name} {source} {form}",
            spread=spread,
        )
        for source, form, (layout_name, layout) in itertools.product(SOURCES, FORMS, chosen.items())
    ]


def clone(row):
    """The same row with averages of its own."""
    return row._replace(
        averages=tuple(torch.empty_like(t).copy_(t) for t in row.averages),
        beside=tuple(torch.empty_like(t).copy_(t) for t in row.beside),
    )


def expected(row, weights, step=STEP):
    """The averages and second terms of a row after an update, one tensor at a time, on the CPU."""
    source = row.source.cpu()
    if row.mode is compensated:
        pairs = [
            modes.compensated(average.cpu(), second.cpu(), source, weight)
            for average, second, weight in zip(row.averages, row.beside, weights, strict=True)
        ]
        return [*(pair[0] for pair in pairs), *(pair[1] for pair in pairs)]
    if row.mode is stochastic:
        return [
            modes.stochastic(average.cpu(), source, weight, step, row.key, row.first)
            for average, weight in zip(row.averages, weights, strict=True)
        ]
    return [modes.lerp(average.cpu(), source, weight) for average, weight in zip(row.averages, weights, strict=True)]


def bits(tensor):
    """The bits of a tensor, in which all NaNs are one."""
    tensor = tensor.cpu()
    words = (
        tensor
        if not tensor.is_floating_point()
        else tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])
    )
    return words.masked_fill(tensor != tensor, -1)


def assert_same(row, tensors, hint=None):
    for found, right in zip((*row.averages, *row.beside), tensors, strict=True):
        assert torch.equal(bits(found), bits(right)), (row.name, hint)


def positive_zeros(tensor):
    """The tensor without signs of zeros: torch's own differ, where a weight rounds to 1, between a CPU and a GPU."""
    return tensor.masked_fill(tensor == 0, 0.0)


def check(rows, weights, step=STEP, *, against_staged=True):
    """One launch for all rows, against the reference and against the kernel in torch's own operations."""
    right = [expected(row, weights, step) for row in rows]
    twins = [clone(row) for row in rows]
    sources = [bits(row.source) for row in rows]
    Triton(rows).run(weights, step)
    for row, tensors, source in zip(rows, right, sources, strict=True):
        assert_same(row, tensors, weights)
        assert torch.equal(bits(row.source), source)
    if against_staged:
        for group in Plan(twins, kernels=["staged"]).groups:
            Staged([real for row in group.rows for real in real_rows(row)]).run(weights, step)
        for row, twin in zip(rows, twins, strict=True):
            for found, other in zip(row.tensors[1:], twin.tensors[1:], strict=True):
                assert torch.equal(bits(positive_zeros(found)), bits(positive_zeros(other))), (row.name, weights)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """The interpreter takes as long for a block of 64 elements as for one, and no tensor here is larger."""
    monkeypatch.setattr(table, "BLOCK", 64)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_every_source_form_and_layout_in_one_launch(weight):
    check(make_rows(), [weight])


@pytest.mark.parametrize(
    "weights",
    [(0.0, 1e-4), (0.3, 1e-6), (0.7, 0.5), (1.0, 0.3), (0.0, 1e-6, 1e-4, 0.3), (0.5, 0.7, 1.0, 1e-3)],
    ids=str,
)
def test_several_profiles(weights):
    check(make_rows(profiles=len(weights)), list(weights))


@pytest.mark.parametrize("spread", [1e-6, 1e-3, 1e3])
def test_averages_near_the_source_and_far_from_it(spread):
    check(make_rows(spread=spread), [0.01])


def test_a_finite_average_that_equals_its_source_stays():
    for weight in (1e-4, 0.3, 0.7):
        rows = [
            row
            for row in make_rows("contiguous", "odd", "scalar", spread=0.0)
            if row.source.dtype == row.averages[0].dtype
        ]
        Triton(rows).run([weight], STEP)
        for row in rows:
            assert torch.equal(bits(row.averages[0]), bits(row.source)), (row.name, weight)


@pytest.mark.parametrize("block", [16, 32])
def test_several_chunks(block, monkeypatch):
    monkeypatch.setattr(table, "BLOCK", block)
    rows = make_rows("contiguous", "odd", "unaligned")
    assert len(Triton(rows)._table.chunks) > 2 * len(rows)
    check(rows, [0.3])


@pytest.mark.parametrize("maximum", [1, 3])
def test_several_blocks_a_chunk(maximum, monkeypatch):
    monkeypatch.setattr(table, "BLOCK", 16)
    monkeypatch.setattr(table, "_PROGRAMS", 1)
    monkeypatch.setattr(table, "_MAX_BLOCKS", maximum)
    rows = make_rows("contiguous", "odd", "unaligned")
    check(rows, [0.3])


@pytest.mark.protects
@pytest.mark.parametrize("first", [4, 5, 2**32 - 31, 2**33 - 30, 2**33 - 1, 5 * 2**33 + 3])
def test_random_bits_follow_an_elements_place_in_the_whole_tensor(first):
    torch.manual_seed(1)
    sources = [torch.randn(60, device=DEVICE).to(dtype) for dtype in SOURCES]
    rows = [make_row(source, form, first=first) for source in sources for form in FORMS[2:]]
    check(rows, [0.01])


def test_random_bits_for_large_and_small_keys():
    source = torch.randn(60, device=DEVICE)
    for key, step in itertools.product([0, 1, 2**63 - 1, 2**63, 2**64 - 1], [0, 16, 2**31, 2**63, 2**64 - 1]):
        check([make_row(source, FORMS[2])._replace(key=key)], [0.1], step, against_staged=False)


def test_places_beyond_32_bits(monkeypatch):
    """The last two chunks of a tensor whose memory is otherwise never touched; the second begins at 3 * 2 ** 33."""
    monkeypatch.setattr(table, "BLOCK", 1024)
    size, end = 2**31 + 70, 70
    source, average = (torch.empty(size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    source[-end:] = torch.randn(end)
    average[-end:] = torch.randn(end)
    first = 3 * 2**33 - size + 2
    tail = Row("x", source[-end:], (average[-end:],), stochastic, key=5, first=first + size - end)
    right = expected(tail, [0.1])
    kernel = Triton([Row("x", source, (average,), stochastic, key=5, first=first)])
    chunks = kernel._table.chunks
    assert chunks[-2:, 0].tolist() == [2**31, 2**31 + 68]
    kernel._table = dataclasses.replace(kernel._table, chunks=chunks[-2:])
    kernel._grid = (2,)
    kernel.run([0.1], STEP)
    assert_same(tail, right)


SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-39, 6e-8, 6.1e-5, 65504.0, 65520.0, 8e37, 1e38, 3.38e38, -3.4e38]
SPECIAL += [float("inf"), -float("inf"), float("nan")]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_extreme_numbers(form):
    one, other = torch.tensor(list(itertools.product(SPECIAL, SPECIAL)), device=DEVICE).T.contiguous()
    for weights in zip(*[iter(WEIGHTS)] * 3, strict=True):
        rows = [make_row(one.to(dtype), form, profiles=3) for dtype in SOURCES]
        for row in rows:
            for average in row.averages:
                average.copy_(other)
        check(rows, list(weights))


def test_complex_tensors_go_as_pairs():
    torch.manual_seed(0)
    source, average = (torch.randn(6, 10, dtype=torch.complex64, device=DEVICE) for _ in range(2))
    right = modes.lerp(average.cpu(), source.cpu(), 0.3)
    plan = Plan([Row("x", source, (average,))], kernels=["triton"])
    plan.run([0.3])
    assert torch.equal(average.cpu(), right)


OTHERS = {
    "float64": lambda: (torch.ones(4, dtype=torch.float64), torch.ones(4)),
    "plain 16 bits": lambda: (torch.ones(4), torch.ones(4).half()),
    "gaps": lambda: (torch.ones(4, 4)[:, 1:], torch.ones(4, 3)),
    "another layout": lambda: (torch.ones(4, 3), torch.ones(3, 4).t()),
    "another place": lambda: (torch.ones(4), torch.ones(4, device="meta")),
    "negated": lambda: (torch.ones(1, dtype=torch.complex64).conj().imag, torch.ones(1)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_for_this_kernel(name):
    with DEVICE:
        source, average = OTHERS[name]()
    with pytest.raises(ValueError, match="no kernel of 'triton' fits"):
        Plan([Row(name, source, (average,))], kernels=["triton"])


def test_the_plan_takes_all_rows_in_one_group():
    rows = make_rows()
    plan = Plan([*rows, Row("wide", torch.ones(4).double(), (torch.ones(4),))], kernels=["triton", "staged"], seed=7)
    assert [group.kernel for group in plan.groups] == ["triton", "staged"]
    assert str(plan).startswith(
        f"triton: {len(rows)} tensors, {sum(row.source.numel() for row in rows)} elements (compensated, stochastic, "
        "dense, on "
    )
    right = [expected(row, [0.3]) for row in rows]
    plan.run([0.3], 3)
    for row, tensors in zip(rows, right, strict=True):
        assert_same(row, tensors)
