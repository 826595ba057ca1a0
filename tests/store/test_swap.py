"""The average stands in the source: in place, bit-exact both ways, whatever happens inside or interrupts."""

import sys

import pytest
import torch
from torch import nn

import polyak
import zoo
from interrupts import Interrupt, interrupt_at
from polyak.kernels.halves import upper_half


def trained(name="batchnorm", **options):
    model = zoo.MODELS[name]()
    average = polyak.WeightAverage(model, polyak.Exponential(0.9), **options)
    for _ in range(3):
        zoo.drift(model)
        average.update()
    zoo.drift(model)
    return model, average


def cast(tensor, dtype, *, aside):
    """The average as the source shows it: bfloat16 has its upper half, unless that of a copy rounded by torch."""
    halves = (tensor.dtype, dtype) == (torch.float32, torch.bfloat16) and not aside
    return upper_half(tensor) if halves else tensor.to(dtype)


def everything(model):
    return zoo.clone({**dict(model.named_parameters()), **dict(model.named_buffers())})


@pytest.mark.protects
@pytest.mark.parametrize("aside", [False, True], ids=["exchanged", "with a live module"])
@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("name", zoo.MODELS)
def test_in_place_and_bit_exact_both_ways(name, dtype, aside):
    model, average = trained(name, dtype=dtype)
    live = average.live_module() if aside else None
    raw, state, kept = everything(model), zoo.clone(model.state_dict()), average.weights()
    addresses = [tensor.data_ptr() for tensor in model.parameters()]
    expected = {key: cast(tensor, state[key].dtype, aside=live is not None) for key, tensor in kept.items()}
    model.train()
    for _ in range(2):
        with average.swapped():
            assert average.is_swapped
            assert zoo.bit_equal(dict(model.state_dict()), expected)
            assert zoo.bit_equal(average.weights(), kept)
            assert [tensor.data_ptr() for tensor in model.parameters()] == addresses
            assert model.training
        assert not average.is_swapped
        assert zoo.bit_equal(everything(model), raw)
        assert zoo.bit_equal(average.weights(), kept)
    assert live is None or zoo.bit_equal(dict(live.state_dict()), kept)


def test_swap_before_the_first_update_is_the_raw_weights():
    model = zoo.mlp()
    average = polyak.WeightAverage(model)
    raw = everything(model)
    with pytest.warns(UserWarning, match=r"the average is swapped in after 0 updates"), average.swapped():
        assert zoo.bit_equal(everything(model), raw)
    with average.swapped():
        pass


def test_the_other_average_is_not_touched():
    model = zoo.mlp()
    average = polyak.WeightAverage(model, {"one": polyak.Uniform(), "two": polyak.Power()})
    for _ in range(3):
        zoo.drift(model)
        average.update()
    one, two = average["one"].weights(), average["two"].weights()
    with average["one"].swapped():
        assert zoo.bit_equal(average["one"].weights(), one)
        assert zoo.bit_equal(average["two"].weights(), two)


def test_non_finite_values_come_back():
    model, average = trained("mlp")
    with torch.no_grad():
        model[0].weight[0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    raw = everything(model)
    with average.swapped():
        pass
    assert zoo.bit_equal(everything(model), raw)


def test_an_exception_inside_comes_through_and_the_weights_are_back():
    model, average = trained()
    raw, kept = everything(model), average.weights()
    with pytest.raises(KeyboardInterrupt), average.swapped():
        raise KeyboardInterrupt
    assert zoo.bit_equal(everything(model), raw)
    assert zoo.bit_equal(average.weights(), kept)


@pytest.mark.protects
@pytest.mark.parametrize("is_first", [True, False], ids=["first swap", "later swap"])
@pytest.mark.parametrize("name", ["batchnorm", "mixed"])
def test_an_interruption_at_every_line_of_the_swap_loses_nothing(name, is_first, monkeypatch):
    # A small scratch makes many batches, and so many places to be interrupted at.
    monkeypatch.setattr("polyak.kernels.pieces._CPU_ELEMENTS", 40)
    model, average = trained(name)
    raw, kept = everything(model), average.weights()
    interrupted = 0
    position = 0
    finished = False
    while not finished:
        position += 1
        if is_first:
            average._core.store._swaps.clear()
        try:
            sys.settrace(interrupt_at(position))
            with average.swapped():
                pass
            finished = True
        except Interrupt:
            interrupted += 1
        finally:
            sys.settrace(None)
        assert not average.is_swapped, position
        assert zoo.bit_equal(everything(model), raw), position
        assert zoo.bit_equal(average.weights(), kept), position
        assert position < 20_000
    assert interrupted > 100


class TestWhatIsDoneInside:
    @pytest.mark.protects
    @pytest.mark.parametrize("name", ["batchnorm", "mixed", "buffers"])
    def test_buffers_written_inside_stay_with_the_average(self, name):
        model, average = trained(name)
        raw, kept = everything(model), average.weights()
        with average.swapped(), torch.no_grad():
            for buffer in model.buffers():
                buffer.fill_(1)
        assert zoo.bit_equal(everything(model), raw)
        parameters = dict(model.named_parameters())
        for key, tensor in average.weights().items():
            assert torch.equal(tensor, kept[key] if key in parameters else torch.ones_like(tensor)), key

    @pytest.mark.protects
    @pytest.mark.parametrize("name", ["mlp", "bfloat16"])
    def test_a_changed_parameter_raises_after_the_weights_are_back(self, name):
        model, average = trained(name)
        raw = everything(model)
        with pytest.raises(polyak.StateError, match=r"changed inside of swapped\(\): '0.bias'"), average.swapped():
            nn.init.zeros_(model[0].bias)
        assert zoo.bit_equal(everything(model), raw)

    def test_replaced_tensors_raise_and_get_the_weights_back(self):
        model, average = trained("mlp")
        raw = everything(model)
        with pytest.raises(polyak.StateError, match=r"changed inside of swapped\(\): '0.weight'"), average.swapped():
            model.double()
        assert zoo.bit_equal(everything(model), {name: tensor.double() for name, tensor in raw.items()})

    def test_a_replaced_layer_raises_and_gets_the_weights_back(self):
        model, average = trained("mlp")
        raw = everything(model)
        with pytest.raises(polyak.StateError, match=r"changed inside of swapped\(\): '0.weight'"), average.swapped():
            model[0] = nn.Linear(6, 5)
        assert zoo.bit_equal(everything(model), raw)

    def test_an_exception_is_not_hidden_by_a_change(self):
        model, average = trained("mlp")
        raw = everything(model)

        def fails():
            nn.init.zeros_(model[0].bias)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError), average.swapped():
            fails()
        assert zoo.bit_equal(everything(model), raw)

    @pytest.mark.protects
    def test_calls_that_make_no_sense_inside(self):
        model, average = trained("mlp")
        state = average.state_dict()
        with average.swapped():
            for call in (
                average.update,
                average.live_module,
                lambda: average.swapped().__enter__(),
                lambda: average.load_state_dict(state),
                lambda: average.copy_to(model),
                lambda: polyak.WeightAverage(model),
                lambda: polyak.ModelEma(model),
                lambda: polyak.ModelEma(model[0]),
            ):
                with pytest.raises(polyak.StateError, match=r"inside of swapped\(\): the average 'average' stands in"):
                    call()
        assert average.num_updates == 3

    @pytest.mark.protects
    @pytest.mark.parametrize("name", ["batchnorm", "bfloat16"])
    def test_state_and_export_and_module_are_right_inside(self, name, tmp_path):
        from safetensors.torch import load_file

        model, average = trained(name)
        kept, report = average.weights(), str(average.report())
        state = average.state_dict()["averages"]
        outside = [zoo.clone(tensors["average"]) for tensors in state.values()]
        with average.swapped():
            inside = [tensors["average"] for tensors in average.state_dict()["averages"].values()]
            assert zoo.bit_equal(inside[0], outside[0])
            average.export(tmp_path / "file.safetensors")
            assert zoo.bit_equal(load_file(tmp_path / "file.safetensors"), kept)
            expected = {key: t.to(model.state_dict()[key].dtype) for key, t in kept.items()}
            assert zoo.bit_equal(dict(average.module().state_dict()), expected)
            assert str(average.report()) == report


@pytest.mark.protects
def test_a_compiled_model_sees_the_average():
    torch.manual_seed(0)
    model = zoo.mlp()
    compiled = torch.compile(model, backend="aot_eager")
    average = polyak.WeightAverage(compiled, polyak.Exponential(0.5))
    zoo.drift(model)
    average.update()
    zoo.drift(model)
    inputs = torch.randn(4, 6)
    for _ in range(2):
        assert torch.equal(compiled(inputs), model(inputs))
        with average.swapped():
            inside = compiled(inputs)
            assert torch.equal(inside, model(inputs))
        assert not torch.equal(inside, compiled(inputs))
