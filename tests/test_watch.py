"""What changes under an average: tensors and modules that are replaced, graphs, default devices, parts of models."""

import pytest
import torch
from torch import nn

import polyak
import zoo


@pytest.mark.protects
class TestWatch:
    """What the check of every update sees."""

    def test_a_parameter_in_a_module_that_had_none(self):
        model = zoo.mlp()
        average = polyak.WeightAverage(model)
        average.update()
        model.scale = nn.Parameter(torch.ones(1))
        with pytest.raises(polyak.MismatchError, match=r"Only the model: 'scale'"):
            average.update()

    def test_another_parameter_in_the_same_memory(self):
        model = zoo.mlp()
        average = polyak.WeightAverage(model)
        average.update()
        model[0].weight = nn.Parameter(model[0].weight.data)
        zoo.drift(model)
        average.update()
        optimizer = torch.optim.SGD([model[0].weight], lr=0.1)
        model[0].weight.grad = torch.ones_like(model[0].weight)
        with average.swapped(), pytest.raises(polyak.StateError, match=r"it would train the average"):
            optimizer.step()

    def test_a_buffer_that_is_replaced_beside_a_sparse_one(self):
        model = nn.Module()
        model.weight = nn.Parameter(torch.ones(2))
        model.register_buffer("graph", torch.eye(2).to_sparse())
        model.register_buffer("running", torch.zeros(2))
        average = polyak.WeightAverage(model, polyak.Exponential(0.5))
        average.update()
        model.running = torch.full((2,), 4.0)
        average.update()
        assert average.weights()["running"].tolist() == [2.0, 2.0]

    def test_a_buffer_that_gives_way_to_one_without_an_address(self):
        model = nn.Module()
        model.weight = nn.Parameter(torch.ones(2))
        model.register_buffer("running", torch.zeros(2, 2))
        average = polyak.WeightAverage(model, polyak.Exponential(0.5))
        average.update()
        model.running = torch.eye(2).to_sparse()
        with pytest.raises(
            polyak.MismatchError, match=r"'running' of the model is a Tensor of layout torch.sparse_coo"
        ):
            average.update()

    def test_what_is_looked_at_for_nans_follows_the_model(self):
        model = zoo.mlp()
        average = polyak.WeightAverage(model, nonfinite="raise")
        average.update()
        model[0].weight = nn.Parameter(torch.full_like(model[0].weight, float("nan")))
        with pytest.raises(polyak.StateError, match=r"holds NaNs or infinities in '0.weight'"):
            average.update()


@pytest.mark.protects
def test_a_graph_that_used_a_live_module_notices():
    model = zoo.mlp()
    average = polyak.WeightAverage(model, polyak.Exponential(0.5))
    teacher = average.live_module()
    zoo.drift(model)
    inputs = torch.randn(4, 6, requires_grad=True)
    loss = teacher(inputs).square().mean()
    average.update()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.protects
@pytest.mark.parametrize("make", [zoo.mlp, zoo.MODELS["bfloat16"], zoo.MODELS["float16"]])
def test_a_graph_made_inside_of_a_swap_notices_that_it_is_over(make):
    model = make()
    average = polyak.WeightAverage(model, polyak.Exponential(0.5))
    zoo.drift(model)
    average.update()
    with average.swapped():
        inputs = torch.randn(4, 6, dtype=model[0].weight.dtype, requires_grad=True)
        loss = model(inputs).square().mean()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.protects
def test_another_default_device():
    model = zoo.batchnorm()
    with torch.device("meta"):
        average = polyak.WeightAverage(model, polyak.Exponential(0.5), nonfinite="skip")
        average.update()
        with average.swapped():
            pass
        average.report(), average.state_dict()
    assert all(tensor.device.type == "cpu" for tensor in average.weights().values())


@pytest.mark.protects
def test_a_parameter_that_is_a_conjugate_view():
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64).conj())
    model.register_buffer("negative", torch.randn(3, dtype=torch.complex64).conj().imag)
    average = polyak.WeightAverage(model, polyak.Exponential(0.5))
    first = model.weight.detach().resolve_conj().clone()
    with torch.no_grad():
        model.weight.mul_(3)
    average.update()
    torch.testing.assert_close(average.weights()["weight"].resolve_conj(), 2 * first)
    with average.swapped():
        torch.testing.assert_close(model.weight.detach().resolve_conj(), 2 * first)
    torch.testing.assert_close(model.weight.detach().resolve_conj(), 3 * first)


@pytest.mark.protects
def test_averages_of_a_model_and_of_its_part_know_one_another():
    model = zoo.mlp()
    whole, part = polyak.WeightAverage(model), polyak.WeightAverage(model[0])
    zoo.drift(model)
    whole.update(), part.update()
    for one, other in ((whole, part), (part, whole)):
        with one.swapped():
            with pytest.raises(polyak.StateError, match=r"update\(\) inside of swapped\(\)"):
                other.update()
            with pytest.raises(polyak.StateError, match=r"a swap inside of swapped\(\)"), other.swapped():
                pass


@pytest.mark.protects
def test_modules_that_say_that_they_are_equal():
    class Equal(nn.Linear):
        def __eq__(self, other):
            return isinstance(other, Equal)

        __hash__ = nn.Linear.__hash__

    model = nn.Sequential(Equal(2, 2))
    average = polyak.WeightAverage(model, polyak.Exponential(0.5))
    average.update()
    model[0] = Equal(2, 2)
    with torch.no_grad():
        model[0].weight.fill_(100.0)
    average.update()
    assert average.weights()["0.weight"].min() > 40
