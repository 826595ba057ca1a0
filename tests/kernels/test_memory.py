"""Peak memory beside the averages, as torch's allocator counts it."""

import pytest
import torch
from torch import nn

import polyak
from peak import peak_memory

MEBIBYTE = 1 << 20
# What is bounded by a number, so that it does not grow with the model: 64 MiB, of which scratch takes a few.
BOUND = 64 * MEBIBYTE

pytestmark = pytest.mark.filterwarnings("ignore:the average is .* after 0 updates")


def model_of(dtype):
    """About 24 million parameters in three tensors, the largest of 64 MiB in float32."""
    model = nn.Sequential(nn.Embedding(8192, 2048), nn.Linear(2048, 2048), nn.Linear(2048, 2048))
    return model.to(dtype)


@pytest.mark.protects
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_construction_costs_the_averages(dtype):
    model = model_of(dtype)
    size = sum(4 * parameter.numel() for parameter in model.parameters())
    with peak_memory() as peak:
        average = polyak.WeightAverage(model, {"one": polyak.Power(), "two": polyak.Uniform()})
    assert 2 * size <= peak.bytes <= 2 * size + BOUND
    assert average.report().num_bytes == 2 * size


@pytest.mark.protects
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", ["update", "swap", "state_dict", "report"])
def test_what_is_done_often_costs_a_bounded_amount(dtype, call):
    average = polyak.WeightAverage(model_of(dtype))
    average.update()
    calls = {"update": average.update, "swap": lambda: swap(average), "state_dict": average.state_dict}
    with peak_memory() as peak:
        calls.get(call, average.report)()
    assert peak.bytes <= BOUND


def test_a_swap_of_float16_costs_a_copy_of_the_source():
    model = model_of(torch.float16)
    average = polyak.WeightAverage(model)
    size = sum(2 * parameter.numel() for parameter in model.parameters())
    with peak_memory() as peak:
        swap(average)
    assert size <= peak.bytes <= size + BOUND


def swap(average):
    with average.swapped():
        pass
