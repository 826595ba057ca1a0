"""Kernels on lists of plain tensors, bit for bit against one tensor at a time."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import zoo
from polyak.kernels import (
    Journal,
    Plan,
    Row,
    average_dtype,
    checksums,
    compensated,
    dead_zone,
    exchange,
    native,
    plain,
    stochastic,
)
from polyak.kernels import pieces as pieces_room
from polyak.kernels.halves import average_inside, exchange_halves, raw_inside, upper_half
from polyak.kernels.native import work
from polyak.kernels.pieces import cut, is_dense
from polyak.kernels.sums import _checksum
from reference import modes

LAYOUTS = {
    "contiguous": lambda t: t,
    "scalar": lambda t: t.flatten()[0].clone(),
    "empty": lambda t: t[:0].clone(),
    "transposed": lambda t: t.transpose(0, 1),
    "every other column": lambda t: t[:, ::2],
    "unaligned": lambda t: t.flatten()[1:],
    "channels last": lambda t: t.view(3, 4, 5, 7).to(memory_format=torch.channels_last),
    "expanded": lambda t: t[:1].expand(6, *t.shape[1:]),
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
WEIGHTS = [0.0, 1e-9, 1e-4, 0.3, 0.5, 0.7, 1 - 1e-9, 1.0]


def random(dtype, *shape):
    torch.manual_seed(0)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, dtype=wide).to(dtype)


KERNELS = [None, ["native", "staged"], ["foreach", "staged"], ["staged"]]
STEP = modes.step_key(7, 3)
FIRST = 2**33 - 101  # an odd place, and pairs on both sides of 2 ** 32


def dtypes_of(mode):
    """Sources and averages."""
    if mode is stochastic:
        averages = [torch.float16, torch.bfloat16]
        return [(source, average) for source in DTYPES if not source.is_complex for average in averages]
    if mode is compensated:
        wide = {torch.complex64: torch.complex64, torch.complex128: None}
        return [(source, wide.get(source, torch.float32)) for source in DTYPES if wide.get(source, 1)]
    real = [(source, average) for source in DTYPES[:4] for average in (torch.float32, torch.float64)]
    return [*real, (torch.complex64, torch.complex64), (torch.complex64, torch.complex128), (torch.complex128,) * 2]


def make_row(mode, name, source, average_dtype, num_averages):
    averages = tuple(torch.randn_like(source, dtype=torch.float32).to(average_dtype) for _ in range(num_averages))
    if average_dtype.is_complex:
        averages = tuple(torch.randn_like(source, dtype=average_dtype) for _ in averages)
    if mode is stochastic:
        return Row(name, source, averages, mode, key=modes.entry_key(name), first=FIRST)
    if mode is compensated:
        pairs = [torch.view_as_real(average) if average.is_complex() else average for average in averages]
        seconds = tuple(torch.randint_like(pair, -(1 << 15), 1 << 15).to(torch.int16) for pair in pairs)
        return Row(name, source, averages, mode, seconds)
    return Row(name, source, averages)


def expected_of(row, number, weight):
    """An average, and its second term, after an update of its own."""
    average = row.averages[number]
    if row.mode is stochastic:
        return modes.stochastic(average, row.source, weight, STEP, row.key, row.first), None
    if row.mode is compensated:
        return modes.compensated(average, row.beside[number], row.source, weight)
    return modes.lerp(average, row.source, weight), None


CASES = [(mode, *dtypes) for mode in (plain, compensated, stochastic) for dtypes in dtypes_of(mode)]


@pytest.mark.protects
@pytest.mark.parametrize("kernels", KERNELS, ids=str)
@pytest.mark.parametrize("elements", [None, 16])
@pytest.mark.parametrize(("mode", "source_dtype", "dtype"), CASES, ids=str)
def test_every_mode_layout_and_weight_and_several_averages(mode, source_dtype, dtype, elements, kernels, monkeypatch):
    if elements is not None:
        monkeypatch.setattr(pieces_room, "_CPU_ELEMENTS", elements)
        monkeypatch.setattr(work, "CHUNK_ELEMENTS", elements)
    sources = {name: layout(random(source_dtype, 12, 35)) for name, layout in LAYOUTS.items()}
    before = zoo.clone(sources)
    # The reference rounds element by element, which takes its time.
    runs = [(1e-4, 0.7), (1.0, 0.0)] if mode is stochastic else list(zip(WEIGHTS, reversed(WEIGHTS), strict=True))
    for weights in runs:
        rows = [make_row(mode, name, source, dtype, 2) for name, source in sources.items()]
        expected = [[expected_of(row, number, weight) for number, weight in enumerate(weights)] for row in rows]
        Plan(rows, kernels=kernels, seed=7).run(weights, 3)
        for row, right in zip(rows, expected, strict=True):
            for number, (average, second) in enumerate(right):
                assert torch.equal(row.averages[number], average), (row.name, weights)
                assert second is None or torch.equal(row.beside[number], second), (row.name, weights)
    assert zoo.bit_equal(sources, before)


@pytest.mark.protects
@pytest.mark.parametrize("kernels", KERNELS, ids=str)
@pytest.mark.parametrize(("mode", "source_dtype", "dtype"), [case for case in CASES if case[1].is_complex], ids=str)
@pytest.mark.parametrize("shape", [(5, 3), (1,), ()])
def test_a_conjugate_view_counts_as_what_it_shows(mode, source_dtype, dtype, shape, kernels):
    row = make_row(mode, "x", random(source_dtype, *shape).conj(), dtype, 2)
    right = [expected_of(row._replace(source=row.source.resolve_conj()), number, 0.25) for number in range(2)]
    Plan([row], kernels=kernels).run([0.25, 0.25])
    for number, (average, second) in enumerate(right):
        assert torch.equal(row.averages[number], average)
        assert second is None or torch.equal(row.beside[number], second)


@pytest.mark.protects
@pytest.mark.parametrize("kernels", KERNELS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_source_and_an_average_of_different_layouts(dtype, kernels):
    source = random(dtype, 12, 35)
    average = torch.randn(35, 12, dtype=average_dtype(dtype)).t()
    expected = modes.lerp(average, source, 0.25)
    Plan([Row("x", source, (average,))], kernels=kernels).run([0.25])
    assert torch.equal(average, expected)


def test_a_weight_of_one_copies_whatever_the_average_held():
    source, average = torch.tensor([1.0, 2.0, float("inf")]), torch.tensor([float("nan"), float("inf"), 3.0])
    Plan([Row("x", source, (average,))]).run([1.0])
    assert torch.equal(average, source)


def test_a_weight_of_zero_leaves_the_average_whatever_the_source_holds():
    source, average = torch.tensor([float("nan"), float("inf")]), torch.tensor([1.0, 2.0])
    Plan([Row("x", source, (average,))]).run([0.0])
    assert torch.equal(average, torch.tensor([1.0, 2.0]))


class TestPlan:
    def rows(self):
        return [
            Row("a", torch.zeros(2), (torch.zeros(2),)),
            Row("b", torch.zeros(3).half(), (torch.zeros(3),)),
            *[Row(f"c{i}", torch.zeros(1), (torch.zeros(1),)) for i in range(5)],
        ]

    def test_says_what_goes_where_and_why(self):
        assert str(Plan(self.rows(), kernels=["foreach", "staged"])) == (
            "foreach: 6 tensors, 7 elements (same dtype and device): a, c0, c1, c2 and 2 more\n"
            "staged: 1 tensor, 3 elements (torch.float16 to torch.float32): b"
        )

    @pytest.mark.skipif(native.library() is None, reason="installed without a compiler")
    def test_takes_the_kernel_in_c_where_it_can(self):
        assert str(Plan(self.rows())).startswith("native: 6 tensors, 7 elements (dense, on the CPU): a, c0")

    def test_can_be_forced_from_outside(self, monkeypatch):
        monkeypatch.setenv("POLYAK_KERNELS", "staged")
        assert [group.kernel for group in Plan(self.rows()).groups] == ["staged", "staged"]

    def test_impossible_kernels(self):
        with pytest.raises(
            ValueError, match=r"no kernel 'cuda'; the kernels are 'native', 'triton', 'foreach', 'staged'"
        ):
            Plan(self.rows(), kernels=["cuda"])
        with pytest.raises(ValueError, match=r"no kernel of 'foreach' fits 'b', torch.float16 on cpu into"):
            Plan(self.rows(), kernels=["foreach"])


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("EXTENSION_SUFFIXES", [], "polyak has no C kernel here"),
        pytest.param(
            "_VERSION",
            1,
            "it was built for another version",
            marks=pytest.mark.skipif(native.library() is None, reason="installed without a compiler"),
        ),
    ],
)
def test_without_the_compiled_kernel_torch_does_the_same_and_it_is_said_once(attribute, value, message, monkeypatch):
    monkeypatch.setattr(work, attribute, value)
    native.library.cache_clear()
    row = Row("x", torch.ones(2), (torch.zeros(2),))
    try:
        with pytest.warns(UserWarning, match=message) as caught:
            plans = [Plan([row]), Plan([row])]
        assert len(caught) == 1
        assert [group.kernel for plan in plans for group in plan.groups] == ["foreach", "foreach"]
    finally:
        monkeypatch.undo()
        native.library.cache_clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where there really is none
            native.library()


@pytest.mark.parametrize("elements", [1, 7, 64, 1 << 18])
def test_batches_fit_the_scratch_and_cover_each_element_once(elements):
    sources = [layout(torch.zeros(12, 35)) for name, layout in LAYOUTS.items() if name != "expanded"]
    scratch = torch.empty(elements)
    for batch in cut([(source,) for source in sources], scratch):
        assert sum(piece.numel() for piece in batch.scratch) <= elements
        for piece, staged in zip(*batch.columns, batch.scratch, strict=True):
            assert piece.shape == staged.shape
            piece.add_(1)
    assert all(source.eq(1).all() for source in sources)


@pytest.mark.parametrize("elements", [1, 7, 1 << 18])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool], ids=str)
def test_exchange(dtype, elements, monkeypatch):
    monkeypatch.setattr(pieces_room, "_CPU_ELEMENTS", elements)
    layouts = {name: layout for name, layout in LAYOUTS.items() if name != "expanded"}
    one = {name: layout(random(torch.float32, 12, 35).mul(9).to(dtype)) for name, layout in layouts.items()}
    other = {name: torch.zeros_like(tensor) for name, tensor in one.items()}
    before_one, before_other = zoo.clone(one), zoo.clone(other)
    Journal(exchange(list(one.values()), list(other.values()))[0]).run()
    assert zoo.bit_equal(one, before_other)
    assert zoo.bit_equal(other, before_one)


@pytest.mark.protects
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_exchange_of_a_conjugate_view(dtype):
    one, other = random(dtype, 5, 3).conj(), random(dtype, 5, 3) + 1
    shown, before = one.resolve_conj().clone(), other.clone()
    Journal(exchange([one], [other])[0]).run()
    assert torch.equal(one.resolve_conj(), before)
    assert torch.equal(other, shown)


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (torch.empty(3, 4), True),
        (torch.empty(3, 4).t(), True),
        (torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.empty(3, 1, 4).transpose(0, 1), True),
        (torch.empty(()), True),
        (torch.empty(3, 4)[:, 1:], False),
        (torch.empty(3, 4)[::2], False),
        (torch.empty(3, 1).expand(3, 4), False),
    ],
)
def test_dense(tensor, dense):
    assert is_dense(tensor) is dense


def quiet(average):
    """NaNs whose upper half would be an infinity's, with their quiet bit set."""
    words = average.view(torch.int32).clone()
    hidden = average.isnan() & (words.bitwise_right_shift(16).bitwise_and(0x7FFF) == 0x7F80)
    words[hidden] |= 0x400000
    return words.view(torch.float32)


class TestHalves:
    """bfloat16 sources and float32 averages in one another's bits."""

    def every_kind(self):
        torch.manual_seed(0)
        upper = torch.arange(1 << 16, dtype=torch.int32)
        lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
        words = (upper[:, None] * 65536 + lower).flatten()
        raw = torch.randint(-(1 << 15), 1 << 15, words.shape, dtype=torch.int16)
        return raw.view(torch.bfloat16), words.view(torch.float32)

    @pytest.mark.protects
    @pytest.mark.parametrize("elements", [1000, 1 << 18])
    def test_every_upper_half_goes_in_and_comes_back(self, elements, monkeypatch):
        monkeypatch.setattr(pieces_room, "_CPU_ELEMENTS", elements)
        raw, average = self.every_kind()
        source, slot = raw.clone(), average.clone()
        enter, leave = exchange_halves([source], [slot])
        Journal(enter).run()
        assert zoo.bit_equal({"x": source}, {"x": upper_half(average)})
        assert zoo.bit_equal({"x": average_inside(source, slot)}, {"x": quiet(average)})
        assert zoo.bit_equal({"x": raw_inside(slot)}, {"x": raw})
        Journal(leave).run()
        assert zoo.bit_equal({"x": source, "y": slot}, {"x": raw, "y": quiet(average)})

    @pytest.mark.protects
    def test_rounds_as_torch_does_but_for_ties(self):
        _, average = self.every_kind()
        finite = average[average.isfinite()]
        ties = finite.view(torch.int32).bitwise_and(0xFFFF) == 0x8000
        assert torch.equal(upper_half(finite)[~ties], finite[~ties].to(torch.bfloat16))
        assert torch.equal(upper_half(average).isnan(), average.isnan())

    def test_layouts(self):
        for name, layout in LAYOUTS.items():
            if name != "expanded":
                source = layout(random(torch.bfloat16, 12, 35))
                average = torch.randn_like(source, dtype=torch.float32)
                before = zoo.clone({"source": source, "average": average})
                enter, leave = exchange_halves([source], [average])
                Journal(enter).run()
                assert torch.equal(source, upper_half(before["average"])), name
                Journal(leave).run()
                assert zoo.bit_equal({"source": source, "average": average}, before), name


class TestDeadZone:
    @pytest.mark.parametrize(
        ("dtype", "decays"),
        [
            (torch.bfloat16, {0.99: 0.39, 0.999: 3.9, 0.9999: 39, 0.99999: 390}),
            (torch.float16, {0.99: 0.049, 0.999: 0.49, 0.9999: 4.9, 0.99999: 49}),
            (torch.float32, {0.99: 6e-6, 0.999: 6e-5, 0.9999: 6.0e-4, 0.99999: 6.0e-3}),
        ],
        ids=str,
    )
    def test_is_what_the_bits_give(self, dtype, decays):
        for decay, published in decays.items():
            assert dead_zone(dtype, decay) == pytest.approx(published, rel=0.02)
        assert dead_zone(dtype, 1.0) == float("inf")

    @pytest.mark.parametrize(("dtype", "decay"), [(torch.float32, 0.9999), (torch.float32, 0.99999)])
    def test_an_average_stops_there(self, dtype, decay):
        """1 and a source at 1.3: in float32 the average stops 5.96e-4 and 5.96e-3 short of it, and no nearer."""
        average, source = torch.ones((), dtype=dtype), torch.tensor(1.3, dtype=dtype)
        plan = Plan([Row("x", source, (average,))])
        for step in range(40):
            average.copy_(source - 2.0**-5 * 1.3 * 0.75**step)
            before = average.clone()
            plan.run([1 - decay])
            gap = float(source - before)
            assert (average != before) or gap <= dead_zone(dtype, decay) * float(before)
            assert (average == before) or gap >= dead_zone(dtype, decay) * float(before) / 4

    def test_impossible_arguments(self):
        with pytest.raises(ValueError, match=r"decay=2 is outside \[0, 1\]"):
            dead_zone(torch.float32, 2)
        with pytest.raises(ValueError, match=r"floating-point tensors cannot be cast to torch.int64"):
            dead_zone(torch.int64, 0.9)


class Sums(TorchDispatchMode):
    """Counts the sums that torch takes."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket is torch.ops.aten.sum
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("device", "shape", "parts"),
    [
        ("cpu", (1 << 20,), 1),
        ("cpu", (3, 1 << 20), 3),
        ("meta", (1 << 26,), 1),  # meta stands for a GPU
        ("meta", (64, 1 << 20), 1),
        ("meta", (5, 1 << 25), 3),
    ],
)
def test_a_device_takes_the_sum_of_a_tensor_in_few_launches(device, shape, parts):
    with Sums() as sums:
        _checksum(torch.empty(shape, dtype=torch.int8, device=device))
    # The sums of several parts are added up.
    assert sums.count == parts + (parts > 1)


@pytest.mark.protects
@pytest.mark.skipif(native.library() is None, reason="installed without a compiler")
@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "sizes",
    [[1 << 18], [1] * 300 + [1 << 17], [1 << 17] + [1] * 300, [70_001, 1, 16_385, 40_000, 3] * 5],
    ids=["one", "large last", "large first", "mixed"],
)
def test_threads_share_uneven_work_and_leave_nothing_out(sizes, num_threads, monkeypatch):
    """Each chunk is done once: an exchange that is done twice, and an update, would show."""
    monkeypatch.setattr(work.Crew, "size", lambda self, num_elements: num_threads)
    one, other = [random(torch.float32, size) for size in sizes], [torch.zeros(size) for size in sizes]
    kept = [tensor.clone() for tensor in one]
    Journal(exchange(one, other)[0]).run()
    assert all(map(torch.equal, other, kept))
    assert not any(tensor.any() for tensor in one)
    sums = [int(tensor.view(torch.int32).sum(dtype=torch.int64)) for tensor in other]
    assert checksums(other) == sums
    rows = [Row("", source, (average,)) for source, average in zip(other, one, strict=True)]
    Plan(rows, kernels=["native"]).run([0.25])
    assert all(map(torch.equal, one, [torch.lerp(torch.zeros_like(source), source, 0.25) for source in other]))
