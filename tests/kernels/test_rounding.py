"""Stochastic rounding: the random bits of neighbours, and what becomes of them in every kernel."""

import itertools

import pytest
import torch

from polyak.kernels import Plan, Row, native, stochastic
from polyak.kernels.native import work
from reference import modes

HALF = [torch.bfloat16, torch.float16]
KERNELS = [
    pytest.param("native", marks=pytest.mark.skipif(native.library() is None, reason="installed without a compiler")),
    "staged",
]
STEP = modes.step_key(7, 3)
KEY = modes.entry_key("x")
each_dtype = pytest.mark.parametrize("dtype", HALF, ids=str)
each_kernel = pytest.mark.parametrize("kernel", KERNELS)


def updated(average, source, weight, *, kernel=None, first=0, number=3):
    found = average.clone()
    row = Row("x", source, (found,), stochastic, key=KEY, first=first)
    Plan([row], kernels=kernel and [kernel], seed=7).run([weight], number)
    return found


def made(dtype, size, source_dtype=torch.float32):
    torch.manual_seed(0)
    source = torch.randn(size)
    return (source + torch.randn(size) * 0.01).to(dtype), source.to(source_dtype)


def words(size, first=0):
    """The random bits of elements one after another."""
    return torch.tensor([modes.random_bits(STEP, KEY, first + place) for place in range(size)])


class TestBits:
    def test_two_neighbours_share_a_word_and_have_its_halves_swapped(self):
        even, odd = words(1000).view(-1, 2).unbind(1)
        assert torch.equal(even >> 16, odd & 0xFFFF)
        assert torch.equal(even & 0xFFFF, odd >> 16)
        assert len(set(even.tolist())) == 500

    @pytest.mark.parametrize("distance", [1, 2, 3, 32])
    @pytest.mark.parametrize("start", [0, 1])
    def test_what_decides_for_an_element_says_nothing_about_another(self, start, distance):
        """The leading 4 bits of both, in 256 bins: chi squared with 255 degrees of freedom, of deviation 22.6."""
        bits = words(100_000)[start:]
        one, other = (
            bits[: len(bits) - distance : 2] >> 28,
            bits[distance::2][: len(bits[: len(bits) - distance : 2])] >> 28,
        )
        counts = torch.bincount(one * 16 + other, minlength=256).double()
        expected = len(one) / 256
        assert float(((counts - expected) ** 2 / expected).sum()) < 255 + 4 * 22.6

    def test_every_bit_is_set_as_often_as_not(self):
        bits = words(50_000)
        share = (bits[:, None] >> torch.arange(32) & 1).double().mean(0)
        assert (share - 0.5).abs().max() < 4.5 * 0.5 / 50_000**0.5

    @pytest.mark.parametrize("place", [2**32, 2**33, 5 * 2**33])
    def test_the_key_changes_with_the_upper_half_of_a_pairs_number(self, place):
        """Two ranges that agree in the lower half have nothing in common."""
        assert not set(words(100).tolist()) & set(words(100, first=place).tolist())


class TestCuts:
    """An element's place in the whole tensor decides, not how the tensor was cut."""

    @each_kernel
    @each_dtype
    @pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("weight", [1e-3, 0.7, 1.0])
    def test_parts_are_what_the_whole_is(self, dtype, source_dtype, weight, kernel):
        average, source = made(dtype, 40_001, source_dtype)
        whole = updated(average, source, weight, kernel=kernel, first=3)
        ends = [0, 1, 2, 5, 38, 39, 1000, 16_381, 16_382, 33_001, 40_000, 40_001]
        for start, end in itertools.pairwise(ends):
            part = updated(average[start:end], source[start:end], weight, kernel=kernel, first=3 + start)
            assert torch.equal(part, whole[start:end]), (start, end)

    @pytest.mark.skipif(native.library() is None, reason="installed without a compiler")
    @each_dtype
    def test_any_number_of_threads(self, dtype, monkeypatch):
        average, source = made(dtype, 300_001)
        before = torch.get_num_threads()
        found = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                monkeypatch.setattr(work.CREW, "_alone", 0)  # an earlier call may have waited
                found.append(updated(average, source, 0.01, kernel="native"))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(found[0], updated(average, source, 0.01, kernel="staged"))
        assert all(torch.equal(found[0], other) for other in found[1:])

    @each_kernel
    def test_averages_of_one_model_share_their_bits(self, kernel):
        average, source = made(torch.bfloat16, 1001)
        averages = tuple(average.clone() for _ in range(3))
        Plan([Row("x", source, averages, stochastic, key=KEY)], kernels=[kernel], seed=7).run([0.01, 0.0, 0.01], 3)
        assert torch.equal(averages[0], updated(average, source, 0.01, kernel=kernel))
        assert torch.equal(averages[0], averages[2])
        assert torch.equal(averages[1], average)


# Averages and sources, and a weight: between two numbers, from a power of two up and down, in steps that float32 does
# not see, with several bits of float32, and among the subnormal numbers of float16.
MOVES = [
    (0.3, 0.31, 0.01),
    (-1.5, 2.0, 0.7),
    (1.0, 1.01, 5e-6),
    (1.0, 0.99, 2e-6),
    (-1.0, -0.99, 1e-6),
    (2.0**-14, 0.9 * 2.0**-14, 1e-6),
    (2.0**-14, 1.1 * 2.0**-14, 1e-6),
    (3e-6, -1e-6, 0.1),
    (-(2.0**-20), 2.0**-20, 1e-3),
    (1000.0, 999.0, 0.9999),
]


class TestDistribution:
    SIZE = 1 << 20

    @each_dtype
    @pytest.mark.parametrize(("average", "source", "weight"), MOVES)
    @pytest.mark.protects
    def test_mean_variance_and_neighbours(self, average, source, weight, dtype):
        """Up with the probability that keeps the mean, and independently of the neighbour: within 4 deviations."""
        start = torch.full((self.SIZE,), average).to(dtype)
        sources = torch.full((self.SIZE,), source)
        weight32 = float(torch.tensor(weight, dtype=torch.float32))
        exact = float(start[0]) + weight32 * (float(sources[0]) - float(start[0]))
        lower, upper = around(exact, dtype)
        share = (exact - lower) / (upper - lower)
        # Small shares need many draws. Each update draws anew, from the same start.
        ups = torch.cat([updated(start, sources, weight, number=n).double() for n in range(8)]).sub_(lower)
        ups.div_(upper - lower)
        assert set(ups.unique().tolist()) <= {0.0, 1.0}
        deviation = (share * (1 - share) / len(ups)) ** 0.5
        assert abs(float(ups.mean()) - share) < 4 * deviation
        assert 0 < float(ups.var()) == pytest.approx(share * (1 - share), rel=0.02, abs=1e-4)
        even, odd = ups.view(-1, 2).sub(ups.mean()).unbind(1)
        correlation = float((even * odd).mean() / ups.var())
        assert abs(correlation) < 4 / len(even) ** 0.5

    @each_kernel
    @each_dtype
    def test_nothing_crosses_zero_or_becomes_infinite_when_numbers_cancel(self, dtype, kernel):
        """In float32 the new average is 0, or as small as can be, and the product was rounded in its last bit."""
        torch.manual_seed(0)
        size = 1 << 16
        average = (torch.randn(size) * 2.0 ** torch.randint(-20, 4, (size,))).to(dtype)
        for weight in (0.25, 5592405 / 2**23, 0.9):
            source = (average.double() * (1 - 1 / weight)).float()
            source = source.nextafter(torch.randn(size))
            found = updated(average, source, weight, kernel=kernel)
            exact = average.double() + weight * (source.double() - average.double())
            smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            room = exact.abs() * 2 * torch.finfo(dtype).eps + 2 * smallest + average.double().abs() * 2.0**-22
            assert ((found.double() - exact).abs() <= room).all()

    @each_kernel
    @each_dtype
    def test_an_average_that_becomes_zero_is_zero(self, dtype, kernel):
        """The difference, 3 + 2 ** -23, is rounded to 3; then its part and the source cancel."""
        average, source = torch.full((1 << 20,), -2.0, dtype=dtype), torch.full((1 << 20,), 1 + 2.0**-23)
        assert (updated(average, source, 5592405 / 2**23, kernel=kernel) == 0).all()

    @each_kernel
    @each_dtype
    def test_a_signalling_nan_is_copied_as_a_nan(self, dtype, kernel):
        source = torch.tensor([0x7F800001, -0x7FFFFF], dtype=torch.int32).view(torch.float32).repeat(20)
        found = updated(torch.ones(40, dtype=dtype), source, 1.0, kernel=kernel)
        assert found.isnan().all()


def around(exact, dtype):
    """The two numbers of 16 bits around another."""
    nearest = torch.tensor(exact, dtype=torch.float64).to(dtype)
    towards = torch.tensor(torch.inf if float(nearest) <= exact else -torch.inf, dtype=dtype)
    return sorted((float(nearest), float(nearest.nextafter(towards))))
