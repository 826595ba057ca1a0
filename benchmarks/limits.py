"""As fast as memory allows: the same bytes in one flat tensor of each dtype, in every form that comes into question.

The fastest form of a run is its limit.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import polyak
from benchmarks.contender import DECAY, WEIGHT, Pair, Running, floating_entries, once_each
from benchmarks.ours import pairs_of
from polyak.kernels import Plan, Row, average_dtype

CHUNK = 1 << 18  # elements of scratch: they stay in the cache
COPIED_AT_ONCE = 1 << 30  # bytes
FLOAT32_BYTES = 12  # that a `lerp_` moves for an element: the source, and the average in and out

Form = Callable[[Tensor, Tensor], Callable[[], object]]


def lerp(average: Tensor, source: Tensor) -> Callable[[], object]:
    return lambda: average.lerp_(source, WEIGHT)


def multiply_add(average: Tensor, source: Tensor) -> Callable[[], object]:
    return lambda: average.mul_(1 - WEIGHT).add_(source, alpha=WEIGHT)


def copy_lerp(average: Tensor, source: Tensor) -> Callable[[], object]:
    scratch = torch.empty(CHUNK, dtype=average.dtype, device=average.device)
    pairs = zip(average.split(CHUNK), source.split(CHUNK), strict=True)
    pieces = [(one, other, scratch[: one.numel()]) for one, other in pairs]

    def update() -> None:
        for one, other, converted in pieces:
            one.lerp_(converted.copy_(other), WEIGHT)

    return update


def kernel(average: Tensor, source: Tensor) -> Callable[[], object]:
    plan = Plan([Row("flat", source, (average,))])
    return lambda: plan.run([WEIGHT])


def flat(model: nn.Module, form: Form, *, dtype: torch.dtype | None = None) -> Running:
    """One form over flat pairs; `dtype` is of the averages, where it is not what this library would take."""
    pairs = [
        Pair(torch.zeros_like(source, dtype=dtype or average_dtype(source.dtype)), source)
        for source in flat_sources(model)
    ]
    updates = [form(pair.average, pair.source) for pair in pairs]

    @torch.no_grad()
    def update() -> None:
        for each in updates:
            each()

    return Running(update, lambda: pairs)


def flat_sources(model: nn.Module) -> list[Tensor]:
    num_elements: Counter[torch.dtype] = Counter()
    for tensor in once_each(floating_entries(model)).values():
        num_elements[tensor.dtype] += tensor.numel()
    device = next(model.parameters()).device
    return [torch.zeros(count, dtype=dtype, device=device) for dtype, count in num_elements.items()]


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def flat_average(model: nn.Module, *, compensated: bool = False, dtype: torch.dtype | None = None) -> Running:
    """This library's own kernel for a mode, over a model that has one flat tensor a dtype."""
    flat_model = nn.ParameterList(flat_sources(model))
    average = polyak.WeightAverage(flat_model, polyak.Exponential(DECAY), compensated=compensated, dtype=dtype)
    return Running(average.update, lambda: pairs_of(average, flat_model))


def lerp_of(model: nn.Module, *, bytes_per_parameter: int) -> Running:
    """One flat float32 `lerp_` that moves as many bytes as the update does, whatever its dtypes."""
    num_elements = num_parameters(model) * bytes_per_parameter // FLOAT32_BYTES
    average, source = torch.zeros(num_elements), torch.zeros(num_elements)
    return Running(lerp(average, source), None)


def copy_of(model: nn.Module, *, bytes_per_parameter: int) -> Running:
    """A device's own copy that moves as many bytes as the update does, reading one half and writing the other."""
    num_bytes = num_parameters(model) * bytes_per_parameter
    device = next(model.parameters()).device
    whole, rest = divmod(num_bytes // 2, COPIED_AT_ONCE)
    lengths = [COPIED_AT_ONCE] * whole + [rest] * (rest > 0)
    source = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def update() -> None:
        for length in lengths:
            target[:length].copy_(source[:length])

    return Running(update, None)


FLAT_FORMS: dict[str, Callable[[nn.Module], Running]] = {
    "flat lerp_": partial(flat, form=lerp),
    "flat mul_, add_": partial(flat, form=multiply_add),
    "flat copy, lerp_ by chunks": partial(flat, form=copy_lerp),
    "flat, polyak's kernel": partial(flat, form=kernel),
}
