"""Averages whose updates a GPU decides about: the cases that the interpreter runs elsewhere, and a captured step."""

import copy
import importlib.util

import pytest
import torch
from torch import nn

import polyak
import zoo

CAN_RUN = torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
MARKS = [pytest.mark.gpu, pytest.mark.skipif(not CAN_RUN, reason="needs a GPU that CUDA can use, and Triton")]
pytestmark = MARKS

if CAN_RUN:
    from device_cases import *  # noqa: F403  # its tests are tests here
    from device_cases import pytestmark as _filters

    # The star import has just replaced it by the marks of the cases.
    pytestmark = [*MARKS, _filters]


@pytest.mark.parametrize("mode", [{}, {"compensated": True}, {"dtype": torch.bfloat16}], ids=str)
def test_a_captured_training_step_averages_as_an_eager_one(mode):
    """The weight changes with every replay, and one step is bad."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).cuda()
    twin = copy.deepcopy(model)
    profile = polyak.Power(relative_std=0.1)
    average = polyak.WeightAverage(model, profile, nonfinite="skip", **mode)
    eager = polyak.WeightAverage(twin, profile, nonfinite="skip", **mode)
    gradients = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    def step(trained):
        with torch.no_grad():
            for name, parameter in trained.named_parameters():
                parameter.add_(gradients[name], alpha=-0.1)

    average.advance()
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        step(model)
        average.update()
    torch.cuda.current_stream().wait_stream(stream)
    for number in range(6):
        if number:
            average.advance()
        kept = zoo.clone(dict(model.named_parameters()))
        for gradient in gradients.values():
            gradient.normal_()
        if number == 3:
            gradients["0.weight"][0, 0] = float("nan")
        graph.replay()
        step(twin)
        eager.update()
        if number == 3:
            with torch.no_grad():
                for each in (model, twin):
                    for name, parameter in each.named_parameters():
                        parameter.copy_(kept[name])
    assert average.num_updates == eager.num_updates == 5
    assert zoo.bit_equal(average.weights(), eager.weights())
