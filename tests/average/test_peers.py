"""Expected values that others published: the tests of libraries that average weights, and closed forms of theirs."""

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

import polyak
import zoo


def scalar_model(value):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_torch_ten_random_updates_of_an_exponential_average(decay):
    """The recursion of `TestSWAUtils._test_averaged_model` with `get_ema_multi_avg_fn`, against the real one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(5, 2, 3), nn.ReLU(), nn.BatchNorm2d(2, momentum=0.3), nn.Conv2d(2, 5, 3))
    theirs = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay))
    # Theirs begins with a copy at its first update; time 0 of ours is that moment.
    ours = polyak.WeightAverage(model, polyak.Exponential(decay), start=1)
    for _ in range(10):
        zoo.drift(model)
        theirs.update_parameters(model)
        ours.update()
    weights = ours.weights()
    for name, tensor in theirs.module.named_parameters():
        torch.testing.assert_close(weights[name], tensor.detach(), atol=1e-6, rtol=1e-5)


def test_torch_ten_random_updates_of_a_uniform_average():
    torch.manual_seed(0)
    model = zoo.mlp()
    theirs = swa_utils.AveragedModel(model)
    ours = polyak.WeightAverage(model, polyak.Uniform())
    mean = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in model.state_dict().items()}
    for _ in range(10):
        zoo.drift(model)
        theirs.update_parameters(model)
        ours.update()
        mean = {name: mean[name] + tensor.double() / 10 for name, tensor in model.state_dict().items()}
    for name, tensor in ours.weights().items():
        torch.testing.assert_close(tensor, theirs.module.state_dict()[name], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(tensor.double(), mean[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("every", "expected"), [(1, 4.0625), (2, 3.5)])
def test_ignite(every, expected):
    """`EMAHandler` with momentum 0.5: weights 2, 4 and so on; updated at every, or at every second iteration.

    Its interval does not change its momentum, so that its time is the number of its updates.
    """
    model = scalar_model(1.0)
    average = polyak.WeightAverage(model, polyak.Exponential(0.5))
    for iteration in range(1, 5):
        nn.init.constant_(model.weight, iteration + 1.0)
        if iteration % every == 0:
            average.update()
    assert average.weights()["weight"].item() == expected


def test_keras():
    """`test_ema` of its optimizers: SGD of rate 1 on gradient 1, momentum 0.9, overwritten every third step."""
    model = scalar_model(3.0)
    average = polyak.WeightAverage(model, polyak.Exponential(0.9), start=1)
    seen = []
    for step in range(1, 4):
        with torch.no_grad():
            model.weight -= 1.0
        average.update()
        if step % 3 == 0:
            average.copy_to(model)
        seen.append((model.weight.item(), average.weights()["weight"].item()))
    for found, expected in zip(seen, [(2.0, 2.0), (1.0, 1.9), (1.71, 1.71)], strict=True):
        assert found == pytest.approx(expected, rel=1e-6)


def test_optax_debiased_and_biased_closed_forms():
    """`EmaTest`: of two values, debiased `((1-d)*v1 + d*(1-d)*v0) / (1-d**2)`; from 0, biased the same undivided."""
    d, values = 0.9, [5.0, 7.0]
    model = scalar_model(0.0)
    average = polyak.WeightAverage(
        model, {"debiased": polyak.Exponential(d, debias=True), "biased": polyak.Exponential(d)}
    )
    for value in values:
        nn.init.constant_(model.weight, value)
        average.update()
    biased = (1 - d) * values[1] + d * (1 - d) * values[0]
    assert average["biased"].weights()["weight"].item() == pytest.approx(biased, rel=1e-6)
    assert average["debiased"].weights()["weight"].item() == pytest.approx(biased / (1 - d**2), rel=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("use_num_updates", [True, False])
def test_torch_ema(decay, use_num_updates):
    torch.manual_seed(0)
    model = zoo.mlp()
    profile = polyak.Schedule("tensorflow", decay=decay) if use_num_updates else polyak.Exponential(decay)
    theirs = pytest.importorskip("torch_ema").ExponentialMovingAverage(
        model.parameters(), decay, use_num_updates=use_num_updates
    )
    ours = polyak.WeightAverage(model, profile)
    for _ in range(20):
        zoo.drift(model)
        theirs.update()
        ours.update()
    with theirs.average_parameters():
        for name, tensor in ours.weights().items():
            torch.testing.assert_close(tensor, model.get_parameter(name).detach(), atol=1e-6, rtol=1e-5)


def test_ema_pytorch_with_its_warm_up():
    torch.manual_seed(0)
    model = zoo.mlp()
    theirs = pytest.importorskip("ema_pytorch").EMA(model, beta=0.999, update_after_step=0, update_every=1)
    ours = polyak.WeightAverage(model, polyak.Schedule("inverse-gamma", decay=0.999))
    for _ in range(20):
        zoo.drift(model)
        theirs.update()
        ours.update()
    for name, tensor in ours.weights().items():
        torch.testing.assert_close(tensor, theirs.ema_model.state_dict()[name], atol=1e-6, rtol=1e-5)


def test_power_average_of_a_linear_drift_has_the_published_mean_age():
    """Weights that grow by one a step show the mean age of an average: 0.88823 of the way at T = 4000 (EDM2)."""
    model = scalar_model(0.0).double()
    average = polyak.WeightAverage(model, polyak.Power(relative_std=0.10))
    for step in range(1, 4001):
        nn.init.constant_(model.weight, step)
        average.update()
    assert average.weights()["weight"].item() / 4000 == pytest.approx(0.88823, abs=5e-6)
