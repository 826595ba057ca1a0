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


def bump(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)


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
        bump(model)
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
        bump(model)
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
            bump(model)
            average.update()
            ema.update(model)
            with average.swapped():
                model(torch.ones(size + 2, 2))
        assert torch.equal(average.weights()["layer.weight"], ema.ema.layer.weight)
        average.load_state_dict(state)

    def test_sparse_buffers_are_left_alone(self):
        model = Part(lambda m: m.register_buffer("graph", torch.eye(3).to_sparse()))
        average = polyak.WeightAverage(model, HALF)
        bump(model)
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
        bump(model)
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
        bump(model)
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
            bump(made)
            made.average.update()
            assert not torch.equal(made.average.weights()["0.weight"], live[0].weight)
        bump(model)
        model.average.update()
        assert torch.equal(model.average.weights()["0.weight"], live[0].weight)


class TestSwap:
    @pytest.mark.protects
    def test_averages_of_one_model_know_of_each_others_swaps(self):
        model = zoo.mlp()
        one, other, ema = polyak.WeightAverage(model, HALF), polyak.WeightAverage(model), polyak.ModelEma(model)
        bump(model)
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
        bump(model)
        average.update()
        with average.swapped():
            state = average.state_dict()
        (tensors,) = state["averages"].values()
        assert zoo.bit_equal(tensors["average"], average.weights())

    def test_swap_in_and_out_by_hand(self):
        model = zoo.mlp()
        average = polyak.WeightAverage(model, HALF)
        bump(model)
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
            bump(model)
            average.update()
            ema.update(model)
        assert zoo.bit_equal(average.weights(), dict(ema.ema.state_dict()))


class TestUpdates:
    @pytest.mark.protects
    def test_a_failed_update_changes_nothing(self):
        model = zoo.mlp()
        ema = polyak.ModelEma(model, 0.5)
        ema.ema.double()
        with pytest.raises(polyak.MismatchError):
            ema.update(nn.Linear(3, 3))
        before = ema.ema[0].weight.clone()
        bump(model)
        ema.update(model)
        torch.testing.assert_close(ema.ema[0].weight, before + 0.5)

    def test_an_error_about_a_frozen_parameter_does_not_leave_the_old_tensors(self):
        model = zoo.mlp()
        model[0].requires_grad_(False)
        average = polyak.WeightAverage(model, HALF)
        model[2].weight = nn.Parameter(model[2].weight.detach().clone())
        model[0].requires_grad_(True)
        with pytest.raises(polyak.StateError, match=r"'0.weight' was frozen"):
            average.update()
        model[0].requires_grad_(False)
        nn.init.ones_(model[2].weight)
        before = average.weights()["2.weight"]
        average.update()
        torch.testing.assert_close(average.weights()["2.weight"], (before + 1) / 2)

    def test_an_interrupted_update_does_not_count_twice(self, monkeypatch):
        model = zoo.mlp()
        average = polyak.WeightAverage(model, HALF)
        before = average.weights()["0.bias"]
        bump(model)
        plan = type(average._core.store.plan)
        monkeypatch.setattr(plan, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            average.update()
        monkeypatch.undo()
        average.update()
        torch.testing.assert_close(average.weights()["0.bias"], before + 0.5)

    @pytest.mark.protects
    def test_freed_memory_is_not_read(self):
        model = zoo.mlp()
        average = polyak.WeightAverage(model)
        before = zoo.clone(average._core.store.averages["average"])
        model[0].weight.untyped_storage().resize_(0)
        with pytest.raises(polyak.StateError, match=r"the memory of '0.weight' was freed, by offloading or sharding"):
            average.update()
        assert zoo.bit_equal(average._core.store.averages["average"], before)

    def test_transposed_data_at_the_same_address(self):
        model = nn.Linear(3, 3, bias=False)
        average = polyak.WeightAverage(model, polyak.Exponential(0.0))
        model.weight.data = model.weight.data.t()
        average.report()
        average.update()
        assert torch.equal(average.weights()["weight"], model.weight)

    @pytest.mark.parametrize("at", ["7", True, None.__class__, torch.tensor([1.0, 2.0]), 10**400])
    def test_times_that_are_no_numbers(self, at):
        average = polyak.WeightAverage(zoo.mlp())
        with pytest.raises(TypeError, match=r"update\(at=.*\): a finite number is needed"):
            average.update(at=at)

    def test_backward_after_an_update(self):
        model = zoo.mlp()
        average = polyak.WeightAverage(model)
        loss = model(torch.ones(1, 6)).sum()
        average.update()
        loss.backward()

    def test_reset(self):
        model = zoo.mlp()
        average = polyak.WeightAverage(model, polyak.Exponential(0.9))
        for _ in range(3):
            bump(model)
            average.update()
        average.reset()
        assert (average.num_updates, average.time) == (0, 0)
        assert zoo.bit_equal(average.weights(), dict(model.state_dict()))

    def test_write_back(self):
        model = zoo.mlp()
        average = polyak.WeightAverage(model, HALF)
        bump(model)
        average.update()
        kept = average.weights()
        average.write_back()
        assert zoo.bit_equal(dict(model.state_dict()), kept)
        assert zoo.bit_equal(average.weights(), kept)

    def test_adapt_follows_a_model_that_changed_on_purpose(self):
        model = zoo.mlp()
        average = polyak.WeightAverage(model, {"half": HALF, "mean": polyak.Uniform()})
        bump(model)
        average.update()
        kept = average["half"].weights()["0.weight"]
        model[2] = nn.Linear(5, 7)
        with pytest.raises(polyak.MismatchError, match=r"'2.weight' of the model has the shape \(7, 5\)"):
            average.update()
        average.adapt()
        assert torch.equal(average["half"].weights()["0.weight"], kept)
        assert torch.equal(average["half"].weights()["2.weight"], model[2].weight)
        average.update()
        assert average.num_updates == 2


class TestFrozen:
    def frozen(self):
        model = zoo.mlp()
        model[0].requires_grad_(False)
        average = polyak.WeightAverage(model)
        average.update()
        return model, average

    @pytest.mark.protects
    def test_a_changed_value_raises_where_it_would_be_mixed_in(self, tmp_path):
        model, average = self.frozen()
        model[0].weight.data[0, 0] += 1
        for call in (average.state_dict, average.swap_in, lambda: average.export(tmp_path / "x.safetensors")):
            with pytest.raises(polyak.StateError, match=r"'0.weight' is frozen .* has changed since"):
                call()
        assert not average.is_swapped
        average.update()

    @pytest.mark.parametrize("order", ["model first", "average first"])
    def test_resuming_in_any_order(self, order):
        model, average = self.frozen()
        weights, state = zoo.clone(model.state_dict()), copy.deepcopy(average.state_dict())
        other, fresh = self.frozen()
        loads = [lambda: other.load_state_dict(weights), lambda: fresh.load_state_dict(state)]
        for load in loads if order == "model first" else loads[::-1]:
            load()
        with fresh.swapped():
            pass
        assert zoo.bit_equal(fresh.weights(), average.weights())


class TestNonFinite:
    def poison(self, model):
        with torch.no_grad():
            model[2].bias[0] = float("nan")

    @pytest.mark.protects
    @pytest.mark.parametrize("name", ["mlp", "batchnorm", "bfloat16"])
    def test_skip_equals_a_run_without_that_update(self, name):
        model = zoo.MODELS[name]()
        average = polyak.WeightAverage(model, polyak.Power(), nonfinite="skip")
        reference = polyak.WeightAverage(model, polyak.Power())
        for step in range(1, 9):
            zoo.drift(model)
            if step in (3, 4, 7):
                kept = zoo.clone(model.state_dict())
                with torch.no_grad():
                    next(model.parameters()).view(-1)[0] = float("inf") if step == 3 else float("nan")
                average.update(at=step)
                model.load_state_dict(kept)
            else:
                average.update(at=step)
                reference.update(at=step)
        assert zoo.bit_equal(average.weights(), reference.weights())
        assert average.report().num_skipped == 3
        resumed = polyak.WeightAverage(model, polyak.Power(), nonfinite="skip")
        resumed.load_state_dict(copy.deepcopy(average.state_dict()))
        assert resumed.report().num_skipped == 3
        resumed.reset()
        assert resumed.report().num_skipped == 0

    @pytest.mark.protects
    def test_raise_names_the_tensors_and_writes_nothing(self):
        model = zoo.mlp()
        average = polyak.WeightAverage(model, HALF, nonfinite="raise")
        before = average.weights()
        bump(model)
        self.poison(model)
        with pytest.raises(polyak.StateError, match=r"NaNs or infinities in '2.bias'.*nonfinite='skip'"):
            average.update()
        assert zoo.bit_equal(average.weights(), before)
        assert average.num_updates == 0

    def test_propagate_is_the_default(self):
        model = zoo.mlp()
        average = polyak.WeightAverage(model, HALF)
        self.poison(model)
        average.update()
        assert average.weights()["2.bias"].isnan().sum() == 1

    def test_large_finite_values_are_finite(self):
        model = nn.Linear(4, 4)
        nn.init.constant_(model.weight, 3e38)
        average = polyak.WeightAverage(model, HALF, nonfinite="raise")
        average.update()
        assert average.num_updates == 1


class TestAttach:
    def train(self, model, optimizer, num_batches, accumulation=1, scaler=None, overflow_at=()):
        for batch in range(1, num_batches + 1):
            loss = model(torch.randn(3, 6)).square().mean()
            (scaler.scale(loss) if scaler else loss).backward()
            if batch % accumulation == 0:
                if batch in overflow_at:
                    model[0].weight.grad.fill_(float("inf"))
                if scaler:
                    scaler.step(optimizer)
                    scaler.update()
                else:
                    optimizer.step()
                optimizer.zero_grad()

    @pytest.mark.protects
    def test_counts_optimizer_steps_and_not_batches(self):
        model = zoo.mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        average, by_hand = polyak.WeightAverage(model), polyak.WeightAverage(model)
        handle = average.attach(optimizer)
        optimizer.register_step_post_hook(lambda *_: by_hand.update())
        self.train(model, optimizer, 12, accumulation=4)
        assert average.num_updates == 3
        assert zoo.bit_equal(average.weights(), by_hand.weights())
        with pytest.raises(polyak.StateError, match=r"update\(\) where an optimizer is attached would count twice"):
            average.update()
        handle.detach()
        handle.detach()
        self.train(model, optimizer, 4)
        assert average.num_updates == 3
        average.update()

    @pytest.mark.protects
    @pytest.mark.parametrize("fused", [False, True])
    def test_steps_that_a_grad_scaler_skips_are_none(self, fused):
        model = zoo.mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        average = polyak.WeightAverage(model)
        average.attach(optimizer)
        self.train(model, optimizer, 6, scaler=scaler, overflow_at=(2, 5))
        assert average.num_updates == 4

    @pytest.mark.protects
    def test_several_optimizers_make_one_update_a_round(self):
        model = zoo.mlp()
        optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (model[0], model[2])]
        average = polyak.WeightAverage(model)
        average.attach(*optimizers)
        for optimizer in (optimizers[0], optimizers[0], optimizers[1], optimizers[1], optimizers[0]):
            model(torch.randn(3, 6)).sum().backward()
            optimizer.step()
        assert average.num_updates == 2

    def test_one_optimizer_given_twice_is_one(self):
        model = zoo.mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        average = polyak.WeightAverage(model)
        average.attach(optimizer, optimizer)
        self.train(model, optimizer, 3)
        assert average.num_updates == 3

    def test_on_another_time_axis(self):
        model = zoo.mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        average = polyak.WeightAverage(model)
        seen = iter([32, 64, 80])
        average.attach(optimizer, at=lambda: next(seen))
        self.train(model, optimizer, 3)
        assert average.time == 80

    def test_impossible_calls(self):
        model = zoo.mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        average = polyak.WeightAverage(model)
        for wrong in ((), (model,)):
            with pytest.raises(TypeError, match=r"attach: .* is needed"):
                average.attach(*wrong)
        with pytest.raises(TypeError, match=r"attach: at=5 is no function; it gives the time"):
            average.attach(optimizer, at=5)
        with pytest.raises(ValueError, match=r"attach: this SGD trains no parameter of the model"):
            average.attach(torch.optim.SGD(zoo.mlp().parameters(), lr=0.1))
        average.attach(optimizer)
        with pytest.raises(polyak.StateError, match=r"an optimizer is attached already"):
            average.attach(optimizer)


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
