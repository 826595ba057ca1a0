"""What models do that breaks averages elsewhere: each test is a model, or a call, that once went wrong silently."""

import copy
import functools
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

import polyak
import zoo

pytestmark = pytest.mark.filterwarnings("ignore:the average is .* after 0 updates")

HALF = polyak.Exponential(0.5)


class Part(nn.Module):
    """A linear layer and something beside it, made by a function of the module."""

    def __init__(self, add=lambda module: None):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        add(self)

    def forward(self, inputs):
        return self.layer(inputs)


class TestBuffers:
    @pytest.mark.protects
    def test_infinities_stay_what_they_are(self):
        model = Part(lambda m: m.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1)))
        ema, average = polyak.ModelEma(model), polyak.WeightAverage(model, HALF)
        for _ in range(3):
            ema.update(model)
            average.update()
        assert torch.equal(ema.ema.mask, model.mask)
        assert torch.equal(average.weights()["mask"], model.mask)

    @pytest.mark.protects
    @pytest.mark.parametrize("kind", ["float32", "float64 average", "bfloat16", "float16", "live"])
    def test_batchnorm_statistics_made_inside_a_swap_stay_with_the_average(self, kind):
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        if kind in ("bfloat16", "float16"):
            model.to(getattr(torch, kind))
        dtype = torch.float64 if kind == "float64 average" else None
        average = polyak.WeightAverage(model, HALF, dtype=dtype)
        live = average.live_module() if kind == "live" else None
        zoo.bump(model)
        average.update()
        raw = model[1].running_mean.clone()
        with average.swapped():
            model(torch.randn(64, 3, dtype=model[0].weight.dtype) * 5)
            made = model[1].running_mean.clone()
        assert torch.equal(average.weights()["1.running_mean"].to(made.dtype), made)
        assert torch.equal(model[1].running_mean, raw)
        assert live is None or torch.equal(live[1].running_mean, made)

    def test_expanded_buffers_are_left_alone(self):
        model = Part(lambda m: m.register_buffer("scale", torch.ones(1).expand(3)))
        average = polyak.WeightAverage(model, HALF)
        zoo.bump(model)
        average.update()
        with average.swapped():
            pass
        assert torch.equal(average.weights()["scale"], torch.ones(3))
        with pytest.raises(polyak.StateError, match=r"'scale' is an expanded view.*rules=\{'scale': 'skip'\}"):
            polyak.WeightAverage(model, HALF, rules={"scale": "copy"})

    @pytest.mark.parametrize("persistent", [True, False])
    def test_buffers_that_a_forward_replaces(self, persistent):
        class Counting(Part):
            def forward(self, inputs):
                self.steps = self.steps + 1
                return self.layer(inputs)

        model = Counting(lambda m: m.register_buffer("steps", torch.zeros(()), persistent=persistent))
        average = polyak.WeightAverage(model, polyak.Exponential(0.0))
        model(torch.ones(1, 2))
        average.update()
        with average.swapped():
            model(torch.ones(1, 2))
        assert model.steps == 1
        assert average._core.store.tensors("average")["steps"] == 2

    @pytest.mark.protects
    @pytest.mark.parametrize("rules", [{}, {"cache": "skip"}])
    @pytest.mark.filterwarnings("ignore:rules")
    def test_caches_that_come_go_and_grow(self, rules):
        class Caching(Part):
            def forward(self, inputs):
                self.cache = torch.zeros(len(inputs))
                return self.layer(inputs)

        model = Caching(lambda m: m.register_buffer("cache", None, persistent=False))
        average, ema = polyak.WeightAverage(model, HALF, rules=rules), polyak.ModelEma(model, 0.5)
        state = copy.deepcopy(average.state_dict())
        for size in (4, 4, 7):
            model(torch.ones(size, 2))
            ema.ema(torch.ones(size + 1, 2))
            zoo.bump(model)
            average.update()
            ema.update(model)
            with average.swapped():
                model(torch.ones(size + 2, 2))
        assert torch.equal(average.weights()["layer.weight"], ema.ema.layer.weight)
        average.load_state_dict(state)

    def test_sparse_buffers_are_left_alone(self):
        model = Part(lambda m: m.register_buffer("graph", torch.eye(3).to_sparse()))
        average = polyak.WeightAverage(model, HALF)
        zoo.bump(model)
        average.update()
        with average.swapped():
            pass
        assert average.weights()["graph"].is_sparse
        with pytest.raises(polyak.StateError, match=r"'graph' cannot be averaged: it is a Tensor, torch.sparse_coo"):
            polyak.WeightAverage(model, HALF, rules={"graph": "average"})

    def test_a_conjugate_view_is_no_tie(self):
        def add(module):
            module.register_buffer("f", torch.randn(3, dtype=torch.complex64))
            module.register_buffer("fc", module.f.conj())

        with pytest.raises(polyak.MismatchError, match=r"'f' \(3,\) and 'fc' \(3,\) share memory"):
            polyak.WeightAverage(Part(add), HALF)


class TestCopies:
    """A copy of a module is right or is refused."""

    def own_way(self, module):
        class Own(nn.Linear):
            def __deepcopy__(self, memo):
                made = type(self)(2, 2)
                made.load_state_dict(self.state_dict())
                return made

        module.own = Own(2, 2)

    def cached_method(self, module):
        module.f = functools.lru_cache(None)(module.forward)

    def weak_parent(self, module):
        module.layer.parent = weakref.ref(module)

    def plain_object(self, module):
        class Holder:
            def __init__(self, function):
                self.function = function

        module.holder = Holder(lambda inputs: module.layer(inputs))

    def slots(self, module):
        class Slotted:
            __slots__ = ("function",)

        module.holder = Slotted()
        module.holder.function = lambda inputs: module.layer(inputs)

    def detached(self, module):
        module.transposed = module.layer.weight.detach().t()

    def data_in_a_list(self, module):
        module.views = [module.layer.weight.data]

    @pytest.mark.protects
    @pytest.mark.parametrize(
        "add", [own_way, cached_method, weak_parent, plain_object, slots, detached, data_in_a_list]
    )
    def test_what_would_read_the_trained_weights_is_refused(self, add):
        model = Part(functools.partial(add, self))
        for make in (polyak.WeightAverage(model, HALF).module, lambda: polyak.ModelEma(model)):
            with pytest.raises(polyak.StateError, match=r"Part cannot be copied: .* average\.swapped\(\)"):
                make()

    @pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
    def test_recurrent_layers(self, make):
        model = make(3, 4, num_layers=2)
        average = polyak.WeightAverage(model, HALF)
        module, live = average.module(), average.live_module()
        zoo.bump(model)
        average.update()
        inputs = torch.randn(5, 1, 3)
        with average.swapped(), torch.no_grad():
            expected = model(inputs)[0]
        torch.testing.assert_close(live(inputs)[0], expected)
        torch.testing.assert_close(average.module()(inputs)[0], expected)
        assert not torch.allclose(module(inputs)[0], expected)

    @pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
    @pytest.mark.parametrize("normalise", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
    def test_weight_norm(self, normalise):
        model = nn.Sequential(normalise(nn.Linear(3, 2)))
        inputs = torch.randn(4, 3)
        model(inputs).sum().backward()
        average = polyak.WeightAverage(model, HALF)
        zoo.bump(model)
        average.update()
        with average.swapped(), torch.no_grad():
            expected = model(inputs)
        torch.testing.assert_close(average.module()(inputs), expected)
        torch.testing.assert_close(average.live_module()(inputs), expected)

    def test_a_wrapper_that_computes_is_a_model(self):
        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.module = nn.Linear(2, 2)

            def forward(self, inputs):
                return self.module(inputs) * 10

        model, inputs = Scaled(), torch.ones(1, 2)
        average, ema = polyak.WeightAverage(model, HALF), polyak.ModelEma(model)
        assert torch.equal(ema.ema(inputs), model(inputs))
        assert torch.equal(average.module()(inputs), model(inputs))
        model.load_state_dict(average.weights(), strict=True)
        # And where only the one is wrapped, names find one another.
        ema.update(model.module)
        polyak.ModelEma(model.module).update(model)

    def test_a_model_with_its_average_can_be_pickled_and_copied(self):
        model = zoo.mlp()
        model.average = polyak.WeightAverage(model, HALF)
        live = model.average.live_module()
        for made in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            zoo.bump(made)
            made.average.update()
            assert not torch.equal(made.average.weights()["0.weight"], live[0].weight)
        zoo.bump(model)
        model.average.update()
        assert torch.equal(model.average.weights()["0.weight"], live[0].weight)


class TestSwap:
    @pytest.mark.protects
    def test_averages_of_one_model_know_of_each_others_swaps(self):
        model = zoo.mlp()
        one, other, ema = polyak.WeightAverage(model, HALF), polyak.WeightAverage(model), polyak.ModelEma(model)
        zoo.bump(model)
        for average in (one, other):
            average.update()
        with one.swapped():
            for call in (other.update, other.swap_in, lambda: other.swapped().__enter__(), lambda: ema.update(model)):
                with pytest.raises(polyak.StateError, match=r"the average 'average' stands in the model now"):
                    call()
            # What is not swapped cannot be swapped out, and what is stays.
            other.swap_out()
            with pytest.raises(polyak.StateError, match=r"the average 'average' stands in the model now"):
                other.update()
            with pytest.raises(polyak.StateError, match=r"swap_in\(\) inside of swapped\(\)"):
                one.swap_in()
            assert one.is_swapped
        another = zoo.mlp()
        elsewhere = polyak.WeightAverage(another, HALF)
        with elsewhere.swapped(), pytest.raises(polyak.StateError, match=r"update\(\) inside of swapped"):
            ema.update(another)
        other.update()
        ema.update(model)

    def test_swapping_out_another_average_than_the_one_that_stands_there(self):
        average = polyak.WeightAverage(zoo.mlp(), {"one": HALF, "two": polyak.Uniform()})
        with average["one"].swapped():
            with pytest.raises(
                polyak.StateError, match=r"swap_out\(\) of 'two': the average 'one' stands in the model"
            ):
                average["two"].swap_out()
            assert average.is_swapped

    @pytest.mark.protects
    @pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}])
    def test_an_optimizer_must_not_train_the_average(self, options):
        model = zoo.mlp()
        average = polyak.WeightAverage(model, HALF)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
        other = torch.optim.SGD(zoo.mlp().parameters(), lr=0.1)
        model(torch.ones(1, 6)).sum().backward()
        kept = average.weights()
        with average.swapped():
            with pytest.raises(polyak.StateError, match=r"optimizer.step\(\) inside of swapped\(\)"):
                optimizer.step()
            other.step()
        assert zoo.bit_equal(average.weights(), kept)
        optimizer.step()

    @pytest.mark.protects
    def test_a_write_past_the_version_counter_is_noticed(self):
        model = zoo.mlp()
        average = polyak.WeightAverage(model, HALF)
        raw = zoo.clone(model.state_dict())
        with pytest.raises(polyak.StateError, match=r"changed inside of swapped\(\): '0.weight'"), average.swapped():
            model[0].weight.data.add_(5)
        assert zoo.bit_equal(dict(model.state_dict()), raw)

    @pytest.mark.protects
    @pytest.mark.parametrize("name", ["mlp", "bfloat16"])
    def test_a_state_taken_inside_lasts(self, name):
        model = zoo.MODELS[name]()
        average = polyak.WeightAverage(model, HALF)
        zoo.bump(model)
        average.update()
        with average.swapped():
            state = average.state_dict()
        (tensors,) = state["averages"].values()
        assert zoo.bit_equal(tensors["average"], average.weights())

    def test_swap_in_and_out_by_hand(self):
        model = zoo.mlp()
        average = polyak.WeightAverage(model, HALF)
        zoo.bump(model)
        average.update()
        raw, kept = zoo.clone(model.state_dict()), average.weights()
        average.swap_in()
        assert average.is_swapped
        assert zoo.bit_equal(dict(model.state_dict()), kept)
        assert zoo.bit_equal(average.raw_weights(), raw)
        average.swap_out()
        average.swap_out()
        assert not average.is_swapped
        assert zoo.bit_equal(dict(model.state_dict()), raw)
        average.swap_in()
        nn.init.zeros_(model[0].bias)
        with pytest.raises(polyak.StateError, match=r"changed inside of swapped\(\): '0.bias'"):
            average.swap_out()
        assert zoo.bit_equal(average.raw_weights(), raw)

    @pytest.mark.parametrize("name", ["mlp", "bfloat16", "float16"])
    def test_inference_mode(self, name):
        model = zoo.MODELS[name]()
        with torch.inference_mode():
            average, ema = polyak.WeightAverage(model, HALF), polyak.ModelEma(model, 0.5)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        manager = average.swapped()
        with torch.inference_mode():
            manager.__enter__()
        manager.__exit__(None, None, None)
        for _ in range(2):
            zoo.bump(model)
            average.update()
            ema.update(model)
        assert zoo.bit_equal(average.weights(), dict(ema.ema.state_dict()))


def test_extra_state_loads_strictly(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"scale": 3}

        def set_extra_state(self, state):
            assert state == {"scale": 3}

    model = nn.Sequential(Extra(2, 2))
    average = polyak.WeightAverage(model)
    model.load_state_dict(average.weights(), strict=True)
    with pytest.warns(UserWarning, match=r"left out of the file, which holds tensors only: '0._extra_state'"):
        average.export(tmp_path / "x.safetensors")


def test_interleaved_slices_share_no_memory():
    whole = torch.randn(4, 6)
    model = nn.Module()
    model.left, model.right = nn.Parameter(whole[:, :3]), nn.Parameter(whole[:, 3:])
    assert len(polyak.WeightAverage(model).weights()) == 2


def test_a_dropped_live_module_is_let_go():
    model = zoo.mlp()
    average = polyak.WeightAverage(model)
    reference = weakref.ref(average.live_module())
    gc.collect()
    assert reference() is None


def test_updates_in_a_thread_beside_evaluations_of_a_copy():
    model = zoo.mlp()
    average = polyak.WeightAverage(model, HALF)
    copied = average.module()
    thread = threading.Thread(target=lambda: [average.update() for _ in range(50)])
    thread.start()
    for _ in range(50):
        copied(torch.ones(1, 6))
    thread.join()
    assert average.num_updates == 50
